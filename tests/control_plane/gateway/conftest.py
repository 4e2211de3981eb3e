"""Fixtures for text and HTTP: the built-in model's tokenizer, a deterministic service, a real HTTP server over it.

`service` is the only thing that the HTTP tests know of what is behind the server: another InferenceService can take its
place. The one here checks, tokenises and detokenises with the real parts; only its "model" is a hash.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import warnings
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Any

import pytest
from tokenizers import pre_tokenizers

from control_plane.gateway.open_requests import PreparedRequest
from control_plane.gateway.preparation import RequestLimits, RequestPreparer
from control_plane.gateway.request_ids import ClaimedId, RequestIds
from control_plane.gateway.service import GenerateInput, InferenceService, ModelCard, SampleDelta, TokenInfo, Usage
from control_plane.gateway.text.detokenizer import SampleText, token_info
from control_plane.gateway.text.tokenizer import TextTokenizer, load_tokenizer
from control_plane.link_survey import check_probes
from phasewise.core.errors import ServingError, Unavailable
from phasewise.core.lifecycle import Stage
from phasewise.core.messages import TimelineEvent
from phasewise.core.model_source import ModelSource, model_facts, resolve_model
from phasewise.core.placement import Placement
from phasewise.core.request import FinishReason, SampledToken
from tests.support.generated_stream import GeneratedStream
from tests.support.http_server import api_server

_WORDS = "the sky is blue, and €9 coffee ☕ tastes naïve 👩‍🚀 in 2024:\n  def f(x): return x + 1  日本語 end. Paris"


@pytest.fixture(scope="session")
def smollm2() -> ModelSource:
    return resolve_model("smollm2-135m")


@pytest.fixture(scope="session")
def smollm2_tokenizer(smollm2: ModelSource) -> TextTokenizer:
    return load_tokenizer(smollm2)


@pytest.fixture(scope="session")
def smollm2_oracle(smollm2: ModelSource) -> Any:
    """transformers' tokenizer for the same file, with the split of the model's own tokenizer.json.

    Its loader of GGUF files leaves `tokenizer.ggml.pre` aside and splits as GPT-2. The model was trained with digits
    split off one by one, so its own file is the oracle here. transformers' warnings are not our matter.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import AutoTokenizer

        oracle = AutoTokenizer.from_pretrained(str(smollm2.path.parent), gguf_file=smollm2.path.name)
    oracle.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return oracle


@pytest.fixture(scope="session")
def smollm2_card(smollm2: ModelSource) -> ModelCard:
    facts = model_facts(smollm2)
    return ModelCard(
        smollm2.name, facts.context_length, facts.vocab_size, "float32", 1_700_000_000, facts.eos_token_ids, True
    )


@pytest.fixture
def service(smollm2_card: ModelCard, smollm2_tokenizer: TextTokenizer) -> InferenceService:
    return HashService(smollm2_card, smollm2_tokenizer)


@pytest.fixture
def base_url(service: InferenceService) -> Iterator[str]:
    """The address of a real server over `service`, without a path."""
    with api_server(service) as address:
        yield f"http://{address}"


class HashService:
    """An InferenceService whose next token is a hash of what stands before it (and of the seed, above temperature 0).

    `fail_after` makes every stream raise that error after that many tokens.
    """

    step_s = 0.001  # a model takes time: without it a client could not leave before the end

    def __init__(self, card: ModelCard, tokenizer: TextTokenizer) -> None:
        self.model = card
        self.unready_reason = ""
        self.fail_after: tuple[int, Exception] | None = None
        self.refuse_with: ServingError | None = None
        self.tokenizer = tokenizer
        self.open: set[HashStream] = set()
        self._ids = RequestIds()
        self._preparer = RequestPreparer(tokenizer, card, RequestLimits())
        self.pool = tokenizer.encode(_WORDS)

    @property
    def is_ready(self) -> bool:
        return not self.unready_reason

    def claim_id(self, request_id: str) -> ClaimedId:
        return self._ids.claim(request_id)

    async def generate(self, request: GenerateInput) -> HashStream:
        if not self.is_ready:
            raise Unavailable(self.unready_reason, retry_after_s=2.5)
        if self.refuse_with is not None:
            raise self.refuse_with
        prepared = self._preparer.prepare(request)
        claimed = None if request.claimed is not None else self._ids.claim(prepared.request.request_id)
        stream = HashStream(self, prepared, claimed)
        self.open.add(stream)
        return stream

    async def tokenize(
        self, text: str | None, messages: tuple[Mapping[str, Any], ...] | None, model: str | None
    ) -> list[int]:
        return self._preparer.tokenize(text, messages, model)

    def detokenize(self, token_ids: tuple[int, ...], model: str | None) -> str:
        self._preparer.check_model(model)
        self._preparer.check_token_ids(token_ids, "token_ids")
        return self.tokenizer.decode(token_ids)

    async def status(self) -> dict[str, Any]:
        return {"workers": [], "gateway": {"open_requests": len(self.open)}}

    async def links(self) -> dict[str, Any]:
        return {"workers": [], "pairs": []}

    async def probe_links(self, sizes: Sequence[int], timeout_s: float) -> dict[str, Any]:
        check_probes(sizes, timeout_s)
        return {"workers": [], "pairs": [], "asked": [*sizes, timeout_s]}

    async def metrics_text(self) -> tuple[bytes, str]:
        body = f"# TYPE phasewise_open_requests gauge\nphasewise_open_requests {len(self.open)}\n"
        return body.encode(), "text/plain; version=0.0.4; charset=utf-8"


class HashStream(GeneratedStream):
    def __init__(self, service: HashService, prepared: PreparedRequest, claimed: ClaimedId | None) -> None:
        super().__init__()
        self._service = service
        self._claimed = claimed
        self._prepared = prepared
        self._request = prepared.request
        self._num_output = 0
        self.request_id = self._request.request_id
        self.prompt_token_ids = self._request.prompt_token_ids
        self.placement = Placement(self.request_id, "prefill-0", "decode-0")
        self.timeline = (
            TimelineEvent(self.request_id, Stage.HANDOFF_END, 2.0, "decode-0", num_bytes=4096, duration_s=0.5),
            TimelineEvent(self.request_id, Stage.RECEIVED, 1.0, "gateway-0"),
        )

    @property
    def usage(self) -> Usage:
        return Usage(len(self.prompt_token_ids), self._num_output, 0)

    @property
    def prompt_tokens(self) -> tuple[TokenInfo, ...]:
        count = self._request.sampling.prompt_logprobs
        if count is None:
            return ()
        first, *rest = self.prompt_token_ids
        tokens = [SampledToken(first), *(self._sampled(t, t, count) for t in rest)]
        return tuple(token_info(self._service.tokenizer, token) for token in tokens)

    async def _deltas(self) -> AsyncIterator[SampleDelta]:
        sampling, tokenizer = self._request.sampling, self._service.tokenizer
        texts = [
            SampleText(tokenizer, self._prepared.stop, continues_text=self._prepared.continues_text)
            for _ in range(sampling.n)
        ]
        for index in range(sampling.n if sampling.max_tokens == 0 else 0):
            yield SampleDelta(index, "", (), (), FinishReason.LENGTH)
        for position in range(sampling.max_tokens):
            for index, text in enumerate(texts):
                if text.is_done:
                    continue
                if self._service.fail_after is not None and position >= self._service.fail_after[0]:
                    raise self._service.fail_after[1]
                await asyncio.sleep(self._service.step_s)
                token = self._token(index, position)
                self._num_output += 1
                reason = FinishReason.LENGTH if position == sampling.max_tokens - 1 else None
                if token.token_id in sampling.stop_token_ids:
                    reason = FinishReason.STOP
                new, hit = text.push((token,), reason)
                tokens = (token_info(tokenizer, token),) if sampling.logprobs is not None else ()
                reason = FinishReason.STOP if hit is not None else reason
                yield SampleDelta(index, new, (token.token_id,), tokens, reason, hit)
        self._forget()

    def close(self) -> None:
        super().close()
        self._forget()

    def _forget(self) -> None:
        self._service.open.discard(self)
        if self._claimed is not None:
            self._claimed.release()

    def _token(self, index: int, position: int) -> SampledToken:
        sampling = self._request.sampling
        luck = (sampling.seed, index) if sampling.temperature > 0 else ()
        digest = hashlib.sha256(repr((self.prompt_token_ids, position, luck)).encode()).digest()
        number = int.from_bytes(digest[:4], "big")
        return self._sampled(self._service.pool[number % len(self._service.pool)], number, sampling.logprobs or 0)

    def _sampled(self, token_id: int, number: int, count: int) -> SampledToken:
        """A token with `count` alternatives of falling probability, itself the first."""
        logprob = math.log(0.5) - (number % 7) / 10
        pool = dict.fromkeys((token_id, *self._service.pool))
        top = tuple((t, logprob - rank) for rank, t in enumerate(pool) if rank < count)
        return SampledToken(token_id, logprob, top)
