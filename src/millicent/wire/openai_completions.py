"""OpenAI text completions: `POST /v1/completions`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import msgspec

from millicent.core.chunks import FinishReason, Text
from millicent.core.errors import InvalidRequest
from millicent.core.receipts import Receipt
from millicent.core.request import Request
from millicent.wire import openai_common as common
from millicent.wire import openai_generation as generation
from millicent.wire.attribution import read_attribution
from millicent.wire.decoding import decode_with_extra, refuse_unless_neutral
from millicent.wire.openai_logprobs import CompletionLogprobs

DIALECT = "openai.completions"
_DEFAULT_MAX_TOKENS = 16  # as OpenAI's API description says


class CompletionBody(generation.GenerationFields, frozen=True, forbid_unknown_fields=True, kw_only=True):
    # honoured
    model: common.ModelName
    prompt: str | list[Any]
    stream: bool | None = None
    stream_options: common.StreamOptions | None = None
    max_tokens: Annotated[int, msgspec.Meta(ge=0, le=10_000_000)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, msgspec.Meta(ge=0, le=generation.MAX_LOGPROBS)] | None = None
    best_of: generation.Choices | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    # refused by name unless neutral
    suffix: Any = None


_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "suffix": ("",),
}

_decoder = msgspec.json.Decoder(CompletionBody)
_KNOWN = frozenset(CompletionBody.__struct_fields__)


def decode(body: bytes, headers: Mapping[str, str], receipt_id: str) -> tuple[Request, common.StreamShape]:
    """Raises InvalidRequest, naming the field."""
    completion, extra = decode_with_extra(body, _decoder, _KNOWN)
    refuse_unless_neutral(completion, _NEUTRAL)
    if completion.best_of is not None and completion.best_of != (completion.n or 1):
        raise InvalidRequest(
            "`best_of` is not supported by this server: leave it out or send the same as `n`.",
            param="best_of",
            code="unsupported_parameter",
        )
    if completion.max_tokens == 0 and not completion.echo:
        raise InvalidRequest("`max_tokens` 0 goes only with `echo: true`: ask for at least 1.", param="max_tokens")
    stream = bool(completion.stream)
    first, *further = common.read_inputs(completion.prompt, "prompt")
    request = Request(
        id=receipt_id,
        dialect=DIALECT,
        model=completion.model,
        prompt=first,
        further_prompts=tuple(further),
        sampling=completion.sampling(
            completion.logprobs, prompt_logprobs=bool(completion.echo) and completion.logprobs is not None
        ),
        limits=completion.limits(_DEFAULT_MAX_TOKENS if completion.max_tokens is None else completion.max_tokens),
        output_format=completion.output_format(),
        stream=stream,
        choices=completion.n or 1,
        echo=bool(completion.echo),
        truncate_prompt_tokens=completion.truncate_prompt_tokens,
        priority=completion.priority or 0,
        attribution=read_attribution(headers, user=completion.user, metadata=completion.metadata),
        extra=generation.known_elsewhere(extra),
        restated=completion.restated(),
    )
    if request.answers > common.MAX_INPUTS:
        raise InvalidRequest(
            f"`n` is {request.choices} for each of {1 + len(further)} prompts: ask for at most {common.MAX_INPUTS}"
            " answers at once.",
            param="n",
        )
    return request, common.StreamShape.of(stream=stream, options=completion.stream_options)


def completion_id(receipt: Receipt) -> str:
    return "cmpl-" + receipt.id.removeprefix("rcpt_")


def answer_body(receipt: Receipt, texts: Sequence[Text], reasons: Sequence[FinishReason]) -> dict[str, Any]:
    """A whole answer: the text of each choice, in order, and why it ended."""
    return _body(receipt) | {
        "choices": [
            _choice(index, text.text, CompletionLogprobs().body(text.logprobs), common.finish_reason(reason))
            for index, (text, reason) in enumerate(zip(texts, reasons, strict=True))
        ],
        "usage": common.usage_body(receipt),
    }


class Stream:
    """The events of one streamed answer, in order: `start`, `text`..., `end`."""

    def __init__(self, shape: common.StreamShape) -> None:
        self._shape = shape
        self.wants_usage = shape.running_usage
        self._logprobs: defaultdict[int, CompletionLogprobs] = defaultdict(CompletionLogprobs)

    def start(self, receipt: Receipt) -> bytes:  # noqa: ARG002 - this dialect has no opening event
        return b""

    def text(self, receipt: Receipt, text: Text) -> bytes:
        logprobs = self._logprobs[text.choice].body(text.logprobs)
        return self._chunk(receipt, _choice(text.choice, text.text, logprobs, None))

    def end(self, receipt: Receipt, reasons: Sequence[FinishReason]) -> bytes:
        """Everything after the text: sent only once the receipt is durable."""
        events = b"".join(
            self._chunk(receipt, _choice(index, "", None, common.finish_reason(reason)))
            for index, reason in enumerate(reasons)
        )
        if self._shape.usage:
            events += common.event(_body(receipt) | {"choices": [], "usage": common.usage_body(receipt)})
        return events + common.DONE

    def _chunk(self, receipt: Receipt, choice: dict[str, Any]) -> bytes:
        body = _body(receipt) | {"choices": [choice]}
        if self._shape.running_usage:
            body["usage"] = common.usage_body(receipt)
        elif self._shape.usage:
            body["usage"] = None
        return common.event(body)


def _choice(index: int, text: str, logprobs: dict[str, Any] | None, reason: str | None) -> dict[str, Any]:
    return {"text": text, "index": index, "logprobs": logprobs, "finish_reason": reason}


def _body(receipt: Receipt) -> dict[str, Any]:
    return {
        "id": completion_id(receipt),
        "object": "text_completion",
        "created": common.created_s(receipt),
        "model": receipt.model,
        "system_fingerprint": None,
    }
