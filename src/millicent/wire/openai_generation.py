"""How an answer is drawn and where it ends: the fields that OpenAI's dialects have in common, and our extensions."""

from __future__ import annotations

from typing import Annotated

import msgspec

from millicent.core.errors import InvalidRequest
from millicent.core.request import Limits, OutputFormat, Sampling
from millicent.wire import output_format

MAX_LOGPROBS = 20

Tokens = Annotated[int, msgspec.Meta(ge=1, le=10_000_000)]
TokenId = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]
Choices = Annotated[int, msgspec.Meta(ge=1, le=128)]
StopString = Annotated[str, msgspec.Meta(min_length=1, max_length=1024)]
_Penalty = Annotated[float, msgspec.Meta(ge=-2, le=2)]
_Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
_Bias = Annotated[float, msgspec.Meta(ge=-100, le=100)]


# What these are where they are left out.
_RESTATED = (
    ("temperature", 1.0),
    ("top_p", 1.0),
    ("presence_penalty", 0.0),
    ("frequency_penalty", 0.0),
    ("top_k", 0),
    ("min_p", 0.0),
    ("typical_p", 1.0),
    ("repetition_penalty", 1.0),
)


class GenerationFields(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A null is as good as a field left out."""

    temperature: Annotated[float, msgspec.Meta(ge=0, le=2)] | None = None
    top_p: _Share | None = None
    seed: Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    n: Choices | None = None
    stop: StopString | Annotated[list[StopString], msgspec.Meta(max_length=16)] | None = None
    presence_penalty: _Penalty | None = None
    frequency_penalty: _Penalty | None = None
    logit_bias: Annotated[dict[TokenId, _Bias], msgspec.Meta(max_length=4096)] | None = None
    response_format: output_format.ResponseFormat | None = None
    # extensions, named as vLLM names them
    top_k: Annotated[int, msgspec.Meta(ge=-1)] | None = None
    min_p: _Share | None = None
    typical_p: Annotated[float, msgspec.Meta(gt=0, le=1)] | None = None
    repetition_penalty: Annotated[float, msgspec.Meta(gt=0, le=10)] | None = None
    min_tokens: Annotated[int, msgspec.Meta(ge=0, le=10_000_000)] | None = None
    stop_token_ids: Annotated[list[TokenId], msgspec.Meta(max_length=256)] | None = None
    ignore_eos: bool | None = None
    truncate_prompt_tokens: Annotated[int, msgspec.Meta(ge=-1, le=10_000_000)] | None = None
    priority: Annotated[int, msgspec.Meta(ge=-(2**31), le=2**31 - 1)] | None = None

    def sampling(self, logprobs: int | None, *, prompt_logprobs: bool = False) -> Sampling:
        return Sampling(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=max(self.top_k or 0, 0),
            seed=self.seed,
            min_p=self.min_p or 0.0,
            typical_p=self.typical_p or 1.0,
            repetition_penalty=self.repetition_penalty or 1.0,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logit_bias=self.logit_bias or {},
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
        )

    def restated(self) -> tuple[str, ...]:
        """Fields that were written out with the value that they have anyway."""
        return tuple(field for field, value in _RESTATED if getattr(self, field) == value)

    def output_format(self) -> OutputFormat | None:
        form = output_format.read(self.response_format)
        for field in ("min_tokens", "ignore_eos"):
            if form is not None and getattr(self, field):
                raise InvalidRequest(
                    f"`{field}` doesn't go with `response_format`, which says where the answer ends: leave it out.",
                    param=field,
                )
        return form

    def limits(self, max_tokens: int | None) -> Limits:
        min_tokens = self.min_tokens or 0
        if max_tokens is not None and min_tokens > max_tokens:
            raise InvalidRequest(
                f"`min_tokens` is {min_tokens}, more than the {max_tokens} there may be at most: lower it.",
                param="min_tokens",
            )
        if self.truncate_prompt_tokens == 0:
            raise InvalidRequest(
                "`truncate_prompt_tokens` is 0, which leaves no prompt: send at least 1, or -1 for as many as fit.",
                param="truncate_prompt_tokens",
            )
        return Limits(
            max_tokens=max_tokens,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            ignore_eos=bool(self.ignore_eos),
            min_tokens=min_tokens,
            stop_tokens=tuple(self.stop_token_ids or ()),
        )
