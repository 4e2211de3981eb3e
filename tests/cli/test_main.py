"""The command tree: help, near names, one-line errors, and what a command imports."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from cli.command_tree import COMMANDS
from cli.errors import CommandError, UsageProblem
from cli.main import explain, run
from phasewise.core.errors import ConfigError, InvalidRequest, Overloaded

TOP = Path(__file__).resolve().parents[2]


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out.startswith("phasewise ")


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_the_overview_names_every_command(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(arguments) == 0
    shown = capsys.readouterr().out
    for name in COMMANDS:
        assert f"\n  {name} " in shown


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_has_help_with_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([name, "--help"]) == 0
    captured = capsys.readouterr()
    assert f"Usage: phasewise {name}" in captured.out
    assert "Example" in captured.out
    assert captured.out.count(f"phasewise {name}") >= 2
    assert captured.err == ""


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["statsu"], "No such command 'statsu'. Did you mean 'status'?; see 'phasewise --help'"),
        (["bench", "--concurency", "3"], "no option '--concurency'; did you mean '--concurrency'?"),
        (["generate", "hi", "--max-token", "3"], "no option '--max-token'; did you mean '--max-tokens'?"),
        (["generate"], "Missing argument"),
        (["generate", "hi", "--max-tokens", "many"], "'--max-tokens'"),
        (["status", "--watch", "--interval", "0"], "'--interval'"),
        (["status", "extra"], "unexpected extra argument"),
        (["generate", "hi", "--grpc", "nowhere"], "--grpc must be HOST:PORT"),
        (["status", "--http", "http://[bad"], "--http must be HOST:PORT"),
        (["bench", "--http", "nowhere"], "--http must be HOST:PORT"),
        (["bench", "--http", "ftp://host:1/v1"], "--http must be HOST:PORT"),
        (["bench", "--slo", "ttft"], "--slo: 'ttft' must be"),
        (["bench", "--extra-body", "[1]"], "--extra-body must be a JSON object"),
        (["bench", "--extra-body", "{"], "--extra-body is not JSON"),
        (["bench", "--header", "no-colon"], "--header must be 'Name: value'"),
        (["bench", "--save-requests"], "give --output FILE too"),
        (["bench", "--plot", "/no/such/folder/x.png"], "its folder does not exist"),
    ],
)
def test_usage_errors_are_one_line_with_the_name(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments) == 2
    captured = capsys.readouterr()
    assert expected in captured.err
    assert captured.err.startswith("phasewise: ") and captured.err.count("\n") == 1
    assert captured.out == ""


@pytest.mark.parametrize(
    ("arguments", "address", "flag"),
    [
        (["status", "--http", "127.0.0.1:9"], "127.0.0.1:9", "--http"),
        (["bench", "--http", "127.0.0.1:9"], "127.0.0.1:9", "--http"),
        (["generate", "hi", "--grpc", "127.0.0.1:9"], "127.0.0.1:9", "--grpc"),
        (["chat", "--grpc", "127.0.0.1:9"], "127.0.0.1:9", "--grpc"),
    ],
)
def test_nobody_at_the_address(
    arguments: list[str], address: str, flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments) == 1
    assert capsys.readouterr().err == (
        f"phasewise: no Phasewise cluster at {address}; start one with 'phasewise serve' or name it with {flag} "
        "HOST:PORT\n"
    )


def test_errors_are_explained_in_one_line() -> None:
    assert explain(UsageProblem("a\nb")) == "a b"
    assert explain(CommandError("x")) == "x"
    assert explain(InvalidRequest("n must be\nat least 1", field="n")) == "n must be at least 1"
    assert explain(Overloaded("queues are full")) == "queues are full; it is safe to try again"
    assert explain(ConfigError("bad key")) == "bad key"
    missing = explain(ModuleNotFoundError("No module named 'rich'", name="rich.table"))
    assert missing.endswith("pip install 'phasewise[server]'")
    assert "'--debug" not in explain(ModuleNotFoundError("No module named 'rich'", name="rich"))
    assert explain(ValueError("boom")).startswith("internal error: ValueError: boom; run 'phasewise --debug")


def test_a_fault_of_ours_shows_its_traceback_only_on_request(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(address: str) -> None:
        raise RuntimeError("boom")

    monkeypatch.setattr("cli.watch.fetch_status", broken)
    assert run(["status"]) == 1
    assert "Traceback" not in capsys.readouterr().err
    assert run(["--debug", "status"]) == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["chat", "--help"], ["bench", "--help"], ["status", "--help"]]
)
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    program = (
        "import sys\nfrom cli.main import run\n"
        f"assert run({arguments!r}) == 0\n"
        "heavy = {'torch', 'ray', 'grpc', 'httpx', 'matplotlib', 'numpy', 'starlette', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=TOP, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_a_reader_that_leaves_is_no_error(tmp_path: Path) -> None:
    command = f"{sys.executable} -m cli.main bench --help | head -1; echo code ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=TOP, capture_output=True, text=True, timeout=60)
    assert "Usage: phasewise bench" in done.stdout
    assert done.stderr == ""
