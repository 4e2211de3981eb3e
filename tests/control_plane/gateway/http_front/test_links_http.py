"""GET /links and POST /links/probe: over a service that only says what it was asked, and over real workers."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from control_plane.gateway.bodies import Bodies
from control_plane.gateway.http_front.openai_server import build_app
from control_plane.link_survey import DEFAULT_SIZES, DEFAULT_TIMEOUT_S
from phasewise.core.errors import Overloaded
from tests.support.local_cluster import local_cluster
from tests.support.tiny_model import save_tiny_model

MIB = 1 << 20


@pytest.fixture
def http(base_url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=base_url, timeout=60) as client:
        yield client


def test_a_probe_without_a_body_takes_the_defaults(http: httpx.Client) -> None:
    assert http.get("/links").json() == {"workers": [], "pairs": []}
    for content in (b"", b"{}"):
        answer = http.post("/links/probe", content=content)
        assert answer.json()["asked"] == [*DEFAULT_SIZES, DEFAULT_TIMEOUT_S]
    answer = http.post("/links/probe", json={"sizes": [64], "timeout_s": 2})
    assert answer.json()["asked"] == [64, 2.0]


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"sizes": "64"}, "sizes", "must be a list"),
        ({"sizes": [64.5]}, "sizes[0]", "whole number"),
        ({"sizes": [65]}, "sizes[0]", "multiple of 16"),
        ({"timeout_s": "2"}, "timeout_s", "must be a number"),
        ({"timeout_s": -1}, "timeout_s", "above 0"),
        ({"size": [64]}, "size", "did you mean 'sizes'"),
    ],
)
def test_a_wrong_body_is_refused_in_the_form_of_all_errors(
    body: dict[str, Any], param: str, words: str, http: httpx.Client
) -> None:
    answer = http.post("/links/probe", json=body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["param"], error["code"]) == (param, "invalid_request")
    assert words in error["message"]


def test_a_probe_is_posted(http: httpx.Client) -> None:
    assert http.get("/links/probe").status_code == 405


def test_who_comes_second_is_told_to_wait(service: Any, http: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    async def probe_links(*_: Any) -> dict[str, Any]:
        raise Overloaded("the links are being probed already; ask again later", retry_after_s=7.0)

    monkeypatch.setattr(service, "probe_links", probe_links)
    answer = http.post("/links/probe")
    assert (answer.status_code, answer.headers["retry-after"], answer.json()["error"]["code"]) == (
        429, "7", "overloaded",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("has_direct_links", "name", "largest"), [(False, "loopback", MIB), (True, "tcp", (1 << 16) + 4096)]
)
async def test_real_workers_are_measured_beside_a_running_request(
    has_direct_links: bool, name: str, largest: int, tmp_path: Path
) -> None:
    save_tiny_model(tmp_path)
    pools = {"prefill": {"workers": 1}, "decode": {"workers": 2, "block_size": 32}}
    async with local_cluster(tmp_path, has_direct_links=has_direct_links, pools=pools) as cluster:
        app = build_app(cluster.service, Bodies(1 << 20, 10))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test", timeout=60) as http:
            body = {"prompt": [1, 2, 3] * 20, "max_tokens": 40, "temperature": 0, "ignore_eos": True}
            request = asyncio.create_task(http.post("/v1/completions", json=body))
            report = (await http.post("/links/probe", json={"sizes": [32, MIB]})).json()
            assert (await request).status_code == 200
            for links in cluster.direct.values():
                links.forget("decode-0")
            facts = (await http.get("/links")).json()
        await asyncio.wait_for(cluster.until_empty(), 30)
    assert [(p["prefill"], p["decode"]) for p in report["pairs"]] == [
        ("prefill-0", "decode-0"), ("prefill-0", "decode-1"),
    ]  # fmt: skip
    for pair in report["pairs"]:
        assert [p["num_bytes"] for p in pair["probes"]] == [32, largest], "as large as the link takes"
        assert all(p["seconds"] > 0 and p["failure"] == "" for p in pair["probes"])
        assert (pair["link"], pair["dtype"], pair["is_lossless"], pair["refusal"]) == (name, "float32", True, "")
    assert [w["kv_layout"]["block_size"] for w in report["workers"]] == [16, 32, 32]
    assert len({w["wire_version"] for w in report["workers"]}) == 1
    assert [p["probes"] for p in facts["pairs"]] == [[], []], "only looked at"
    assert [p["link"] for p in facts["pairs"]] == ["loopback", name], "decode-0 is behind no direct link any more"
