"""`generate` and `chat` through the real SDK and a real gRPC server; the model behind it reverses its prompt."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cli.main import run
from phasewise.core.errors import Overloaded, Unavailable, WorkerLost
from tests.phasewise.scripted_service import WAIT_S, Attempt, ScriptedService, chat_text, serve_in_thread

TOP = Path(__file__).resolve().parents[2]


@pytest.fixture
def service() -> ScriptedService:
    return ScriptedService(num_deltas_at_once=1)


@pytest.fixture
def address(service: ScriptedService) -> Iterator[str]:
    with serve_in_thread(service) as serving:
        yield serving.target


def test_generate_streams_the_text_and_ends_the_line(
    service: ScriptedService, address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--max-tokens", "5", "--temperature", "0", "--top-p", "0.5", "--seed", "7", "--stop", "a", "--stop", "b"]
    flags += ["--min-tokens", "2"]
    assert run(["generate", "hello", "--grpc", address, *flags]) == 0
    assert capsys.readouterr().out == "olleh\n"
    (request,) = service.requests
    assert request.text == "hello"
    sampling = request.sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p, sampling.seed) == (5, 0.0, 0.5, 7)
    assert (sampling.min_tokens, sampling.stop) == (2, ("a", "b"))


def test_generate_in_the_chat_template(
    service: ScriptedService, address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["generate", "hi", "--chat", "--grpc", address, "--max-tokens", "4"]) == 0
    prompt = chat_text(({"role": "user", "content": "hi"},))
    assert capsys.readouterr().out == prompt[::-1][:4] + "\n"


def test_generate_reads_stdin(
    service: ScriptedService, address: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("from stdin"))
    assert run(["generate", "-", "--grpc", address, "--max-tokens", "5"]) == 0
    assert capsys.readouterr().out == "nidts\n"


def test_several_samples_are_numbered(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["generate", "abc", "--n", "2", "--grpc", address, "--max-tokens", "3"]) == 0
    assert capsys.readouterr().out == "[0] cba\n[1] cba\n"


def test_json_has_all_of_it(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", "abc", "--n", "2", "--json", "--timeline", "--grpc", address, "--max-tokens", "3"]
    assert run(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert [sample["text"] for sample in found["samples"]] == ["cba", "cba"]
    assert found["samples"][0]["token_ids"] == [99, 98, 97]
    assert found["samples"][0]["finish_reason"] == "length"
    assert found["usage"] == {"prompt_tokens": 3, "output_tokens": 6, "cached_tokens": 1}
    assert found["placement"] == {"prefill_worker": "prefill-0", "decode_worker": "decode-0", "attempt": 2}
    assert [event["stage"] for event in found["timeline"]] == ["received", "handoff_end"]


def test_the_timeline_is_readable_and_apart_from_the_answer(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["generate", "abc", "--timeline", "--grpc", address, "--max-tokens", "3"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "cba\n"
    lines = captured.err.splitlines()
    assert lines[0].startswith("request ")
    assert lines[1].split() == ["+0.00", "ms", "received", "gateway"]
    assert lines[2].split() == ["+250.00", "ms", "handoff_end", "decode-0", "4,096", "bytes,", "125.00", "ms"]
    assert lines[3] == "prefill on prefill-0, decode on decode-0, attempt 2"


def test_a_refusal_of_the_server_is_one_line(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["generate", "x", "--grpc", address, "--max-tokens", "0"]) == 1
    assert capsys.readouterr().err == "phasewise: max_tokens must be at least 1\n"


def test_a_cluster_that_is_starting_is_not_an_absent_one(
    service: ScriptedService, address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    service.script(*[Attempt(Unavailable("the cluster is starting"), refuse=True)] * 4)
    assert run(["generate", "x", "--grpc", address]) == 1
    assert capsys.readouterr().err == "phasewise: the cluster is starting; it is safe to try again\n"


def test_an_error_in_the_middle_keeps_what_came(
    service: ScriptedService, address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    service.script(Attempt(WorkerLost("decode-0 is gone"), num_tokens=2))
    assert run(["generate", "hello", "--grpc", address]) == 1
    captured = capsys.readouterr()
    assert captured.out == "ol"
    assert "decode-0 is gone" in captured.err


def test_chat_keeps_the_history_and_reset_forgets_it(
    service: ScriptedService, address: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n\ntwo\n/rest\n/help\n/reset\nthree\n/quit\nnever\n"))
    assert run(["chat", "--grpc", address, "--system", "be brief", "--max-tokens", "3", "--seed", "1"]) == 0
    captured = capsys.readouterr()
    system = {"role": "system", "content": "be brief"}
    first = [system, {"role": "user", "content": "one"}]
    answers = captured.out.splitlines()
    second = [*first, {"role": "assistant", "content": answers[0]}, {"role": "user", "content": "two"}]
    assert [list(request.messages or ()) for request in service.requests] == [
        first,
        second,
        [system, {"role": "user", "content": "three"}],
    ]
    assert len(answers) == 3
    assert "no command '/rest'; did you mean '/reset'?" in captured.err
    assert "/quit   leave" in captured.err


def test_chat_without_a_terminal_ends_at_an_error(
    service: ScriptedService, address: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    service.script(*[Attempt(Overloaded("queues are full"), refuse=True)] * 4)
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n"))
    assert run(["chat", "--grpc", address]) == 1
    assert "queues are full" in capsys.readouterr().err


class Terminal:
    """`phasewise chat` on a real pseudo-terminal, as a person has it."""

    def __init__(self, address: str) -> None:
        self._side, other = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "cli.main", "chat", "--grpc", address],
            cwd=TOP, stdin=other, stdout=other, stderr=other, start_new_session=True,
        )  # fmt: skip
        os.close(other)
        self.seen = ""

    def wait_for(self, text: str) -> str:
        """Reads until `text` has come (the test's own time-out ends a hopeless wait); returns what came up to it."""
        while text not in self.seen:
            try:
                data = os.read(self._side, 4096)
            except OSError as error:  # the other side is closed
                raise AssertionError(f"{text!r} never came, only {self.seen!r}") from error
            self.seen += data.decode()
        before, _, self.seen = self.seen.partition(text)
        return before

    def interrupt(self) -> None:
        """Ctrl-C in the middle of an answer."""
        self.process.send_signal(signal.SIGINT)

    def interrupt_at_prompt(self) -> None:
        """Ctrl-C until a fresh prompt comes: Python misses one that falls between readline's prompt and its select."""
        self.process.send_signal(signal.SIGINT)
        while "> " not in self.seen:
            if select.select([self._side], [], [], 1.0)[0]:
                self.seen += os.read(self._side, 4096).decode()
            else:
                self.process.send_signal(signal.SIGINT)
        self.seen = ""

    def type(self, text: str) -> None:
        os.write(self._side, text.encode())

    def close(self) -> None:
        self.process.kill()
        self.process.wait(WAIT_S)
        os.close(self._side)


@pytest.fixture
def terminal(address: str) -> Iterator[Terminal]:
    terminal = Terminal(address)
    yield terminal
    terminal.close()


def test_ctrl_c_stops_the_answer_and_not_the_conversation(service: ScriptedService, terminal: Terminal) -> None:
    service.script(Attempt(num_tokens=4))  # goes silent after four tokens
    terminal.wait_for("> ")
    terminal.type("hello\n")
    assert service.accepted.acquire(timeout=WAIT_S)
    terminal.wait_for(":tna")  # "assistant:" reversed begins so: the four tokens are on the screen
    terminal.interrupt()
    terminal.wait_for("(stopped)")
    assert service.last.closed.wait(WAIT_S), "the server still works on a stopped answer"
    terminal.wait_for("> ")
    terminal.interrupt_at_prompt()
    terminal.type("again\n")
    terminal.wait_for(":tnatsis")
    terminal.wait_for("> ")
    terminal.type("\x04")  # Ctrl-D
    assert terminal.process.wait(WAIT_S) == 0
    assert [dict(message) for message in service.requests[-1].messages or ()] == [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": ":tna"},
        {"role": "user", "content": "again"},
    ]


def test_ctrl_c_ends_generate_and_cancels_its_request(service: ScriptedService, address: str) -> None:
    service.script(Attempt(num_tokens=2))
    command = [sys.executable, "-m", "cli.main", "generate", "hello", "--grpc", address]
    process = subprocess.Popen(command, cwd=TOP, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.read(2) == "ol"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=WAIT_S)
    assert (process.returncode, errors) == (130, "")
    assert service.last.closed.wait(WAIT_S)


def test_an_error_does_not_end_a_conversation_at_a_terminal(service: ScriptedService, terminal: Terminal) -> None:
    service.script(Attempt(WorkerLost("decode-0 is gone"), num_tokens=2))
    terminal.wait_for("> ")
    terminal.type("hello\n")
    terminal.wait_for("phasewise: decode-0 is gone")
    terminal.wait_for("> ")
    terminal.type("/quit\n")
    assert terminal.process.wait(WAIT_S) == 0
