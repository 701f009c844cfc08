"""One loaded encoder at work: as many waiting texts as a step's rows hold, in order of arrival, in one pass."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from millicent.core.chunks import FinishReason
from millicent.core.clock import Clock
from millicent.core.errors import InvalidRequest
from millicent.core.steps import SequenceWork, StepRecord
from millicent.engine.batch import Encoder
from millicent.engine.config import EngineConfig
from millicent.engine.protocol import Embed, Output, Step
from millicent.engine.runner import check_tokens

_log = logging.getLogger(__name__)


class EncoderRunner:
    """`deterministic` gives every text a pass of its own, so that its bits don't depend on what else waits."""

    kv_bytes = 0
    flying = False

    def __init__(self, encoder: Encoder, config: EngineConfig) -> None:
        self._encoder = encoder
        self._step_tokens = 0 if config.deterministic else config.step_tokens
        self._waiting: dict[int, Embed] = {}
        self.context_tokens = encoder.context_tokens
        self.dimensions = encoder.dimensions
        self.weight_bytes = encoder.weight_bytes

    @property
    def busy(self) -> bool:
        return bool(self._waiting)

    def submit(self, frame: Embed) -> Output | None:
        """Queue a text. An Output says why it cannot run; nobody else is concerned."""
        try:
            self._check(frame)
        except InvalidRequest as error:
            return _failed(frame.sequence, error.message)
        self._waiting[frame.sequence] = frame
        return None

    def _check(self, frame: Embed) -> None:
        count = len(frame.tokens)
        if not count:
            raise InvalidRequest("the text has no tokens; send at least one")
        if count > self.context_tokens:
            raise InvalidRequest(f"the text has {count} tokens, the model reads {self.context_tokens}; shorten it")
        check_tokens(frame.tokens, self._encoder.vocabulary_size)

    def cancel(self, sequence: int) -> Output | None:
        frame = self._waiting.pop(sequence, None)
        return None if frame is None else Output(sequence, 0, "", FinishReason.CANCELLED.value)

    def abandon(self, error: str) -> tuple[Output, ...]:
        """End everything that waits."""
        waiting, self._waiting = self._waiting, {}
        return tuple(_failed(sequence, error) for sequence in waiting)

    def step(self, device: str, index: int, clock: Clock, *, ahead: bool = False) -> Step:
        """One forward pass, and its texts' vectors. Call only while busy."""
        del ahead
        start_ns = clock.monotonic_ns()
        frames = self._next_pass()
        try:
            outputs = self._encode(frames)
        except Exception as error:  # noqa: BLE001 - a failed pass ends its own texts, never the process
            _log.exception("a forward pass of %s failed", self._encoder.name)
            detail = " ".join(str(error).split())[:200]
            reason = f"the model failed while computing this vector ({type(error).__name__}: {detail}); retry"
            outputs = tuple(_failed(frame.sequence, reason) for frame in frames)
        works = tuple(SequenceWork(frame.sequence, len(frame.tokens), 0, 0, len(frame.tokens)) for frame in frames)
        wall_ns = clock.monotonic_ns() - start_ns
        return Step(StepRecord(device, self._encoder.name, index, start_ns, wall_ns, works), outputs)

    def _next_pass(self) -> list[Embed]:
        """At least one, whatever its length."""
        frames: list[Embed] = []
        rows = 0
        for frame in self._waiting.values():
            rows += len(frame.tokens)
            if frames and rows > self._step_tokens:
                break
            frames.append(frame)
        for frame in frames:
            del self._waiting[frame.sequence]
        return frames

    def _encode(self, frames: list[Embed]) -> tuple[Output, ...]:
        vectors = self._encoder.encode([frame.tokens for frame in frames]).numpy()
        return tuple(_made(frame, vector) for frame, vector in zip(frames, vectors, strict=True))


def _made(frame: Embed, vector: np.ndarray[Any, np.dtype[np.float32]]) -> Output:
    if not np.isfinite(vector).all():
        return _failed(frame.sequence, "the model gave NaN or infinity; check its files, or try dtype fp32")
    if frame.dimensions:
        vector = vector[: frame.dimensions]
        vector /= max(float(np.linalg.norm(vector)), 1e-12)
    return Output(frame.sequence, 0, "", FinishReason.STOP.value, vector=vector.astype("<f4").tobytes())


def _failed(sequence: int, error: str) -> Output:
    return Output(sequence, 0, "", FinishReason.ERROR.value, error)
