"""An embedding call to the local engine: many texts, each a sequence of its own, under one receipt."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence

from millicent.core.chunks import Chunk, End, FinishReason, Vector
from millicent.core.errors import InvalidRequest, MillicentError
from millicent.core.request import Embedding
from millicent.core.usage import Provenance, Usage
from millicent.engine.protocol import Embed, Output
from millicent.text import Tokenizer

# The engine holds this many rows of one call at once: enough to fill its next steps, few enough for others to come
# between, however many texts a call has.
_ROWS_AHEAD = 2048
_INLINE_CHARACTERS = 20_000


class EmbeddingRun:
    """Texts in the engine. Fed from the event loop, read by one reader."""

    def __init__(self, frames: Sequence[Embed], on_cancel: Callable[[EmbeddingRun], None]) -> None:
        self.model = frames[0].model
        self.sequences = tuple(frame.sequence for frame in frames)
        self.submitted_ns: int | None = None  # when the engine was given the first
        self._on_cancel = on_cancel
        self._ahead = deque(enumerate(frames))
        self._pending: dict[int, tuple[int, Embed]] = {}
        self._rows_pending = 0
        self._rows_done = 0
        self._made = 0
        self._reason = FinishReason.STOP
        self._error: MillicentError | None = None
        self._waiting: list[Vector] = []
        self._end: End | None = None
        self._news = asyncio.Event()

    async def __aiter__(self) -> AsyncIterator[Chunk]:
        while True:
            await self._news.wait()
            self._news.clear()
            vectors, self._waiting = self._waiting, []
            for vector in vectors:
                yield vector
            if self._end is not None and not self._waiting:
                yield self._end
                return

    def cancel(self) -> None:
        if self._end is None:
            self._ahead.clear()
            self._reason = FinishReason.CANCELLED
            self._on_cancel(self)

    @property
    def ended(self) -> bool:
        return self._end is not None

    @property
    def unfinished(self) -> tuple[int, ...]:
        """The sequences that the engine has and hasn't ended."""
        return tuple(self._pending)

    def next_frames(self) -> list[Embed]:
        """What the engine should be given now."""
        frames = []
        while self._ahead and self._rows_pending < _ROWS_AHEAD:
            index, frame = self._ahead.popleft()
            self._pending[frame.sequence] = (index, frame)
            self._rows_pending += len(frame.tokens)
            frames.append(frame)
        return frames

    def prefilled(self, sequence: int, rows: int) -> None:
        """A step has computed this many rows."""
        assert sequence in self._pending
        self._rows_done += rows

    def take(self, output: Output) -> None:
        """A text's end: its vector, or why there is none, which ends them all."""
        index, frame = self._pending.pop(output.sequence)
        self._rows_pending -= len(frame.tokens)
        if output.finish == FinishReason.STOP.value:
            self._made += 1
            self._waiting.append(Vector(index, output.vector, len(frame.tokens)))
            self._news.set()
        else:
            self._ahead.clear()
            self._reason = FinishReason(output.finish)
            self._error = MillicentError(output.error) if self._reason is FinishReason.ERROR else None
        if not self._pending and not self._ahead:
            # A cancellation that came too late changes nothing.
            self.end(FinishReason.STOP if self._made == len(self.sequences) else self._reason, self._error)

    def end(self, reason: FinishReason, error: MillicentError | None = None) -> None:
        """Nothing more comes. Usage is what was measured."""
        if self._end is None:
            self._end = End(reason, Usage.of(Provenance.MEASURED, input_fresh=self._rows_done), error)
            self._news.set()


class EmbeddingCall:
    """Checked and counted texts: `core.protocols.Call`."""

    def __init__(
        self, frames: Sequence[Embed], placement: str, begin: Callable[[Sequence[Embed]], EmbeddingRun]
    ) -> None:
        self.served_model = frames[0].model
        self.placement = placement
        self.sequences = tuple(frame.sequence for frame in frames)
        self.input_tokens: int | None = sum(len(frame.tokens) for frame in frames)
        self.max_output_tokens: int | None = 0
        self._frames = frames
        self._begin = begin
        self._started = False

    def start(self) -> EmbeddingRun:
        assert not self._started, "a call is started once; prepare another to run it again"
        self._started = True
        return self._begin(self._frames)


async def encode_inputs(wanted: Embedding, tokenizer: Tokenizer, context_tokens: int) -> list[tuple[int, ...]]:
    """The texts as tokens, none longer than the model reads. Raises InvalidRequest, naming the input."""
    characters = sum(len(text) for text in wanted.inputs)
    if characters > _INLINE_CHARACTERS:
        return await asyncio.to_thread(_encode_inputs, wanted, tokenizer, context_tokens)
    return _encode_inputs(wanted, tokenizer, context_tokens)


def _encode_inputs(wanted: Embedding, tokenizer: Tokenizer, context_tokens: int) -> list[tuple[int, ...]]:
    limit = wanted.truncate_tokens
    if limit is not None:
        limit = context_tokens if limit < 0 else min(limit, context_tokens)
    found = []
    for index, text in enumerate(wanted.inputs):
        tokens = tuple(tokenizer.encode(text, limit=limit)) if isinstance(text, str) else text[:limit]
        param = "input" if len(wanted.inputs) == 1 else f"input[{index}]"
        if len(tokens) > context_tokens:
            raise InvalidRequest(
                f"{param}: {len(tokens)} tokens are more than the {context_tokens} that this model reads; shorten it,"
                " or send truncate_prompt_tokens: -1 to have it cut off",
                param=param,
                code="context_length_exceeded",
            )
        if tokens and not 0 <= min(tokens) <= max(tokens) < tokenizer.vocabulary_size:
            raise InvalidRequest(
                f"{param}: this model's tokens are 0 to {tokenizer.vocabulary_size - 1}; send those", param=param
            )
        found.append(tokens)
    return found
