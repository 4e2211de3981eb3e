"""Addresses that can be had, and those that cannot."""

from __future__ import annotations

import socket

import pytest

from control_plane.gateway.listening import bind_http, check_port, format_address
from phasewise.core.errors import ConfigError


def test_an_address_that_was_checked_can_be_listened_on() -> None:
    with bind_http("127.0.0.1:0") as first:
        address = format_address(first)
        assert not first.getblocking()
    check_port(address, "http")
    with bind_http(address) as second:
        assert format_address(second) == address
        with socket.create_connection(second.getsockname(), timeout=5):
            pass


def test_a_taken_port_and_a_host_of_others_are_named_with_the_flag_that_mends_it() -> None:
    with bind_http("127.0.0.1:0") as listener:
        address = format_address(listener)
        for name in ("http", "grpc"):
            with pytest.raises(ConfigError, match=rf"^--{name}: cannot listen on {address} \(.+--{name} HOST:PORT"):
                check_port(address, name)
        with pytest.raises(ConfigError, match=rf"^gateway\.http: cannot listen on {address} \(") as caught:
            bind_http(address)
        assert caught.value.field == "gateway.http"
    with pytest.raises(ConfigError, match=r"192\.0\.2\.1:8000"):  # an address for documentation: on no host
        check_port("192.0.2.1:8000", "http")


def test_an_ipv6_host_is_in_brackets() -> None:
    try:
        listener = bind_http("[::1]:0")
    except ConfigError:
        pytest.skip("this host has no IPv6")
    with listener:
        assert format_address(listener).startswith("[::1]:")
