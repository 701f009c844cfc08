"""One answer on its way: driven to its end by the pipeline, read by whoever asked for it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import msgspec

from millicent.caching.cache import Lookup
from millicent.core.chunks import End, FinishReason, Text, merge_texts
from millicent.core.errors import MillicentError
from millicent.core.money import ZERO
from millicent.core.protocols import Run
from millicent.core.receipts import Receipt
from millicent.core.usage import Provenance
from millicent.meter.estimated import Flight
from millicent.meter.waits import Beside
from millicent.routing.policies import Decision


class Progress:
    """When output came: times are UTC nanoseconds, `tokens` how many came so far, `vector_tokens`
    how many were read for the vectors that did."""

    __slots__ = ("first_token_at_ns", "last_token_at_ns", "tokens", "vector_tokens")

    def __init__(self) -> None:
        self.tokens = 0
        self.vector_tokens = 0
        self.first_token_at_ns: int | None = None
        self.last_token_at_ns: int | None = None

    def note(self, tokens: int, at_ns: int) -> None:
        if tokens == 0:
            return
        self.tokens += tokens
        self.last_token_at_ns = at_ns
        if self.first_token_at_ns is None:
            self.first_token_at_ns = at_ns


class KeptAnswer(msgspec.Struct, frozen=True):
    """An answer as the ledger keeps it, to be given again."""

    texts: tuple[Text, ...]
    reasons: tuple[FinishReason, ...]

    @classmethod
    def read(cls, kept: str) -> KeptAnswer:
        """One that a crash cut off is kept as nothing."""
        return msgspec.json.decode(kept, type=cls) if kept else cls((), (FinishReason.STOP,))


class Answer:
    """Text that waits for a slow reader is merged, so that memory holds one answer and no more.

    The answer is driven, and its receipt closed, whether or not anybody reads. With `keep`, its whole text is kept, for
    the ledger or to be judged. `beside` is how others' latency targets see it.
    """

    def __init__(self, opened: Receipt, beside: Beside, *, keep: bool = False) -> None:
        self.opened = opened
        self.beside = beside
        self.model = opened.model  # that is asked now
        self.closing: Receipt | None = None  # final, and on its way to the ledger
        self.progress = Progress()
        # Of each attempt, how its device time is known; None where no time is paid for.
        self.shown: list[Provenance | None] = []
        self.flight: Flight | None = None  # of the attempt that runs, where its device time is estimated
        self.reserved = ZERO  # for ended attempts whose cost nobody knows
        self.tokens_before = 0  # of attempts that have ended
        self.decision: Decision | None = None  # where a policy chose the model
        self.answered_by = opened.model  # or stands to be the one that did
        self.lookup: Lookup | None = None  # its way through the response cache, where that is on
        self.standing: Receipt | None = None  # as it would be if the attempt that is verified now were the last
        self._run: Run | None = None
        self._cancelled = False
        self._stopped = False
        self._begun = False
        self._ending = asyncio.Event()
        self._receipt: Receipt | None = None
        self._waiting: list[Text] = []
        self._held: list[Text] | None = None
        self._reasons: tuple[FinishReason, ...] = ()
        self._kept: list[Text] | None = [] if keep else None
        self._error: MillicentError | None = None
        self._news = asyncio.Event()

    @property
    def receipt_id(self) -> str:
        return self.opened.id

    def kept(self, end: End) -> str | None:
        """The whole answer, where it is kept: what `KeptAnswer.read` reads."""
        if self._kept is None:
            return None
        return msgspec.json.encode(KeptAnswer(self.texts(), _reasons(end))).decode()

    def texts(self) -> tuple[Text, ...]:
        """The whole answer in order, where it is kept."""
        return merge_texts(self._kept or (), in_order=True)

    def outputs(self) -> list[str]:
        """The whole text of each choice, where it is kept."""
        return [text.text for text in merge_texts(self._kept or ())] or [""]

    @property
    def settled(self) -> Receipt | None:
        """The closed receipt, once it is durable."""
        return self._receipt

    @property
    def reasons(self) -> tuple[FinishReason, ...]:
        """How each choice ended, once the receipt is durable."""
        return self._reasons

    def cancel(self) -> None:
        """Stop the work within one step; the answer then ends as cancelled. Safe at any time, and twice."""
        self._cancelled = True
        self._ending.set()
        if self._run is not None:
            self._run.cancel()

    def stop(self) -> None:
        """Stop the work as if the output's limit were reached: the caller's maximum cost is, or a budget's end."""
        self._stopped = True
        self._ending.set()
        if self._run is not None:
            self._run.cancel()

    @property
    def stopped_at_limit(self) -> bool:
        """It was `stop` that ended it, not whoever asked."""
        return self._stopped and not self._cancelled

    @property
    def cancelled(self) -> bool:
        return self._cancelled

    @property
    def ending(self) -> bool:
        """It was cancelled or stopped."""
        return self._ending.is_set()

    @property
    def begun(self) -> bool:
        """Some of it is out, or may be: it can't be begun anew."""
        return self._begun

    async def until_ending(self) -> None:
        """Until it is cancelled or stopped."""
        await self._ending.wait()

    async def pause(self, seconds: float) -> bool:
        """Wait so long; False, at once, when the answer is to end before that."""
        try:
            async with asyncio.timeout(seconds):
                await self._ending.wait()
        except TimeoutError:
            return True
        return False

    def attach(self, run: Run) -> None:
        """The work has begun; a cancellation that came before reaches it now."""
        self._run = run
        if self._cancelled or self._stopped:
            run.cancel()

    async def take(self) -> tuple[Text, ...] | None:
        """The next text, merged for each choice; None at the end, when the receipt is durable. Raises what went wrong,
        after the text before.

        Cancelling a wait loses nothing: call again.
        """
        while not self._waiting:
            if self._error is not None:
                raise self._error
            if self._receipt is not None:
                return None
            self._news.clear()
            await self._news.wait()
        texts = merge_texts(self._waiting, in_order=True)
        self._waiting.clear()
        return texts

    def hold_back(self) -> None:
        """Nothing of what comes from now on is shown; what was held back before is dropped."""
        self._held = []

    def held(self) -> tuple[Text, ...]:
        return merge_texts(self._held or ())

    def release(self, texts: Iterable[Text]) -> None:
        """Show these, and what comes from now on."""
        self._held = None
        for text in texts:
            self.push(text)

    def push(self, text: Text) -> None:
        if self._held is not None:
            self._held.append(text)
            return
        if text.text or text.logprobs or text.calls or text.reasoning or text.signature or text.sealed or text.stop:
            self._begun = True
            self._waiting.append(text)
            if self._kept is not None:
                self._kept.append(text)
            self._news.set()

    def finish(self, receipt: Receipt, end: End) -> None:
        """The receipt is durable: let the reader see the end."""
        self._receipt = receipt
        self._reasons = _reasons(end)
        self._error = end.error
        self._news.set()

    def fail(self, error: MillicentError) -> None:
        """The receipt could not be made durable: no answer ends as if it had been."""
        self._error = error
        self._news.set()


def _reasons(end: End) -> tuple[FinishReason, ...]:
    return end.choices or (end.reason,)
