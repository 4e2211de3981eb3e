"""How much of something clients may have at once, together and each. Pure."""

from __future__ import annotations

import ipaddress
from collections import Counter

from phasewise.core.errors import InvalidRequest, Overloaded

MAX_ITEMS = 16_384
"""Of a list in a request that is not one of token ids: messages, stop strings."""

MAX_BIASES = 65_536


class Quota:
    """Counts what is taken and given back.

    Args:
        what: completes "there are 4096 …".
        most_per_client: below `most`, so that no client alone can shut the others out.
    """

    def __init__(self, what: str, most: int, most_per_client: int) -> None:
        self._what = what
        self._most = most
        self._most_per_client = most_per_client
        self._by_client: Counter[str] = Counter()
        self._in_use = 0

    @property
    def in_use(self) -> int:
        return self._in_use

    def take(self, client: str | None, amount: int = 1) -> None:
        """Takes for `client`; None: its address is not known. Raises Overloaded; then nothing is taken."""
        if self._in_use + amount > self._most:
            raise Overloaded(f"there are {self._most} {self._what} already", retry_after_s=1.0)
        if client is not None and self._by_client[client] + amount > self._most_per_client:
            raise Overloaded(
                f"there are {self._most_per_client} {self._what} from this client already, which is its share",
                retry_after_s=1.0,
            )
        self._in_use += amount
        if client is not None:
            self._by_client[client] += amount

    def give_back(self, client: str | None, amount: int = 1) -> None:
        """What `take` took."""
        self._in_use -= amount
        if client is not None:
            self._by_client[client] -= amount
            if not self._by_client[client]:
                del self._by_client[client]


def check_items(num_items: int, field: str, most: int = MAX_ITEMS) -> None:
    """Raises InvalidRequest for a list that no request can need."""
    if num_items > most:
        raise InvalidRequest(f"{field} has {num_items} items; at most {most} are allowed", field=field)


def share_of(most: int) -> int:
    """What one client may have of `most`: three quarters."""
    return max(1, most - most // 4)


def client_of(address: str) -> str:
    """The client of an IP address: the address itself, or for IPv6 its network of 64 bits, which one host has alone."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv4Address):
        return address
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    return str(ipaddress.ip_network((parsed, 64), strict=False))
