"""How an answer is drawn and where it ends: the fields that OpenAI's dialects have in common, and our extensions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import msgspec

from millicent.core.errors import InvalidRequest
from millicent.core.request import Extra, Limits, OutputFormat, Sampling
from millicent.wire import output_format
from millicent.wire.openai_common import TokenId

MAX_LOGPROBS = 20

Tokens = Annotated[int, msgspec.Meta(ge=1, le=10_000_000)]
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


# What other servers' clients send along, with the values that change nothing.
_NEUTRAL_ELSEWHERE: dict[str, tuple[Any, ...]] = {
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "include_stop_str_in_output": (False,),
    "use_beam_search": (False,),
    "length_penalty": (1, 1.0),
    "bad_words": ([],),
    "allowed_token_ids": (),
    "prompt_logprobs": (),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "truncation_side": ("left",),
    "echo": (False,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "add_special_tokens": (),
    "chat_template": (),
    "chat_template_kwargs": ({}, {"enable_thinking": True}, {"enable_thinking": False}),
    "cache_prompt": (True,),
    "stream_interval": (1,),
}


def known_elsewhere(extra: Mapping[str, Extra]) -> dict[str, Extra]:
    """Unknown fields, of which those that other servers know are harmless where they ask for what is done anyway."""
    found = {}
    for field, one in extra.items():
        if (neutral := _NEUTRAL_ELSEWHERE.get(field)) is not None:
            value = msgspec.json.decode(one.json)
            if value is None or any(type(value) is type(fine) and value == fine for fine in neutral):
                one = Extra(one.json, None)  # noqa: PLW2901
            else:
                allowed = " or ".join(msgspec.json.encode(fine).decode() for fine in neutral)
                advice = f"leave it out or send {allowed}." if allowed else "leave it out."
                refusal = f"`{field}` is not supported by this server: {advice}"
                one = Extra(one.json, refusal, "unsupported_parameter")  # noqa: PLW2901
        found[field] = one
    return found


_FORMS = (
    "response_format", "structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar",
    "json_schema", "grammar",
)  # fmt: skip


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
    # the same, named as vLLM (before and now) and llama.cpp's server name it
    structured_outputs: output_format.StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: output_format.Choice | None = None
    guided_grammar: str | None = None
    json_schema: dict[str, Any] | None = None
    grammar: str | None = None
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
        form = self._form()
        for field in ("min_tokens", "ignore_eos"):
            if form is not None and getattr(self, field):
                raise InvalidRequest(
                    f"`{field}` doesn't go with `response_format`, which says where the answer ends: leave it out.",
                    param=field,
                )
        return form

    def _form(self) -> OutputFormat | None:
        """What the answer must be, by whichever of the names. Raises InvalidRequest where two are given."""
        if all(getattr(self, field) is None for field in _FORMS):
            return None
        same = output_format.StructuredOutputs
        named = {
            "response_format": output_format.read(self.response_format),
            "structured_outputs": (self.structured_outputs or same()).read("structured_outputs"),
            "guided_json": same(json=self.guided_json).read("guided_json"),
            "guided_regex": same(regex=self.guided_regex).read("guided_regex"),
            "guided_choice": same(choice=self.guided_choice).read("guided_choice"),
            "guided_grammar": same(grammar=self.guided_grammar).read("guided_grammar"),
            "json_schema": same(json=self.json_schema).read("json_schema"),
            "grammar": same(grammar=self.grammar or None).read("grammar"),
        }
        given = [field for field, form in named.items() if form is not None]
        if len(given) > 1:
            raise InvalidRequest(
                f"`{given[0]}` and `{given[1]}` both say what the answer is: send one.", param=given[1]
            )
        return named[given[0]] if given else None

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
