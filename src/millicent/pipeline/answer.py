"""One answer on its way: driven to its end by the pipeline, read by whoever asked for it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import msgspec

from millicent.caching.cache import Lookup
from millicent.core.chunks import End, FinishReason, Text, Vector, merge_texts
from millicent.core.errors import MillicentError
from millicent.core.money import ZERO
from millicent.core.protocols import Run
from millicent.core.receipts import Receipt
from millicent.core.usage import Count, Leaf, Provenance, Usage
from millicent.meter.estimated import Flight
from millicent.meter.waits import Beside
from millicent.routing.policies import Decision


class Progress:
    """What came of one attempt, and when: times are monotonic nanoseconds, `tokens` how many came so far. `known` is
    how they are known; `input_tokens` of the call, guessed where nobody has counted them."""

    __slots__ = (
        "_cached_tokens", "_input_tokens", "_known", "_noted", "_vector_tokens", "first_token_ns", "last_token_ns",
        "tokens",
    )  # fmt: skip

    def __init__(self, known: Provenance = Provenance.ASSUMED, input_tokens: int = 0) -> None:
        self.tokens = 0
        self.first_token_ns: int | None = None
        self.last_token_ns: int | None = None
        self._known = known
        self._input_tokens = input_tokens
        self._cached_tokens: int | None = None
        self._vector_tokens: int | None = None  # read for the vectors that came
        self._noted = False

    def note(self, chunk: Text | Vector, at_ns: int) -> None:
        if isinstance(chunk, Vector):
            self._vector_tokens = (self._vector_tokens or 0) + chunk.input_tokens
            return
        self._noted = True
        self._cached_tokens = chunk.cached_tokens
        if chunk.tokens == 0:
            return
        self.tokens += chunk.tokens
        self.last_token_ns = at_ns
        if self.first_token_ns is None:
            self.first_token_ns = at_ns

    def usage(self) -> Usage:
        """So far."""
        if self._vector_tokens is not None:
            return Usage.of(Provenance.MEASURED, input_fresh=self._vector_tokens)
        if not self._noted:
            return Usage()
        leaves = {
            Leaf.OUTPUT_TEXT: self.tokens,
            Leaf.INPUT_FRESH: max(0, self._input_tokens - (self._cached_tokens or 0)),
        }
        if self._cached_tokens is not None:
            leaves[Leaf.INPUT_CACHE_READ] = self._cached_tokens
        return Usage({leaf: Count(tokens, self._known) for leaf, tokens in leaves.items()})


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

    The answer is driven, and its receipt closed, whether or not anybody reads. With `keep`, its whole text is kept, to
    be judged or cached; with `claimed`, for the ledger too. `beside` is how others' latency targets see it. `begun_ns`
    is the monotonic time at which the receipt was created: the system clock may be set before it closes.
    """

    def __init__(
        self, opened: Receipt, beside: Beside, begun_ns: int, *, keep: bool = False, claimed: bool = False
    ) -> None:
        self.opened = opened
        self.begun_ns = begun_ns
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
        self._kept: list[Text] | None = [] if keep or claimed else None
        self._claimed = claimed
        self._error: MillicentError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._wants_all = False

    @property
    def receipt_id(self) -> str:
        return self.opened.id

    def kept(self, end: End) -> str | None:
        """The whole answer, for the claim that was made on it: what `KeptAnswer.read` reads."""
        if not self._claimed:
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
        if self._receipt is not None:
            return  # it has ended
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
            await self._news()
        texts = merge_texts(self._waiting, in_order=True)
        self._waiting.clear()
        return texts

    async def rest(self) -> list[Text]:
        """All that wasn't taken, once it is whole and the receipt durable. Raises what went wrong."""
        self._wants_all = True
        while self._receipt is None and self._error is None:
            await self._news()
        if self._error is not None:
            raise self._error
        return self._waiting

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
            if not self._wants_all:
                self._wake()

    def finish(self, receipt: Receipt, end: End) -> None:
        """The receipt is durable: let the reader see the end."""
        self._receipt = receipt
        self._reasons = _reasons(end)
        self._error = end.error
        self._wake()

    def fail(self, error: MillicentError) -> None:
        """The receipt could not be made durable: no answer ends as if it had been."""
        self._error = error
        self._wake()

    async def _news(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def _reasons(end: End) -> tuple[FinishReason, ...]:
    return end.choices or (end.reason,)
