"""The ledger's own traffic, as the simulator takes it, beside what was measured of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import msgspec

from millicent.core.clock import NS_PER_MS, parse_time_ns
from millicent.core.errors import InvalidRequest
from millicent.core.money import Money
from millicent.core.prompts import Prompt
from millicent.core.receipts import Receipt, Status
from millicent.core.usage import Leaf
from millicent.economics.arrivals import Arrival, tenant_of
from millicent.ledger.queries import LedgerQueries, ReceiptFilter

# So many receipts are read, the newest; that takes some seconds.
MOST_READ = 50_000
_PAGE = 5_000


class Recorded(msgspec.Struct, frozen=True):
    """One answer, and as an arrival. `cost` None is unpriced."""

    arrival: Arrival
    receipt: Receipt
    cost: Money | None

    @property
    def place(self) -> tuple[str, str]:
        """Where it ran, and what."""
        return self.receipt.placement or "", self.receipt.served_model or self.receipt.model

    @property
    def decoded(self) -> bool:
        """Whether an engine that shows its steps wrote it."""
        return self.receipt.accelerator.step_time_version is not None and self.arrival.output_tokens > 0

    @property
    def cached_tokens(self) -> int:
        return self.receipt.usage.tokens(Leaf.INPUT_CACHE_READ) or 0


def read_recorded(
    queries: LedgerQueries,
    where: ReceiptFilter,
    *,
    most: int = MOST_READ,
    progress: Callable[[int], object] | None = None,
) -> list[Recorded]:
    """Answers that went well and whose tokens are known, oldest first: of the newest hours that hold at most `most`
    receipts in all, the newest hour whole in any case."""
    where = msgspec.structs.replace(where, from_ns=_newest(queries, where, most))
    found: list[Recorded] = []
    after: str | None = None
    while True:
        page = queries.asked(where, limit=_PAGE, after=after)
        found += [kept for each in page.asked if (kept := _recorded(each.receipt, each.cost)) is not None]
        if progress is not None:
            progress(len(found))
        if page.next is None:
            return found
        after = page.next


def main_engine(recorded: Sequence[Recorded]) -> tuple[str, str]:
    """The placement and model that steps were seen of most often. Vectors don't count: what makes them has another
    scheduler.

    Raises InvalidRequest where there is none.
    """
    counts = Counter(each.place for each in recorded if each.decoded)
    if not counts:
        raise InvalidRequest(
            "no answers of an engine that shows its steps in this part of the ledger: choose another model or time, or"
            " give a trace",
            param="model",
        )
    return max(counts, key=lambda place: (counts[place], place))


def fit_versions(recorded: Sequence[Recorded]) -> list[str]:
    """Of the step-time models that their device time was split by."""
    versions = {each.receipt.accelerator.step_time_version for each in recorded}
    return sorted(version for version in versions if version is not None)


def _newest(queries: LedgerQueries, where: ReceiptFilter, most: int) -> int | None:
    """Where the newest hours that hold so many begin."""
    if where.from_ns is not None and where.to_ns is not None and where.to_ns <= where.from_ns:
        return where.from_ns
    hours = queries.totals("hour", where)
    count = 0
    for position in range(len(hours) - 1, -1, -1):
        count += hours[position].requests
        if count > most and position < len(hours) - 1:
            return parse_time_ns(hours[position + 1].group or "")
    return where.from_ns


def _recorded(receipt: Receipt, cost: Money | None) -> Recorded | None:
    """None for what didn't go well, or whose tokens nobody knows."""
    usage, given, ran = receipt.usage, receipt.attribution, receipt.accelerator
    if receipt.status is not Status.SUCCEEDED or not usage.input_tokens or usage.output_tokens is None:
        return None
    policy = receipt.policy or {}
    target_ms = policy.get("latency_target_ms")
    arrival = Arrival(
        receipt.created_at_ns,
        usage.input_tokens,
        usage.output_tokens,
        tenant=tenant_of(given.key),
        target_ns=None if target_ms is None else int(target_ms) * NS_PER_MS,
        streamed=receipt.stream,
        prefix=prefix_of(receipt.prompt, usage.input_tokens),
        guessed=(ran.drafted_tokens, ran.accepted_tokens),
        key=given.key,
        user=given.user,
        feature=given.feature,
    )
    return Recorded(arrival, receipt, cost)


def prefix_of(prompt: Prompt | None, input_tokens: int) -> tuple[tuple[int, bytes], ...]:
    """Where its segments end, in tokens: in proportion to their lengths, which is an estimate."""
    if prompt is None or not prompt.length:
        return ()
    ends = [end * input_tokens // prompt.length for end in prompt.ends()]
    return tuple((end, segment.chain) for end, segment in zip(ends, prompt.segments, strict=True) if end > 0)
