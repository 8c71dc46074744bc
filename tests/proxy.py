"""An S3 server of this machine behind a proxy, which can be switched off, left without an answer, or slowed down."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from typing import Literal

import boto3
from moto.server import ThreadedMotoServer

State = Literal["on", "off", "silent"]
_CHUNK_BYTES = 2**16


class Proxy:
    """Forwards connections to its port, in threads of this process. Off, it ends them; silent, it never answers."""

    def __init__(self, host: str, port: int) -> None:
        self._server = host, port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._state: State = "on"
        self._is_on = threading.Event()
        self._is_on.set()
        self._open: set[socket.socket] = set()
        self.bytes_per_second: float | None = None
        """What a connection passes on in each direction; None is without a limit."""
        threading.Thread(target=self._accept, daemon=True).start()

    @contextlib.contextmanager
    def outage(self, state: State = "off") -> Iterator[None]:
        """For the time of a block the server cannot be reached."""
        self._switch(state)
        try:
            yield
        finally:
            self._switch("on")

    def close(self) -> None:
        self._switch("off")
        self._listener.close()

    def _switch(self, state: State) -> None:
        if state != "on":
            self._is_on.clear()
        self._state = state
        if state == "on":
            self._is_on.set()
        if state == "off":
            for connection in list(self._open):
                with contextlib.suppress(OSError):  # it has ended
                    connection.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError), socket.create_connection(self._server) as server:
            self._open |= {client, server}
            if self._state == "off":
                return
            back = threading.Thread(target=self._pass_on, args=(server, client), daemon=True)
            back.start()
            self._pass_on(client, server)
            back.join()
            self._open -= {client, server}

    def _pass_on(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):  # one side has ended
            while content := source.recv(_CHUNK_BYTES):
                if self._state == "silent":
                    self._is_on.wait()
                rate = self.bytes_per_second
                time.sleep(len(content) / rate if rate else 0.0)
                target.sendall(content)
        for side in (source, target):
            with contextlib.suppress(OSError):
                side.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def s3_server() -> Iterator[Proxy]:
    """The way to a server that this process and all it starts take for S3; it holds ``s3://bucket``."""
    logging.getLogger("werkzeug").setLevel(logging.WARNING)  # else a line a request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    proxy = Proxy(*server.get_host_and_port())
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{proxy.port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    boto3.client("s3").create_bucket(Bucket="bucket")
    try:
        yield proxy
    finally:
        proxy.close()
        server.stop()
