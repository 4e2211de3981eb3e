"""Runs the requests behind one HTTP answer: opens their streams, reads them, builds the answer, closes them.

The life of an answer:
1. made: whoever makes it calls `close` in the end, whatever happens.
2. `open` places every prompt. A stream belongs to the answer as soon as it is accepted, so that whoever is cancelled
   between "accepted" and "streaming" leaves none behind.
3. `whole` collects all deltas into one body, or `next_events` makes events of those that have come, again and again.
4. However it ends (done, refused, error, client gone, server stopping), every stream is closed: workers stop at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from control_plane.gateway.http_front.openai_responses import (
    ChatForm,
    Choice,
    CompletionForm,
    Envelope,
    EventWriter,
    dumps,
    timeline_fields,
    usage_fields,
)
from control_plane.gateway.request_ids import ClaimedId
from control_plane.gateway.service import GenerateInput, InferenceService, SampleDelta, TokenInfo
from control_plane.gateway.streams import StreamReader
from phasewise.core.errors import RequestCancelled
from phasewise.core.request import FinishReason


class Answer:
    """The open streams of one HTTP request; choice number = prompt number · n + sample number.

    Args:
        inputs: one request per prompt, all with the same number of samples.
        echo_text: the prompt of an input as text, where its choices begin with it; None: they do not.
    """

    def __init__(
        self,
        inputs: list[GenerateInput],
        form: ChatForm | CompletionForm,
        echo_text: Callable[[GenerateInput], str] | None,
    ) -> None:
        self._inputs = inputs
        self._num_samples = inputs[0].sampling.n or 1
        self._form = form
        self._echo_text = echo_text
        self._reader = StreamReader()
        self._choices: list[Choice] = []
        self._claimed: ClaimedId | None = None
        self._unechoed = set(range(len(inputs))) if echo_text is not None else set()
        self._is_closed = False

    async def open(self, service: InferenceService) -> None:
        """Starts every input. Raises what the service raises; what was started before belongs to the answer.

        Several prompts share their id, which is the answer's from before the first of them until all have ended.
        """
        inputs, request_id = self._inputs, self._inputs[0].request_id
        if len(inputs) > 1 and request_id is not None:
            self._claimed = service.claim_id(request_id)
            inputs = [replace(given, claimed=self._claimed) for given in inputs]
        for given in inputs:
            self._reader.add(await service.generate(given))
        self._choices = [Choice(index) for index in range(len(inputs) * self._num_samples)]

    async def whole(self, envelope: Envelope, *, with_timeline: bool, with_token_ids: bool) -> bytes:
        """The body of an answer in one piece. Raises what the streams raise."""
        form = self._form
        is_last = False
        while not is_last:
            new, is_last = await self._reader.take()
            for prompt_index, delta in new:
                for choice, text, tokens in self._begin_echo(prompt_index):
                    choice.text.append(text)
                    if tokens and (logprobs := form.logprobs(choice, tokens)) is not None:
                        choice.logprobs.append(logprobs)
                choice = self._choice(prompt_index, delta)
                choice.take(delta)
                if delta.tokens and (logprobs := form.logprobs(choice, delta.tokens)) is not None:
                    choice.logprobs.append(logprobs)
        self.close()  # before the answer: a client that has read it may use the id again
        body = envelope.fields()
        body["choices"] = [
            form.choice(choice) | ({"token_ids": choice.token_ids} if with_token_ids else {})
            for choice in self._choices
        ]
        body["usage"] = self._usage()
        if with_timeline:
            body["timeline"] = self._timeline()
        return dumps(body).encode()

    async def next_events(self, writer: EventWriter) -> bytes:
        """Waits for something new and returns its events; the last ones end with [DONE].

        Nothing follows those, nor a `close`. Raises what the streams raise.
        """
        while not self._is_closed:
            new, is_last = await self._reader.take()
            events = []
            for prompt_index, delta in new:
                if prompt_index in self._unechoed:
                    events += [writer.echo(*echo) for echo in self._begin_echo(prompt_index)]
                events.append(writer.delta(self._choice(prompt_index, delta), delta))
            if is_last:
                self.close()  # before [DONE]: a client that has read it may use the id again
                usage = self._usage() if writer.wants_usage else None
                events.append(writer.end(usage, self._timeline() if writer.wants_timeline else None))
            if joined := b"".join(events):  # what has come may be no news to the client
                return joined
        return b""

    def close(self) -> None:
        """Cancels what still runs, and releases the id. Harmless when repeated."""
        self._is_closed = True
        self._reader.close()
        if self._claimed is not None:
            self._claimed.release()

    def _choice(self, prompt_index: int, delta: SampleDelta) -> Choice:
        if delta.finish_reason is FinishReason.ABORT:
            raise RequestCancelled("the request was cancelled before it was finished")
        return self._choices[prompt_index * self._num_samples + delta.sample_index]

    def _begin_echo(self, prompt_index: int) -> list[tuple[Choice, str, tuple[TokenInfo, ...]]]:
        """With the first delta of a prompt, its choices with the prompt's text and log-probabilities."""
        if prompt_index not in self._unechoed or self._echo_text is None:
            return []
        self._unechoed.discard(prompt_index)
        first, text = prompt_index * self._num_samples, self._echo_text(self._inputs[prompt_index])
        tokens = self._reader.streams[prompt_index].prompt_tokens
        return [(choice, text, tokens) for choice in self._choices[first : first + self._num_samples]]

    def _usage(self) -> dict[str, Any]:
        return usage_fields([stream.usage for stream in self._reader.streams])

    def _timeline(self) -> Any:
        """One object, or with several prompts a list of them."""
        timelines = [timeline_fields(stream) for stream in self._reader.streams]
        return timelines[0] if len(timelines) == 1 else timelines
