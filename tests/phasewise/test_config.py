"""The configuration: one YAML file, unknown keys refused with the nearest right name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from phasewise.core.config import ServingConfig, build_config, load_config
from phasewise.core.errors import ConfigError


def test_defaults_are_a_whole_cluster() -> None:
    config = load_config(None)
    assert config == ServingConfig()
    assert (config.pools.prefill.workers, config.pools.decode.workers, config.pools.mixed.workers) == (1, 1, 0)


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("pools: {decode: {workers: 3, threads: 2}}\ngateway: {http: '0.0.0.0:80'}\n")
    config = load_config(file, {"pools": {"decode": {"workers": 5}}})
    assert config.pools.decode.workers == 5
    assert config.pools.decode.threads == 2
    assert config.gateway.http == "0.0.0.0:80"


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"pool": {}}, "did you mean 'pools'?"),
        ({"pools": {"decode": {"worker": 1}}}, "'pools.decode.worker'; did you mean 'workers'?"),
        ({"cache": {"zzz": 1}}, "known keys: block_size"),
        ({"cache": {"block_size": 7}}, "cache.block_size"),
        ({"pools": {"decode": {"workers": -1}}}, "pools.decode.workers"),
        ({"pools": {"decode": {"workers": "many"}}}, "pools.decode.workers"),
        ({"pools": {"decode": {"workers": 0}}}, "at least one prefill and one decode worker"),
        ({"gateway": {"http": "localhost"}}, "HOST:PORT"),
        ({"gateway": {"http": "a:99999"}}, "65535"),
        ({"gateway": {"http": "a:1", "grpc": "a:1"}}, "must differ"),
        ({"model": {"dtype": "fp4"}}, "model.dtype"),
        ({"model": {"weights": "int4"}}, "model.weights"),
        ({"health": {"heartbeat_s": 20.0}}, "health: overdue_s 30 is less than two heartbeats of 20 s"),
        ({"cache": {"dtype": "fp8"}}, "cache.dtype: Input should be 'auto' or 'fp8_e4m3'"),
    ],
)
def test_what_is_wrong_is_named(values: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_config(values, source="cluster.yaml")
    assert expected in caught.value.message
    assert caught.value.message.startswith("cluster.yaml: ")
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("text", "expected"),
    [("pools: [", "not valid YAML"), ("- a\n- b\n", "must hold sections"), ("\0", "not valid YAML")],
)
def test_files_that_are_no_configuration(tmp_path: Path, text: str, expected: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=expected):
        load_config(file)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no-such\.yaml"):
        load_config(tmp_path / "no-such.yaml")


def test_a_pool_section_keeps_the_size_that_it_does_not_set() -> None:
    config = build_config({"pools": {"prefill": {"threads": 2}, "mixed": {"threads": 1}}}, source="test")
    assert (config.pools.prefill.workers, config.pools.prefill.threads) == (1, 2)
    assert config.pools.mixed.workers == 0


def test_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("# nothing yet\n")
    assert load_config(file) == ServingConfig()
