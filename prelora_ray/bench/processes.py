"""What processes of this machine have used, as Linux counts it: CPU time, memory, open files, and what TCP carried."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")
_NETLINK_SOCK_DIAG, _SOCK_DIAG_BY_FAMILY, _DUMP = 4, 20, 0x301
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_INET_DIAG_INFO = 2
_INODE, _ATTRIBUTES = 68, 72
"""Where in a kernel's `inet_diag_msg` a socket's inode is, and where its attributes begin."""
_COUNTS = (("=II", 152), ("=QQ", 120))
"""Where in a kernel's `tcp_info` are the segments with data, received and sent, and the bytes, sent and received."""
_ALL_COUNTS = 160
"""Length of one that has them."""


@dataclass(frozen=True)
class Usage:
    """Of one process, from its begin on."""

    command: str
    """Its command line, which Ray replaces by a title: `ray::RayTrainWorker`."""
    parent: int
    cpu: float
    """Seconds of all its threads."""
    memory: int
    """Bytes, of what it shares with other processes its share (PSS)."""
    files: int
    """Open ones, sockets included."""
    sockets: dict[int, tuple[int, int]]
    """By inode, packets with data and their bytes, sent and received, of the TCP connections that are open."""


def usages(root: int) -> dict[int, Usage]:
    """Of the process `root` and all that descend from it, by process number."""
    parents = {int(folder.name): _parent(folder) for folder in _PROC.iterdir() if folder.name.isdigit()}
    sockets = _sockets()
    found = {}
    for pid in parents:
        if root in (pid, *_ancestors(pid, parents)):
            with contextlib.suppress(OSError):  # it has ended
                found[pid] = _usage(pid, parents[pid], sockets)
    return found


def available_memory() -> int:
    """Bytes that new processes can have before the machine swaps."""
    line = next(line for line in Path(_PROC, "meminfo").read_text().splitlines() if line.startswith("MemAvailable:"))
    return int(line.split()[1]) * 1024


def cpu_seconds(pid: int) -> float:
    """Of all threads of a process since its begin. Raises OSError where there is none."""
    return time.clock_gettime((~pid << 3) | 2)  # what clock_getcpuclockid(3) returns


def _parent(folder: Path) -> int:
    try:
        return int((folder / "stat").read_text().rpartition(")")[2].split()[1])
    except OSError:  # it has ended
        return 0


def _ancestors(pid: int, parents: Mapping[int, int]) -> Iterator[int]:
    while pid := parents.get(pid, 0):
        yield pid


def _usage(pid: int, parent: int, sockets: Mapping[int, tuple[int, int]]) -> Usage:
    folder = _PROC / str(pid)
    links = [_link(file) for file in os.scandir(folder / "fd")]
    own = [int(link[8:-1]) for link in links if link.startswith("socket:[")]
    rollup = (folder / "smaps_rollup").read_text().split()
    return Usage(
        command=(folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip(),
        parent=parent,
        cpu=cpu_seconds(pid),
        memory=int(rollup[rollup.index("Pss:") + 1]) * 1024,
        files=len(links),
        sockets={inode: sockets[inode] for inode in own if inode in sockets},
    )


def _link(file: os.DirEntry[str]) -> str:
    try:
        return os.readlink(file.path)
    except OSError:  # closed meanwhile
        return ""


def _sockets() -> dict[int, tuple[int, int]]:
    """Of every TCP connection of this network namespace, by inode: packets with data and bytes, sent and received."""
    found: dict[int, tuple[int, int]] = {}
    for family in (socket.AF_INET, socket.AF_INET6):
        request = struct.pack("=BBBBI48x", family, socket.IPPROTO_TCP, 1 << (_INET_DIAG_INFO - 1), 0, 0xFFFFFFFF)
        header = struct.pack("=IHHII", 16 + len(request), _SOCK_DIAG_BY_FAMILY, _DUMP, 0, 0)
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG) as kernel:
            kernel.send(header + request)
            while _add_part(found, kernel.recv(2**18)):
                pass
    return found


def _add_part(found: dict[int, tuple[int, int]], answer: bytes) -> bool:
    """Takes in a part of the kernel's answer; whether more follows. Raises OSError where the kernel refuses."""
    at = 0
    while at < len(answer):
        length, kind = struct.unpack_from("=IH", answer, at)
        if kind == _NLMSG_ERROR:
            (code,) = struct.unpack_from("=i", answer, at + 16)
            raise OSError(-code, os.strerror(-code))
        if kind == _NLMSG_DONE:
            return False
        message = answer[at + 16 : at + length]
        (inode,) = struct.unpack_from("=I", message, _INODE)
        if (info := _tcp_info(message)) is not None and len(info) >= _ALL_COUNTS:
            packets, num_bytes = (struct.unpack_from(form, info, place) for form, place in _COUNTS)
            found[inode] = sum(packets), sum(num_bytes)
        at += (length + 3) & ~3
    return True


def _tcp_info(message: bytes) -> bytes | None:
    at = _ATTRIBUTES
    while at < len(message):
        length, kind = struct.unpack_from("=HH", message, at)
        if kind == _INET_DIAG_INFO:
            return message[at + 4 : at + length]
        at += (length + 3) & ~3
    return None
