"""OpenAI text completions: `POST /v1/completions`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import msgspec

from millicent.core.errors import InvalidRequest
from millicent.core.receipts import Receipt
from millicent.core.request import Request
from millicent.wire import openai_common as common
from millicent.wire.attribution import read_attribution, read_max_cost
from millicent.wire.decoding import decode_body, refuse_unless_neutral

DIALECT = "openai.completions"
_DEFAULT_MAX_TOKENS = 16  # as OpenAI's API description says

TokenId = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]


class CompletionBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    # honoured
    model: common.ModelName
    prompt: str | list[Any]
    stream: bool | None = None
    stream_options: common.StreamOptions | None = None
    temperature: common.Temperature | None = None
    top_p: common.TopP | None = None
    top_k: common.TopK | None = None
    seed: common.Seed | None = None
    stop: common.Stop | None = None
    max_tokens: common.Tokens | None = None
    ignore_eos: bool | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    # refused by name unless neutral
    n: Any = None
    best_of: Any = None
    echo: Any = None
    logprobs: Any = None
    suffix: Any = None
    frequency_penalty: Any = None
    presence_penalty: Any = None
    logit_bias: Any = None


_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "logprobs": (),
    "suffix": ("",),
    "frequency_penalty": (0, 0.0),
    "presence_penalty": (0, 0.0),
    "logit_bias": ({},),
}

_decoder = msgspec.json.Decoder(CompletionBody)
_KNOWN = frozenset(CompletionBody.__struct_fields__)


def decode(body: bytes, headers: Mapping[str, str], receipt_id: str) -> tuple[Request, common.StreamShape]:
    """Raises InvalidRequest, naming the field."""
    completion = decode_body(body, _decoder, _KNOWN)
    refuse_unless_neutral(completion, _NEUTRAL)
    stream = bool(completion.stream)
    request = Request(
        id=receipt_id,
        dialect=DIALECT,
        model=completion.model,
        prompt=_prompt(completion.prompt),
        sampling=common.sampling_of(completion.temperature, completion.top_p, completion.top_k, completion.seed),
        limits=common.limits_of(completion.max_tokens or _DEFAULT_MAX_TOKENS, completion.stop, completion.ignore_eos),
        stream=stream,
        attribution=read_attribution(headers, user=completion.user, metadata=completion.metadata),
        max_cost=read_max_cost(headers),
    )
    return request, common.StreamShape.of(stream=stream, options=completion.stream_options)


def _prompt(prompt: str | list[Any]) -> str | tuple[int, ...]:
    """Text or token ids; a list that holds just one of either is that one."""
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    if isinstance(prompt, str):
        return prompt
    try:
        tokens = msgspec.convert(prompt, tuple[TokenId, ...])
    except msgspec.ValidationError as error:
        raise InvalidRequest(
            f"Invalid `prompt`: send one text or one list of token ids ({error}).", param="prompt"
        ) from None
    if not tokens:
        raise InvalidRequest("`prompt` is empty: send text or token ids.", param="prompt")
    return tokens


def completion_id(receipt: Receipt) -> str:
    return "cmpl-" + receipt.id.removeprefix("rcpt_")


def answer_body(receipt: Receipt, text: str) -> dict[str, Any]:
    """A whole answer."""
    return _body(receipt) | {
        "choices": [_choice(text, common.finish_reason(receipt))],
        "usage": common.usage_body(receipt),
    }


class Stream:
    """The events of one streamed answer, in order: `start`, `text`..., `end`."""

    def __init__(self, shape: common.StreamShape) -> None:
        self._shape = shape

    def start(self, receipt: Receipt) -> bytes:  # noqa: ARG002 - this dialect has no opening event
        return b""

    def text(self, receipt: Receipt, text: str) -> bytes:
        return self._chunk(receipt, text, None)

    def end(self, receipt: Receipt) -> bytes:
        """Everything after the text: sent only once the receipt is durable."""
        events = self._chunk(receipt, "", common.finish_reason(receipt))
        if self._shape.usage:
            events += common.event(_body(receipt) | {"choices": [], "usage": common.usage_body(receipt)})
        return events + common.DONE

    def _chunk(self, receipt: Receipt, text: str, reason: str | None) -> bytes:
        body = _body(receipt) | {"choices": [_choice(text, reason)]}
        if self._shape.running_usage:
            body["usage"] = common.usage_body(receipt)
        elif self._shape.usage:
            body["usage"] = None
        return common.event(body)


def _choice(text: str, reason: str | None) -> dict[str, Any]:
    return {"text": text, "index": 0, "logprobs": None, "finish_reason": reason}


def _body(receipt: Receipt) -> dict[str, Any]:
    return {
        "id": completion_id(receipt),
        "object": "text_completion",
        "created": common.created_s(receipt),
        "model": receipt.model,
        "system_fingerprint": None,
    }
