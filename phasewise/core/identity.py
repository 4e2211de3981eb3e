"""Who a member of a cluster is: a name and a birth.

A name is a place in the cluster, such as `decode-0`, and is for people. A process that ends and is started again under
the same name is somebody else, and has a later birth: `decode-0#2`. What is compared, remembered, reserved or refused
is always the identity. So what was said of `decode-0#1` is never believed of `decode-0#2`.
"""

from __future__ import annotations

MemberId = str
"""`<name>#<birth>`: `prefill-0#1`, `gateway-1#3`. Births of a name count from 1. A worker's name has its role at
birth."""


def member_id(name: str, birth: int) -> MemberId:
    return f"{name}#{birth}"


def name_of(member: MemberId) -> str:
    """`decode-0` of `decode-0#2`; a name alone is its own name."""
    return member.partition("#")[0]


def birth_of(member: MemberId) -> int:
    """2 of `decode-0#2`; 0 of a name alone."""
    return int(member.partition("#")[2] or 0)
