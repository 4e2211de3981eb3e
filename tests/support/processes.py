"""What the kernel knows of a cluster's processes: where they listen, how nice they are, what they were told."""

from __future__ import annotations

import os
import re
import socket
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")
_LISTENS = "0A"


@dataclass(frozen=True, slots=True)
class ClusterProcess:
    pid: int
    command: str

    @property
    def niceness(self) -> set[int]:
        """Of all its threads."""
        found = set()
        for thread in (_PROC / str(self.pid) / "task").iterdir():
            found.add(int((thread / "stat").read_text().rpartition(")")[2].split()[16]))
        return found

    @property
    def environment(self) -> dict[str, str]:
        """As it was when the process started."""
        entries = (_PROC / str(self.pid) / "environ").read_bytes().decode().split("\0")
        return dict(entry.split("=", 1) for entry in entries if "=" in entry)

    def listens(self) -> list[tuple[str, int]]:
        """Address and port of every TCP socket that it listens on."""
        listening, found = _listening(), []
        for file in (_PROC / str(self.pid) / "fd").iterdir():
            try:
                inode = re.fullmatch(r"socket:\[(\d+)\]", os.readlink(file))
            except OSError:  # closed meanwhile
                continue
            if inode and inode[1] in listening:
                found.append(listening[inode[1]])
        return found


def processes_of(session: int) -> list[ClusterProcess]:
    """All processes of a session."""
    found = []
    for folder in _PROC.iterdir():
        if not folder.name.isdigit():
            continue
        try:
            state = (folder / "stat").read_text().rpartition(")")[2].split()
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:  # it has ended meanwhile
            continue
        if int(state[3]) == session and state[0] != "Z":
            found.append(ClusterProcess(int(folder.name), command))
    return found


def _listening() -> dict[str, tuple[str, int]]:
    """Address and port by the inode of a listening TCP socket."""
    found = {}
    for name in ("tcp", "tcp6"):
        for line in (_PROC / "net" / name).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] != _LISTENS:
                continue
            address, port = fields[1].split(":")
            words = [bytes.fromhex(address[i : i + 8])[::-1] for i in range(0, len(address), 8)]  # little-endian
            family = socket.AF_INET if name == "tcp" else socket.AF_INET6
            found[fields[9]] = (socket.inet_ntop(family, b"".join(words)), int(port, 16))
    return found
