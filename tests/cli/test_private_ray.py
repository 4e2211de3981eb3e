"""What a private Ray is told; tests/cluster/test_guest.py looks at what comes of it."""

from __future__ import annotations

from cli.private_ray import private_ray_environment
from phasewise.core.config import build_config


def test_niceness_is_the_configurations_and_the_token_guards_every_call() -> None:
    config = build_config({"ray": {"niceness": 5}}, source="test")
    environment = private_ray_environment(config.ray, "secret")
    assert environment["RAY_worker_niceness"] == "5"
    assert (environment["RAY_AUTH_MODE"], environment["RAY_AUTH_TOKEN"]) == ("token", "secret")
    assert private_ray_environment(build_config({}, source="test").ray, "")["RAY_worker_niceness"] == "0"
