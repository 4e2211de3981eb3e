"""What no step waits for holds up none."""

from __future__ import annotations

from typing import Any

import pytest

from engine.batch import ScheduledBatch
from phasewise.core.messages import KVCommit, KVDone, KVOffer
from tests.support.scripted_engine import expected_tokens
from tests.support.worker_box import WorkerBox
from tests.workers.test_request_life import PAIR, prompt_of


def watched(box: WorkerBox) -> list[str]:
    """What the workers do, in its order: messages to workers, tokens to gateways, steps."""
    seen: list[str] = []
    send, deliver = box.send, box.deliver

    def watch_send(worker_id: str, message: object) -> None:
        seen.append(type(message).__name__)
        send(worker_id, message)  # type: ignore[arg-type]

    def watch_deliver(gateway_id: str, output: object) -> None:
        seen.append("tokens" if output.chunks else "events")  # type: ignore[attr-defined]
        deliver(gateway_id, output)  # type: ignore[arg-type]

    box.send, box.deliver = watch_send, watch_deliver  # type: ignore[method-assign, assignment]
    for worker_id, runner in box.runners.items():
        submit = runner.submit

        def watch(batch: ScheduledBatch, *arguments: object, submit=submit, name=worker_id, **named: object):  # type: ignore[no-untyped-def]
            seen.append(f"step of {name}")
            return submit(batch, *arguments, **named)

        runner.submit = watch  # type: ignore[method-assign]
    return seen


def test_steps_go_before_what_they_need_not_wait_for() -> None:
    box = WorkerBox(PAIR)
    seen = watched(box)
    box.submit("r", prompt_of(60), "prefill-0", "decode-0", max_tokens=5)
    box.run()
    assert box.output("r") == expected_tokens(prompt_of(60), 5)
    assert seen.index("step of prefill-0") < seen.index(KVOffer.__name__)
    assert seen.index("step of decode-0") < seen.index(KVDone.__name__)
    box.assert_empty()


def test_an_offer_goes_out_inside_the_step_of_its_prompt() -> None:
    box = WorkerBox(PAIR, scheduler={"token_budget": 64}, transfer={"layers_per_part": 1})
    prefill, runner = box.workers["prefill-0"], box.runners["prefill-0"]
    submit, offered_inside = runner.submit, []

    def watch(batch: ScheduledBatch, *arguments: Any, **named: Any) -> Any:
        step = submit(batch, *arguments, **named)
        offered_inside.append(any(isinstance(m, KVOffer) for _, m in box.sent))
        return step

    runner.submit = watch  # type: ignore[method-assign]
    box.submit("r", prompt_of(60), "prefill-0", "decode-0", max_tokens=5)
    prefill.round()
    assert offered_inside == [True]
    box.run()
    assert box.output("r") == expected_tokens(prompt_of(60), 5)
    box.assert_empty()


@pytest.mark.parametrize("brings_commits", [True, False])
def test_a_commit_goes_one_way_and_before_the_first_token_where_it_is_slow(brings_commits: bool) -> None:
    # The offer is answered before the last chunk: a commit does not wait for it.
    box = WorkerBox(PAIR, scheduler={"token_budget": 64})
    link = box.links["prefill-0"]
    link.brings_commits = brings_commits
    seen = watched(box)
    box.submit("r", prompt_of(200), "prefill-0", "decode-0", max_tokens=5)
    box.run()
    assert box.output("r") == expected_tokens(prompt_of(200), 5)
    assert seen.count(KVCommit.__name__) == (not brings_commits)
    if not brings_commits:
        assert seen.index(KVCommit.__name__) < seen.index("tokens"), seen
    box.assert_empty()
