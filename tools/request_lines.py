"""Counts the code that one streamed chat request enters, on its whole way through a cluster.

    python -m tools.request_lines                       this tree
    python -m tools.request_lines --tree ../before      another checkout, counted in the same way
    python -m tools.request_lines --functions           function by function
    python -m tools.request_lines --json lines.json     the table as JSON, besides

A cluster of real servers, gateway, cluster scheduler, one prefill and one decode worker runs in one process
(tests/support/front_doors.py) with a tiny model. It has served requests of the same kind before; then one chat is
streamed over HTTP while a profile function (`sys.setprofile`, in all threads) notes every function of ours that is
entered. What these functions hold in lines of code is summed by file: docstrings, comments and blank lines do not
count, and a function counts as a whole, because its reader reads the whole. A line that two functions share (a nested
one and its outer one) counts once.

Two sums: *placement to tokens* is the way from the gateway's placement over prefill, handoff and decode back to the
gateway's record; *all of it* adds HTTP, text and the engine. Files that the list `_BESIDE` does not name belong to the
first, so a new file counts there.

Which functions run depends a little on when messages meet steps. Several requests are counted, each by itself, and the
one with the median sum is shown, with the least and the largest beside it.
"""

from __future__ import annotations

import argparse
import ast
import http.client
import json
import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from tools.code_lines import PACKAGES, code_lines, functions, span

OWN_TREE = Path(__file__).resolve().parents[1]
NUM_WARM_UP = 3
NUM_COUNTED = 7
NUM_TOKENS = 8

_BESIDE = (
    "cli/",
    "engine/",
    "phasewise/rpc/",
    "control_plane/metrics.py",
    # What a gateway does before it places and after it has recorded: protocols, text, checks.
    "control_plane/gateway/grpc_",
    "control_plane/gateway/http_",
    "control_plane/gateway/text",
    "control_plane/gateway/openai_",
    "control_plane/gateway/bodies.py",
    "control_plane/gateway/bounded_encoding.py",
    "control_plane/gateway/chat_template.py",
    "control_plane/gateway/detokenizer.py",
    "control_plane/gateway/gguf_",
    "control_plane/gateway/large_bodies.py",
    "control_plane/gateway/line_sums.py",
    "control_plane/gateway/message_",
    "control_plane/gateway/model_defaults.py",
    "control_plane/gateway/preparation.py",
    "control_plane/gateway/quota.py",
    "control_plane/gateway/request_ids.py",
    "control_plane/gateway/starting.py",
    "control_plane/gateway/summed_log.py",
    "control_plane/gateway/token",
    "control_plane/gateway/vocabulary.py",
)
"""Beginnings of the paths that are not on the way from placement to tokens."""


@dataclass(frozen=True, slots=True)
class FileCount:
    """What a request entered of one file. `is_on_way`: between placement and tokens.

    `functions` has the lines of each by its name and first line; those of nested ones are in the outer one's, too.
    """

    path: str
    functions: dict[str, int]
    num_lines: int
    is_on_way: bool

    @property
    def num_functions(self) -> int:
        return len(self.functions)


class Recorder:
    """A profile function that notes what is entered of `tree` while `is_on`: files, and first lines of functions.

    Code objects would not do: those of two files can be equal.
    """

    def __init__(self, tree: Path) -> None:
        self._folders = tuple(f"{tree / package}{os.sep}" for package in PACKAGES)
        self.is_on = False
        self.entered: set[tuple[str, int]] = set()

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        if self.is_on and event == "call" and frame.f_code.co_filename.startswith(self._folders):
            self.entered.add((frame.f_code.co_filename, frame.f_code.co_firstlineno))

    @contextmanager
    def on(self) -> Iterator[None]:
        self.entered = set()
        self.is_on = True
        try:
            yield
        finally:
            self.is_on = False


def count_files(tree: Path, entered: set[tuple[str, int]]) -> list[FileCount]:
    """Lines and functions by file, of what a Recorder has noted.

    Lambdas and comprehensions belong to the function around them.
    """
    by_file: dict[str, set[int]] = {}
    for file, first_line in entered:
        by_file.setdefault(file, set()).add(first_line)
    counts = []
    for file, first_lines in sorted(by_file.items()):
        text = Path(file).read_text(encoding="utf-8")
        names = {span(node): node.name for node in functions(ast.parse(text))}
        found = {min((s for s in names if line in s), key=len, default=None) for line in first_lines}
        run = [s for s in names if s in found]  # what is in none is code of modules and classes
        code = code_lines(text)
        lines = code & {line for s in run for line in s}
        path = Path(file).relative_to(tree).as_posix()
        if lines:
            by_function = {f"{names[s]}:{s.start}": len(code.intersection(s)) for s in run}
            counts.append(FileCount(path, by_function, len(lines), not path.startswith(_BESIDE)))
    return counts


def chat(port: int) -> None:
    """Streams one chat to its end."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    messages = [{"role": "user", "content": "What does one request run through, from its placement to its tokens?"}]
    body = {"messages": messages, "max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True, "stream": True}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    assert response.status == 200 and text.rstrip().endswith("data: [DONE]"), text


def count_requests(tree: Path, has_direct_links: bool) -> list[list[FileCount]]:
    """Each of some equal requests to one warm cluster of `tree`.

    Nothing of our packages may be imported before: what is imported here comes from `tree`.
    """
    sys.path.insert(0, str(tree))
    recorder = Recorder(tree)
    threading.setprofile(recorder)  # before the threads that serve begin
    sys.setprofile(recorder)
    from tests.support.front_doors import front_doors
    from tests.support.tiny_model import save_tiny_model

    counts = []
    with tempfile.TemporaryDirectory() as folder:
        save_tiny_model(Path(folder))
        with front_doors(Path(folder), has_direct_links=has_direct_links) as doors:
            for number in range(NUM_WARM_UP + NUM_COUNTED):
                with recorder.on():
                    chat(doors.http_port)
                    doors.wait_until_empty()
                if number >= NUM_WARM_UP:
                    counts.append(count_files(tree, recorder.entered))
    return counts


def sums(counts: list[FileCount]) -> tuple[int, int]:
    """Lines from placement to tokens, and all."""
    return sum(c.num_lines for c in counts if c.is_on_way), sum(c.num_lines for c in counts)


def show(counts: list[FileCount], spread: dict[str, list[int]], *, has_functions: bool) -> None:
    for package in PACKAGES:
        own = [c for c in counts if c.path.split("/")[0] == package]
        if own:
            print(f"{package + '/':44} {sum(c.num_functions for c in own):5} {sum(c.num_lines for c in own):6}")
        for c in own:
            print(f"  {c.path:42} {c.num_functions:5} {c.num_lines:6}{'' if c.is_on_way else '  beside'}")
            for name, num_lines in c.functions.items() if has_functions else ():
                print(f"      {name:44} {num_lines:6}")
    on_way = [c for c in counts if c.is_on_way]
    for name, group in (("placement to tokens", on_way), ("all of it", counts)):
        lines = sum(c.num_lines for c in group)
        least, most = spread[name]
        print(
            f"{name}: {len(group)} files, {sum(c.num_functions for c in group)} functions, {lines} lines"
            f" ({least} to {most} in {NUM_COUNTED} requests)"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tree", type=Path, default=OWN_TREE, help="root of the checkout to count")
    parser.add_argument("--loopback", action="store_true", help="KV goes over the in-process link, not over TCP links")
    parser.add_argument("--functions", action="store_true", help="show each function, too")
    parser.add_argument("--json", type=Path, help="where to write the table as JSON")
    arguments = parser.parse_args()
    tree = arguments.tree.resolve()
    runs = sorted(count_requests(tree, not arguments.loopback), key=sums)
    counts = runs[len(runs) // 2]
    on_way, everything = zip(*map(sums, runs), strict=True)
    spread = {
        "placement to tokens": [min(on_way), max(on_way)],
        "all of it": [min(everything), max(everything)],
    }
    show(counts, spread, has_functions=arguments.functions)
    if arguments.json:
        result = {"spread": spread, "files": [asdict(c) for c in counts]}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
