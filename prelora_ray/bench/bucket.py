"""A bucket of this machine with the delay and the limit of a far one: as much of S3 as reading files takes."""

from __future__ import annotations

import multiprocessing
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from prelora_ray.environment import environment

_SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"


@dataclass
class Bucket:
    """The files of a folder as those of `uri`, until the block of `bucket` ends."""

    uri: str
    _counts: Any

    @property
    def requests(self) -> int:
        """That were answered so far, refused ones apart."""
        return int(self._counts[0])

    @property
    def refused(self) -> int:
        """That were answered by 503 so far."""
        return int(self._counts[1])

    @property
    def most_at_a_time(self) -> int:
        """That waited for their answers together."""
        return int(self._counts[2])


@contextmanager
def bucket(folder: Path, latency: float, requests_per_second: float = float("inf")) -> Iterator[Bucket]:
    """Has this process take a process of its own for S3, which serves the folder.

    Each answer takes `latency` seconds. What goes beyond `requests_per_second` is answered at once, by 503 SlowDown.
    """
    context = multiprocessing.get_context("spawn")
    counts = context.Array("q", 3)
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, str(folder), latency, requests_per_second, counts), daemon=True)
    process.start()
    theirs.close()  # so that a process that dies is noticed
    try:
        here = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{ours.recv()}",
            "AWS_ACCESS_KEY_ID": "bench",
            "AWS_SECRET_ACCESS_KEY": "bench",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        with environment(here):
            yield Bucket("s3://bucket", counts)
    finally:
        process.terminate()
        process.join()


def _serve(told: Connection, folder: str, latency: float, requests_per_second: float, counts: Any) -> None:
    allowed, waiting = _Allowance(requests_per_second), 0

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # connections are kept
        disable_nagle_algorithm = True

        def do_HEAD(self) -> None:
            self._answer(has_body=False)

        def do_GET(self) -> None:
            self._answer(has_body=True)

        def _answer(self, *, has_body: bool) -> None:
            nonlocal waiting
            is_allowed = allowed.take()
            with counts.get_lock():
                counts[0 if is_allowed else 1] += 1
            if not is_allowed:
                self._send(503, _SLOW_DOWN if has_body else b"")
                return
            with counts.get_lock():
                waiting += 1
                counts[2] = max(counts[2], waiting)
            time.sleep(latency)
            with counts.get_lock():
                waiting -= 1
            path = Path(folder, *unquote(urlsplit(self.path).path).split("/")[2:])
            if not path.is_file():
                self._send(404, b"<Error><Code>NoSuchKey</Code></Error>" if has_body else b"")
                return
            size = path.stat().st_size
            if not has_body:
                self._send(200, b"", size)
                return
            asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", f"bytes=0-{size - 1}"))
            assert asked is not None, self.headers["Range"]
            first, last = int(asked[1]), min(int(asked[2]), size - 1)
            with path.open("rb") as file:
                file.seek(first)
                self._send(206, file.read(last + 1 - first))

        def _send(self, status: int, body: bytes, length: int | None = None) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body) if length is None else length))
            self.send_header("Last-Modified", self.date_time_string(0))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    told.send(server.server_address[1])
    server.serve_forever()


class _Allowance:
    """Of requests, gained at a rate and kept for no more than a tenth of a second."""

    def __init__(self, per_second: float) -> None:
        self._per_second = per_second
        self._most = max(1.0, per_second / 10)
        self._left = self._most
        self._time = time.monotonic()
        self._lock = threading.Lock()

    def take(self) -> bool:
        """Whether one more is allowed now."""
        if self._per_second == float("inf"):
            return True
        with self._lock:
            now = time.monotonic()
            self._left = min(self._most, self._left + (now - self._time) * self._per_second)
            self._time = now
            if self._left < 1:
                return False
            self._left -= 1
            return True
