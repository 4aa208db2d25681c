"""What a process listens on, as the kernel tells it: TCP ports and unix sockets."""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path

_LISTENING_TCP = "0A"
_LISTENING_UNIX_FLAGS = 0x10000
_SOCKET = re.compile(r"socket:\[(\d+)\]")


def tcp_ports(process_id: int) -> list[int]:
    """Ports on which a process accepts TCP connections."""
    inodes = _inodes(process_id)
    ports = set()
    for table in ("tcp", "tcp6"):
        for line in Path("/proc/net", table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == _LISTENING_TCP and fields[9] in inodes:
                ports.add(int(fields[1].rpartition(":")[2], 16))
    return sorted(ports)


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
    folder = Path(f"/proc/{process_id}/fd")
    targets = [os.readlink(entry) for entry in folder.iterdir() if entry.is_symlink()]
    return {match[1] for target in targets if (match := _SOCKET.fullmatch(target))}
