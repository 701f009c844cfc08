"""Frames between the gateway and an engine process: 4 bytes of big-endian length, then MessagePack.

The engine connects to the gateway's Unix socket, says Hello, and then answers. Frames of one direction arrive in
order; a step's record travels in one frame with the tokens it produced, so that nobody sees an answer's end before
the time it took.
"""

from __future__ import annotations

import msgspec

from millicent.core.request import Limits, Sampling
from millicent.core.steps import Overhead, StepRecord
from millicent.engine.config import Dtype as Dtype  # noqa: PLC0414
from millicent.engine.config import EngineConfig as EngineConfig  # noqa: PLC0414 - the process is started with it
from millicent.engine.config import Quantization as Quantization  # noqa: PLC0414
from millicent.step_time import Coefficients as Coefficients  # noqa: PLC0414

MAX_FRAME_BYTES = 64 << 20


# Gateway to engine.
class Draft(msgspec.Struct, frozen=True):
    """A smaller model beside another, which guesses what that one will say. Fields as in Load."""

    model: str
    path: str
    dtype: Dtype
    calibrate: bool = False
    quantize: Quantization | None = None


class Load(msgspec.Struct, frozen=True, tag=True):
    """Bring a model into memory. Answered by Loaded or LoadFailed. Loading a loaded model answers Loaded at once.

    `calibrate` asks for a few forward passes of every kind too, since nobody knows yet what they cost.
    `quantize` None is the engine's own setting.
    """

    model: str
    path: str
    dtype: Dtype
    calibrate: bool = False
    quantize: Quantization | None = None
    draft: Draft | None = None


class Unload(msgspec.Struct, frozen=True, tag=True):
    """Give a model's memory back; its running sequences end with an error. Answered by Unloaded."""

    model: str


class Submit(msgspec.Struct, frozen=True, tag=True):
    """Run a sequence. `sequence` is the gateway's number for it, never reused. `limits.max_tokens` is always set.

    `tenant` is whom the engine is fair to, and whose prefixes are reused. Lower `priority` goes first; `deadline_ns`
    is monotonic. `grammar` says what may come, as `text.grammars` writes it; empty, anything.
    """

    sequence: int
    model: str
    tokens: tuple[int, ...]
    sampling: Sampling
    limits: Limits
    tenant: int = 0
    priority: int = 0
    deadline_ns: int | None = None
    grammar: str = ""


class Embed(msgspec.Struct, frozen=True, tag=True):
    """Turn one text into a vector. Answered by one Output, its end, with the vector; `sequence` as in Submit.

    `dimensions` keeps so many of the vector's numbers and makes them a unit vector; 0 keeps it as it is.
    """

    sequence: int
    model: str
    tokens: tuple[int, ...]
    dimensions: int = 0
    tenant: int = 0


class Cancel(msgspec.Struct, frozen=True, tag=True):
    """Stop a sequence within one step. Answered by its end, in an Output with finish `cancelled`, unless it ended."""

    sequence: int


class Costs(msgspec.Struct, frozen=True, tag=True):
    """What steps of a model take, as far as is known now. Not answered; unknown models are ignored."""

    model: str
    coefficients: Coefficients


class Shutdown(msgspec.Struct, frozen=True, tag=True):
    """Leave at once."""


# Engine to gateway.
class Hello(msgspec.Struct, frozen=True, tag=True):
    """First frame of a connection."""

    device: str
    pid: int
    memory_budget_bytes: int


class Loaded(msgspec.Struct, frozen=True, tag=True):
    """`context_tokens` is the longest sequence this model can run here. `dimensions` is how long its vectors are: 0 for
    a model that makes text."""

    model: str
    context_tokens: int
    weight_bytes: int
    kv_bytes: int
    overhead: Overhead
    dimensions: int = 0
    calibrations: tuple[Overhead, ...] = ()


class LoadFailed(msgspec.Struct, frozen=True, tag=True):
    """`message` is one line that says what to do. `code` is a word: model_unusable or out_of_memory."""

    model: str
    message: str
    code: str


class Unloaded(msgspec.Struct, frozen=True, tag=True):
    model: str
    overhead: Overhead


class ScoredToken(msgspec.Struct, frozen=True, array_like=True):
    """A token and its log probability, None for the first of a prompt; and the likeliest in its place, best first."""

    token: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()


class Output(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """News of one sequence. `tokens` counts output tokens produced now; `text` is what can be shown of them.

    `finish` is empty while it runs; then stop, length, cancelled or error, with `error` saying why. The end also
    carries the sequence's totals; an Embed's is its vector, little-endian float32. `scored` are the tokens produced
    now and `scored_prompt` those of the prompt, where they were asked for. `cached_tokens` of the prompt weren't
    computed; None before it began. `stop` is the stop string that ended it. `refused`: the error is the request's own.
    """

    sequence: int
    tokens: int
    text: str
    finish: str = ""
    error: str = ""
    total_output_tokens: int = 0
    cached_tokens: int | None = None
    scored: tuple[ScoredToken, ...] = ()
    scored_prompt: tuple[ScoredToken, ...] = ()
    vector: bytes = b""
    stop: str = ""
    refused: bool = False


class Step(msgspec.Struct, frozen=True, tag=True):
    """A forward pass and what came of it; `record` is None for ends that no forward pass belongs to."""

    record: StepRecord | None
    outputs: tuple[Output, ...]


ToEngine = Load | Unload | Submit | Embed | Cancel | Costs | Shutdown
FromEngine = Hello | Loaded | LoadFailed | Unloaded | Step

_encoder = msgspec.msgpack.Encoder()
to_engine_decoder = msgspec.msgpack.Decoder(ToEngine)
from_engine_decoder = msgspec.msgpack.Decoder(FromEngine)


def encode_frame(frame: ToEngine | FromEngine) -> bytes:
    body = _encoder.encode(frame)
    return len(body).to_bytes(4, "big") + body
