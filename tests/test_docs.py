"""The documentation against the code: links, examples, keys, flags, parameters, errors, metrics, states."""

from __future__ import annotations

import importlib
import inspect
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
import typer.main
import yaml
from prometheus_client.parser import text_string_to_metric_families
from pydantic import BaseModel

from cli.command_tree import COMMANDS
from control_plane.gateway.http_front.openai_errors import error_body, status_of
from control_plane.gateway.http_front.openai_schema import ChatBody, CompletionBody
from control_plane.metrics import GatewayMetrics
from kv_transfer.state import RECEIVE_TRANSITIONS, SEND_TRANSITIONS
from phasewise.core.config import ServingConfig, build_config
from phasewise.core.errors import ERROR_BY_CODE
from phasewise.core.kv_spec import KVCacheSpec
from phasewise.core.lifecycle import TRANSITIONS, Stage
from phasewise.core.messages import WorkerInfo, WorkerLoad
from phasewise.core.metrics import WORKER_COUNTERS
from phasewise.core.placement import WorkerRole, WorkerState
from phasewise.core.profile import DeviceProfile
from phasewise.options import Options
from phasewise.rpc.status import STATUS_BY_ERROR
from workers.memory import CPU_KV_CACHE_GIB, blocks_of_size

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    """The code blocks of a page that are marked as `language`."""
    return [body for kind, body in FENCE.findall(text) if kind == language]


def section(text: str, heading: str) -> str:
    """A page's part under a heading, up to the next heading of any level."""
    return re.split(r"^#+ ", text.split(f"# {heading}\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]


def rows(text: str) -> dict[str, list[str]]:
    """The rows of the tables in `text` by the code in their first cell; further cells as they are."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if line.startswith("| `") and cells[0].strip().endswith("`"):
            found[cells[0].strip().strip("`")] = cells[1:]
    return found


def codes(text: str) -> set[str]:
    """What is written as code in a cell or a page; code blocks are not."""
    return set(re.findall(r"`([^`\n]+)`", FENCE.sub("", text)))


def anchors(text: str) -> set[str]:
    """The anchors that a page's headings have on GitHub."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_relative_link_leads_somewhere(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        assert file.exists(), f"{path.name}: {target}"
        if anchor:
            assert anchor in anchors(file.read_text(encoding="utf-8")), f"{path.name}: {target}"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_python_blocks_compile(path: Path) -> None:
    for number, code in enumerate(blocks(path.read_text(encoding="utf-8"), "python")):
        compile(code, f"{path.name}, block {number}", "exec")


def test_the_readme_has_python_to_start_from() -> None:
    assert len(blocks(page("README.md"), "python")) >= 2


def test_commands_in_the_pages_exist_with_their_flags() -> None:
    num_checked = 0
    for path in PAGES:
        shell = "".join(blocks(path.read_text(encoding="utf-8"), "sh")).replace("\\\n", " ")
        for line in shell.splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] != ["phasewise"]:
                continue
            module, function, _ = COMMANDS[words[1]]
            known = option_names(vars(importlib.import_module(module))[function])
            for word in words[2:]:
                assert not word.startswith("--") or word in known, f"{path.name}: {line}"
            num_checked += 1
    assert num_checked >= 10


def option_names(function: Any) -> set[str]:
    app = typer.Typer()
    app.command()(function)
    return {name for parameter in typer.main.get_command(app).params for name in parameter.opts}


# ---- configuration.md


def leaves(section: BaseModel, prefix: str = "") -> dict[str, Any]:
    """Every key of the configuration with its default."""
    found: dict[str, Any] = {}
    for name in type(section).model_fields:
        value = getattr(section, name)
        found |= leaves(value, f"{prefix}{name}.") if isinstance(value, BaseModel) else {f"{prefix}{name}": value}
    return found


def test_every_configuration_key_is_on_the_page_with_its_default() -> None:
    keys = rows(section(page("docs/configuration.md"), "Keys"))
    expected = leaves(ServingConfig())
    assert set(keys) == set(expected)
    for key, default in expected.items():
        shown = keys[key][0].strip("`")
        same = shown == default if isinstance(default, str) else yaml.safe_load(shown) == default
        assert same, f"{key}: the page says {shown}, the default is {default!r}"


def test_every_flag_of_serve_is_on_the_page() -> None:
    module, function, _ = COMMANDS["serve"]
    serve = vars(importlib.import_module(module))[function]
    flags = {f"--{name.replace('_', '-')}" for name in inspect.signature(serve).parameters if name != "model"}
    assert flags == set(rows(section(page("docs/configuration.md"), "Flags"))) - {"MODEL"}


def test_yaml_blocks_are_valid_configurations() -> None:
    found = blocks(page("docs/configuration.md"), "yaml")
    assert found
    for block in found:
        build_config(yaml.safe_load(block), source="docs/configuration.md")


def test_the_worked_example_of_memory_is_right() -> None:
    spec = KVCacheSpec(num_layers=30, num_kv_heads=3, head_dim=64, block_size=16, dtype="float32")
    num_blocks = blocks_of_size(CPU_KV_CACHE_GIB, spec, None)
    text = page("docs/configuration.md")
    for number in (spec.bytes_per_token, spec.bytes_per_block, num_blocks, num_blocks * spec.block_size):
        assert f"= {number:,} " in text, number


# ---- api.md


def test_every_parameter_of_the_api_is_on_the_page() -> None:
    named = codes(page("docs/api.md"))
    for body in (ChatBody, CompletionBody):
        assert set(body.model_fields) <= named, set(body.model_fields) - named
    assert set(Options.__annotations__) <= named, set(Options.__annotations__) - named


def test_every_error_is_on_the_page_as_it_is_answered() -> None:
    table = rows(section(page("docs/api.md"), "Errors"))
    assert set(table) == set(ERROR_BY_CODE)
    for code, error_class in ERROR_BY_CODE.items():
        status, kind, grpc_status, name, retry_safe, _ = table[code]
        error = error_class("x")
        assert grpc_status == STATUS_BY_ERROR[error_class].name, code
        assert name == f"`{error_class.__name__}`"
        assert retry_safe == ("yes" if error.retry_safe else "no"), code
        if status:  # the two that end a start never meet HTTP
            assert int(status) == status_of(error), code
            assert kind == f"`{error_body(error)['error']['type']}`", code


def test_every_stage_of_a_timeline_is_on_the_page() -> None:
    assert list(rows(section(page("docs/api.md"), "Timeline"))) == [stage.value for stage in Stage]


# ---- operations.md


def exported_metrics() -> set[str]:
    """Names of all metrics as a scrape has them, `_total` included."""
    spec = KVCacheSpec(1, 1, 64, 16, "float32")
    profile = DeviceProfile.linear(0.0, 0.0, 0.0, 0.0)
    info = WorkerInfo("prefill-0", WorkerRole.PREFILL, 1, "host", "cpu", "float32", 1, spec, 8, 128, profile)
    load = WorkerLoad(
        "prefill-0",
        WorkerRole.PREFILL,
        WorkerState.READY,
        num_kv_blocks=8,
        counters=dict.fromkeys(WORKER_COUNTERS, 1.0),
    )
    body, _ = GatewayMetrics("m").render([(info, load)])
    return {
        family.name + ("_total" if family.type == "counter" else "")
        for family in text_string_to_metric_families(body.decode())
    }


def test_exactly_the_exported_metrics_are_on_the_page() -> None:
    text = page("docs/operations.md")
    named = set(re.findall(r"`((?:phasewise_|vllm:)\w+)", text))
    exported = exported_metrics()
    assert len(exported) > 60
    assert exported - named == set(), "exported, but not on the page"
    assert named - exported == set(), "on the page, but not exported"


# ---- architecture.md


@pytest.mark.parametrize("transitions", [TRANSITIONS, SEND_TRANSITIONS, RECEIVE_TRANSITIONS])
def test_the_tables_of_states_are_those_of_the_code(transitions: dict[Any, frozenset[Any]]) -> None:
    # Three tables share some names of states: the one that begins with the first state is meant.
    text = page("docs/architecture.md")
    first = next(iter(transitions)).value
    table = rows(text[text.index(f"| `{first}` |") :].split("\n\n")[0])
    assert set(table) == {state.value for state in transitions}
    for state, targets in transitions.items():
        assert codes(table[state.value][1]) == {target.value for target in targets}, state
