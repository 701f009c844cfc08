"""A call to the local engine, before and while it runs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

from millicent.core.chunks import Chunk, End, FinishReason, Text
from millicent.core.errors import MillicentError
from millicent.core.request import Limits, Sampling
from millicent.core.usage import Provenance, Usage
from millicent.engine.protocol import Output, Submit


class LocalRun:
    """One sequence in the engine. Fed from the event loop, read by one reader.

    Text that waits for a slow reader is merged into one chunk, so at most the answer itself is held. Tokens that show
    no text yet are counted with the text that follows, or else only in the usage at the end.
    """

    def __init__(self, submit: Submit, on_cancel: Callable[[LocalRun], None]) -> None:
        self.submit = submit
        self.model = submit.model
        self.sequences = (submit.sequence,)
        self.submitted_ns: int | None = None  # when the engine was given it
        self._on_cancel = on_cancel
        self._waiting: list[str] = []
        self._waiting_tokens = 0
        self._output_tokens = 0
        self._prefilled_tokens = 0
        self._cached_tokens = 0
        self._unsent = [submit]
        self._end: End | None = None
        self._over = False
        self._news = asyncio.Event()

    async def __aiter__(self) -> AsyncIterator[Chunk]:
        while not self._over:
            await self._news.wait()
            self._news.clear()
            if self._waiting:
                text = Text("".join(self._waiting), self._waiting_tokens)
                self._waiting.clear()
                self._waiting_tokens = 0
                yield text
            if self._end is not None and not self._waiting:
                self._over = True
                yield self._end

    def cancel(self) -> None:
        if self._end is None:
            self._on_cancel(self)

    @property
    def ended(self) -> bool:
        return self._end is not None

    @property
    def unfinished(self) -> tuple[int, ...]:
        """The sequences that the engine has and hasn't ended."""
        return () if self.ended else self.sequences

    def next_frames(self) -> list[Submit]:
        """What the engine should be given now."""
        frames, self._unsent = self._unsent, []
        return frames

    def prefilled(self, sequence: int, rows: int) -> None:
        """A step has computed this many more rows of the prompt."""
        assert sequence == self.submit.sequence
        self._prefilled_tokens += rows

    def take(self, output: Output) -> None:
        self._output_tokens += output.tokens
        self._waiting_tokens += output.tokens
        self._cached_tokens = max(self._cached_tokens, output.cached_tokens)
        if output.text:
            self._waiting.append(output.text)
            self._news.set()
        if output.finish:
            error = MillicentError(output.error) if output.finish == FinishReason.ERROR.value else None
            self.end(FinishReason(output.finish), error)

    def end(self, reason: FinishReason, error: MillicentError | None = None) -> None:
        """Nothing more comes. Usage is what was measured: of a prompt cut off in prefill, the part computed."""
        if self._end is not None:
            return
        prompt = len(self.submit.tokens)
        cached = min(self._cached_tokens, prompt)
        usage = Usage.of(
            Provenance.MEASURED,
            input_fresh=min(self._prefilled_tokens, prompt - cached),
            input_cache_read=cached,
            output_text=self._output_tokens,
        )
        self._end = End(reason, usage, error)
        self._news.set()


class LocalCall:
    """A checked and counted request: `core.protocols.Call`."""

    def __init__(
        self,
        *,
        sequence: int,
        model: str,
        placement: str,
        tokens: tuple[int, ...],
        max_output_tokens: int,
        sampling: Sampling,
        limits: Limits,
        begin: Callable[[Submit], LocalRun],
    ) -> None:
        self.served_model = model
        self.placement = placement
        self.sequences: tuple[int, ...] = (sequence,)
        self.input_tokens: int | None = len(tokens)
        self.max_output_tokens: int | None = max_output_tokens
        limits = Limits(max_tokens=max_output_tokens, stop=limits.stop, ignore_eos=limits.ignore_eos)
        self._submit = Submit(sequence, model, tokens, sampling, limits)
        self._begin = begin
        self._started = False

    def start(self) -> LocalRun:
        assert not self._started, "a call is started once; prepare another to run it again"
        self._started = True
        return self._begin(self._submit)
