"""What a process listens on, as the kernel tells it: TCP ports and unix sockets."""

from __future__ import annotations

import contextlib
import os
import re
import socket
from pathlib import Path

_LISTENING_TCP = "0A"
_LISTENING_UNIX_FLAGS = 0x10000
_SOCKET = re.compile(r"socket:\[(\d+)\]")


def tcp_listeners(*process_ids: int) -> set[tuple[str, int]]:
    """(host, port) of all on which these processes accept TCP connections; IPv4, also as mapped into IPv6."""
    inodes = {inode for process_id in process_ids for inode in _inodes(process_id)}
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path("/proc/net", table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == _LISTENING_TCP and fields[9] in inodes:
                host, _, port = fields[1].partition(":")
                found.add((".".join(map(str, bytes.fromhex(host)[-4:][::-1])), int(port, 16)))
    return found


def tcp_ports(process_id: int) -> list[int]:
    """Ports on which a process accepts TCP connections."""
    return sorted({port for _, port in tcp_listeners(process_id)})


def unix_sockets(process_id: int) -> list[str]:
    """Addresses of unix sockets on which a process accepts connections: a path, or NUL and a name."""
    inodes = _inodes(process_id)
    found = []
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        fields = line.split()
        if int(fields[3], 16) & _LISTENING_UNIX_FLAGS and fields[6] in inodes and len(fields) > 7:
            found.append(re.sub("^@", "\0", fields[7]))
    return found


def stop_listening(address: str) -> None:
    """Let nobody connect to a unix socket of this process any more."""
    for inode in Path("/proc/self/fd").iterdir():
        try:
            held = socket.socket(fileno=os.dup(int(inode.name)))
        except OSError:
            continue  # no socket, or closed since
        with held:
            if held.family == socket.AF_UNIX and held.getsockname() == address.encode():
                held.shutdown(socket.SHUT_RDWR)


def _inodes(process_id: int) -> set[str]:
    """Of its open sockets; none of a process that has ended."""
    found = set()
    with contextlib.suppress(FileNotFoundError):
        for descriptor in Path(f"/proc/{process_id}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # closed since
                match = _SOCKET.fullmatch(os.readlink(descriptor))
                found |= {match[1]} if match else set()
    return found
