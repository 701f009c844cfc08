"""What Ollama's dialect has in common: names of models, options, durations, errors, lines of JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import msgspec

from millicent.core.chunks import FinishReason
from millicent.core.clock import iso_utc
from millicent.core.errors import InvalidRequest, MillicentError
from millicent.core.receipts import Receipt
from millicent.core.request import Limits, OutputFormat, Sampling, Thinking
from millicent.wire import openai_common, output_format
from millicent.wire import openai_generation as generation
from millicent.wire.decoding import refuse_unless_neutral
from millicent.wire.family import Family
from millicent.wire.field_names import FieldNames
from millicent.wire.receipts import encode

_LATEST = ":latest"

_Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
_Penalty = Annotated[float, msgspec.Meta(ge=-2, le=2)]


class Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A null is as good as a field left out. What is left out is as Ollama documents it, except that nothing penalises
    repetition."""

    # honoured
    num_predict: Annotated[int, msgspec.Meta(ge=-2, le=10_000_000)] | None = None
    temperature: Annotated[float, msgspec.Meta(ge=0, le=2)] | None = None
    top_k: Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)] | None = None
    top_p: _Share | None = None
    min_p: _Share | None = None
    typical_p: Annotated[float, msgspec.Meta(gt=0, le=1)] | None = None
    seed: Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: Annotated[list[generation.StopString], msgspec.Meta(max_length=16)] | generation.StopString | None = None
    repeat_penalty: Annotated[float, msgspec.Meta(gt=0, le=10)] | None = None
    presence_penalty: _Penalty | None = None
    frequency_penalty: _Penalty | None = None
    # harmless hints: how a model is loaded is the operator's to say, in [engine]
    num_ctx: int | None = None
    num_batch: int | None = None
    num_gpu: int | None = None
    main_gpu: int | None = None
    num_thread: int | None = None
    num_keep: int | None = None
    numa: bool | None = None
    low_vram: bool | None = None
    f16_kv: bool | None = None
    use_mmap: bool | None = None
    use_mlock: bool | None = None
    # refused by name unless neutral
    repeat_last_n: Any = None
    tfs_z: Any = None
    mirostat: Any = None
    mirostat_tau: Any = None
    mirostat_eta: Any = None
    penalize_newline: Any = None
    logits_all: Any = None
    vocab_only: Any = None
    embedding_only: Any = None

    def checked(self) -> Options:
        """Raises InvalidRequest naming the option that can't be honoured."""
        refuse_unless_neutral(self, _NEUTRAL, "options")
        return self

    def sampling(self, logprobs: int | None = None) -> Sampling:
        return Sampling(
            temperature=0.8 if self.temperature is None else self.temperature,
            top_p=0.9 if self.top_p is None else self.top_p,
            top_k=40 if self.top_k is None else self.top_k,
            seed=self.seed,
            min_p=self.min_p or 0.0,
            typical_p=self.typical_p or 1.0,
            repetition_penalty=self.repeat_penalty or 1.0,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logprobs=logprobs,
        )

    def limits(self) -> Limits:
        """-1 and -2 go on to the end of the context."""
        most = None if self.num_predict is None or self.num_predict < 0 else self.num_predict
        return Limits(most, (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()))


# Penalties are for all that came before, as with `repeat_last_n` -1.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "repeat_last_n": (-1,),
    "tfs_z": (1, 1.0),
    "mirostat": (0,),
    "mirostat_tau": (),
    "mirostat_eta": (),
    "penalize_newline": (True,),
    "logits_all": (False,),
    "vocab_only": (False,),
    "embedding_only": (False,),
}


def read_format(form: str | dict[str, Any] | None) -> OutputFormat | None:
    if isinstance(form, dict):
        return OutputFormat("json_schema", output_format.schema_text(form, "format"))
    if form == "json":
        return OutputFormat("json_object")
    if form:
        raise InvalidRequest(f'`format` is `{form[:40]}`: send "json" or a JSON schema.', param="format")
    return None


def read_think(think: bool | str | None) -> Thinking | None:
    """True leaves it to the model how much."""
    match think:
        case None:
            return None
        case bool():
            return Thinking() if think else Thinking("none")
        case "low" | "medium" | "high":
            return Thinking(think)
        case _:
            raise InvalidRequest(
                f'`think` is `{think[:40]}`: send true, false, "low", "medium" or "high".', param="think"
            )


def served_name(name: str, models: Sequence[str]) -> str:
    """The model that Ollama's clients mean: `latest` goes without saying, and so does the only tag there is."""
    if name in models:
        return name
    plain = name.removesuffix(_LATEST)
    if plain in models or ":" in plain:
        return plain
    if f"{plain}{_LATEST}" in models:
        return f"{plain}{_LATEST}"
    tagged = [model for model in models if model.partition(":")[0] == plain]
    return tagged[0] if len(tagged) == 1 else plain


# Ends of lines to Unicode, at which Python's clients cut what they read.
_LINE_ENDS = ((b"\xc2\x85", b"\\u0085"), (b"\xe2\x80\xa8", b"\\u2028"), (b"\xe2\x80\xa9", b"\\u2029"))


def line(body: Mapping[str, Any]) -> bytes:
    """One line, however its reader tells lines apart."""
    encoded = encode(body)
    for end, escaped in _LINE_ENDS:
        encoded = encoded.replace(end, escaped)
    return encoded + b"\n"


def head(receipt: Receipt) -> dict[str, Any]:
    return {"model": receipt.model, "created_at": iso_utc(receipt.created_at_ns)}


def done(receipt: Receipt, reason: FinishReason) -> dict[str, Any]:
    """The end of an answer: counts, nanoseconds, and the cost. Unknown is null, never 0."""
    timing = receipt.timing
    waited_ns, first_ns, total_ns = timing.queue_ns, timing.ttft_ns, timing.total_ns
    return {
        "done": True,
        "done_reason": "length" if reason is FinishReason.LENGTH else "stop",
        "total_duration": total_ns,
        "load_duration": waited_ns,
        "prompt_eval_count": receipt.usage.input_tokens,
        "prompt_eval_duration": None if first_ns is None else first_ns - (waited_ns or 0),
        "eval_count": receipt.usage.output_tokens,
        "eval_duration": None if first_ns is None or total_ns is None else total_ns - first_ns,
        "receipt": receipt.id,
        "cost": None if receipt.total is None else receipt.total.usd.normalize(),
        "cost_details": openai_common.cost_details(receipt),
    }


_OPTIONS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "typical_p",
    "seed",
    "stop",
    "presence_penalty",
    "frequency_penalty",
)
_NAMES = FieldNames(
    {
        "response_format": "format",
        "repetition_penalty": "options.repeat_penalty",
        "truncate_prompt_tokens": "truncate",
        **{field: f"options.{field}" for field in _OPTIONS},
    }
)


def error_body(error: MillicentError, _: str | None = None) -> dict[str, Any]:
    message, param = _NAMES.told(error)
    return {"error": message, "code": error.code, "param": param}


FAMILY = Family(
    error_body=error_body,
    error_event=lambda error, _: line(error_body(error)),
    rate_headers=openai_common.rate_headers,
    heartbeat=b" ",  # before the next line's JSON, where it means nothing
    stream_type=b"application/x-ndjson",
)
