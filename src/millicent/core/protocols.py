"""The seams between rooms. Each has a public fake: `backends.fake.FakeBackend`, `ledger.memory.MemoryLedger`,
`core.clock.ManualClock`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Protocol, runtime_checkable

from millicent.core.accounts import Checkpoint
from millicent.core.chunks import Chunk
from millicent.core.fits import StepTimeFit
from millicent.core.idempotency import Claim
from millicent.core.money import Money
from millicent.core.receipts import Feedback, HourShare, Line, Receipt
from millicent.core.request import Request
from millicent.core.steps import DeviceState, Overhead, StepRecord


class Run(Protocol):
    """One attempt in progress."""

    def __aiter__(self) -> AsyncIterator[Chunk]:
        """Text or vectors, then exactly one End. What goes wrong upstream is never raised: it is an End with an error.

        A slow reader doesn't grow memory beyond the answer itself: text that waits is merged.
        """
        ...

    def cancel(self) -> None:
        """Stop the work within one step. The iterator then ends with End(cancelled). Safe at any time, and twice."""
        ...


class Call(Protocol):
    """A request that a backend has looked at and could run: counted, checked, not started. Nothing was spent.

    `sequences` are the numbers under which this call appears in step records, one for each choice or embedded text;
    none where the backend shows no steps. `max_output_tokens` counts all choices.
    """

    served_model: str
    placement: str
    sequences: tuple[int, ...]
    input_tokens: int | None
    max_output_tokens: int | None

    def start(self) -> Run:
        """Begin. Doesn't block; no step is reported before it returns."""
        ...


@runtime_checkable
class CountsInput(Protocol):
    """A call whose input can be counted by who would run it. Costs nothing."""

    async def count_input(self) -> int:
        """Raises what goes wrong on the way there."""
        ...


class Backend(Protocol):
    name: str

    def models(self) -> tuple[str, ...]:
        """Public names that can be asked for."""
        ...

    async def prepare(self, request: Request) -> Call:
        """Check and count. Raises ModelNotFound, InvalidRequest (too long for the context, say) or Unavailable."""
        ...


class Observer(Protocol):
    """Hears what devices do: the meter. Times are monotonic nanoseconds. Called from the event loop; never blocks."""

    def device_state(self, device: str, state: DeviceState, at_ns: int) -> None: ...

    def step(self, record: StepRecord) -> None: ...

    def overhead(self, overhead: Overhead) -> None: ...

    def lost(self, device: str, start_ns: int, wall_ns: int) -> None:
        """A step was cut off by a crash: nobody is charged for its time."""
        ...


class Ledger(Protocol):
    """Where receipts live. Every method returns once its effect is durable, or raises LedgerUnavailable having changed
    nothing. All are safe to repeat."""

    async def open(self, receipt: Receipt, claim: Claim | None = None) -> bool:
        """Write an open receipt (status None) with its first attempt, and take its hold from the budgets that apply.

        Whether a hard budget bounds it: then its cost must stay within the hold. Raises PaymentRequired where a budget
        lacks the money, Conflict where the claim is taken.
        """
        ...

    async def extend(self, receipt_id: str, hold: Money) -> bool:
        """Raise what it holds to `hold`, in all its budgets at once; False, and nothing changed, where one lacks it."""
        ...

    async def begin(self, receipt: Receipt) -> bool:
        """Write an open receipt's next attempt before its backend is called, with the ends and the lines of those
        before it, and raise what it holds to `receipt.hold`. False, and nothing changed, where a hard budget lacks it.
        """
        ...

    async def close(self, receipt: Receipt, shares: tuple[HourShare, ...], answer: str | None = None) -> None:
        """Close it, once: its base never changes afterwards, its hold is released and its cost booked, and the answer
        is kept if there was a claim. Closing a closed receipt changes nothing."""
        ...

    async def checkpoint(self, checkpoint: Checkpoint) -> None: ...

    async def maintain(self) -> None:
        """Settle what gateways that are gone left open, and delete what has outlived its retention. Call it now and
        then: some is done each time."""
        ...

    async def post_lines(self, receipt_id: str, lines: tuple[Line, ...]) -> None:
        """Append to a closed receipt. A line whose `id` is there already changes nothing.

        Raises NotFound, or Conflict while the receipt is open and where the same `id` stands for another cost.
        """
        ...

    async def add_feedback(self, feedback: tuple[Feedback, ...]) -> None:
        """All or none. One whose `id` is there already changes nothing. Raises NotFound naming the receipt, or Conflict
        where the same `id` stands for other feedback."""
        ...

    async def save_fits(self, fits: tuple[StepTimeFit, ...]) -> None:
        """Keep versions of the step-time model: receipts refer to them."""
        ...
