"""What another worker does not wait for does not hold up what others wait for."""

from __future__ import annotations

import pytest

from engine.batch import ScheduledBatch
from kv_transfer.loopback_link import LoopbackLink
from phasewise.core.messages import KVCommit, KVDone
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


@pytest.mark.parametrize("hurries", [True, False])
def test_tokens_and_steps_go_before_what_nobody_waits_for(hurries: bool) -> None:
    box = WorkerBox(PAIR, scheduler={"token_budget": 64})  # the offer is answered before the last chunk
    link = box.workers["prefill-0"]._parts.sender._link
    assert isinstance(link, LoopbackLink)
    link.hurries = hurries
    seen = watched(box)
    box.submit("r", prompt_of(200), "prefill-0", "decode-0", max_tokens=5)
    box.run()
    assert box.output("r") == expected_tokens(prompt_of(200), 5)
    # A commit that goes over no link is waited for: it goes before the first token.
    assert (seen.index("tokens") < seen.index(KVCommit.__name__)) == hurries, seen
    assert seen.index("step of decode-0") < seen.index(KVDone.__name__)
    box.assert_empty()
