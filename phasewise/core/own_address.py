"""The address under which other processes of the cluster reach this host."""

from __future__ import annotations

import socket


def own_address(head: str) -> str:
    """The address under which those who can reach `head` can reach this host. (Its name may mean 127.0.1.1 here.)"""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((head, 1))  # sends nothing
        return str(probe.getsockname()[0])
