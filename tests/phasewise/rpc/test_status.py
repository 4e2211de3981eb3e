"""Errors to statuses and back, without a wire. test_client.py does the same over a real one."""

from __future__ import annotations

import grpc
import pytest

from phasewise.core.errors import ERROR_BY_CODE, ConfigError, InternalError, InvalidRequest, Overloaded, ServingError
from phasewise.rpc import phasewise_pb2 as pb
from phasewise.rpc.status import ERROR_KEY, STATUS_BY_ERROR, from_status, to_status


def test_every_class_has_a_status() -> None:
    assert set(STATUS_BY_ERROR) == set(ERROR_BY_CODE.values())


@pytest.mark.parametrize("cls", ERROR_BY_CODE.values())
@pytest.mark.parametrize("retry_after_s", [None, 0.0, 2.5])
def test_round_trip(cls: type[ServingError], retry_after_s: float | None) -> None:
    status, message, metadata = to_status(cls("what is wrong", field="where", retry_after_s=retry_after_s))
    error = from_status(status, message, metadata, target="t")
    assert type(error) is cls and [key for key, _ in metadata] == [ERROR_KEY]
    assert (error.message, error.field, error.retry_after_s) == ("what is wrong", "where", retry_after_s)
    assert error.retry_safe == cls.retry_safe


def test_a_subclass_that_the_table_does_not_know_goes_as_its_parent() -> None:
    class TooLong(InvalidRequest):
        pass

    status, message, metadata = to_status(TooLong("x"))
    assert status is grpc.StatusCode.INVALID_ARGUMENT
    assert type(from_status(status, message, metadata, target="t")) is InvalidRequest


def test_a_code_of_the_future_falls_back_to_its_status_and_keeps_its_safety() -> None:
    detail = pb.ErrorDetail(code="quota", field="f", retry_safe=False).SerializeToString()
    error = from_status(grpc.StatusCode.RESOURCE_EXHAUSTED, "m", [(ERROR_KEY, detail)], target="t")
    assert type(error) is Overloaded and not error.retry_safe and error.field == "f"


def test_a_damaged_detail_is_an_internal_error() -> None:
    error = from_status(grpc.StatusCode.UNAVAILABLE, "m", [(ERROR_KEY, b"\xff\xff")], target="t")
    assert type(error) is InternalError


@pytest.mark.parametrize("status", [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK])
def test_every_bare_status_becomes_an_error_that_names_the_target(status: grpc.StatusCode) -> None:
    error = from_status(status, "from a proxy", [], target="host:1")
    assert "host:1" in error.message
    retryable = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED}
    assert error.retry_safe == (status in retryable)


def test_a_wrong_target_is_a_configuration_error() -> None:
    error = from_status(grpc.StatusCode.UNIMPLEMENTED, "unknown service", [], target="host:1")
    assert type(error) is ConfigError and error.field == "target"


def test_a_message_over_the_size_limit_is_the_callers() -> None:
    message = "CLIENT: Received message larger than max (5 vs. 4)"
    error = from_status(grpc.StatusCode.RESOURCE_EXHAUSTED, message, [], target="t")
    assert type(error) is InvalidRequest and error.field == "prompt" and not error.retry_safe


def test_long_texts_are_cut_at_a_whole_character() -> None:
    _, message, metadata = to_status(InvalidRequest("ü" * 10_000, field="ü" * 1000))
    assert set(message) == {"ü", "…"} and len(message.encode()) < 2000
    assert len(metadata[0][1]) < 400
