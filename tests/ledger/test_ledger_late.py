"""Lines and feedback come any time after an answer; fits are kept; what is useful, and what it costs, is worked out."""

import asyncio
from collections.abc import Awaitable, Callable
from decimal import Decimal

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from millicent.core.errors import Conflict, NotFound
from millicent.core.fits import StepTimeFit
from millicent.core.money import Money
from millicent.core.receipts import Feedback, Receipt, Role, outside_line
from millicent.core.request import OutsideCost
from millicent.ledger.memory import MemoryLedger
from millicent.ledger.queries import ReceiptFilter
from millicent.ledger.worth import Usefulness, wilson
from support.receipts import END_NS, running, settled

COST = OutsideCost("retrieval", "other", Decimal(2), "query", Money(500), id="one")
LATER_NS = END_NS + 10**9


def ledger_with(*receipts: Receipt) -> MemoryLedger:
    ledger = MemoryLedger()

    async def write() -> None:
        for receipt in receipts:
            if receipt.status is None:
                await ledger.open(receipt)
            else:
                await ledger.close(msgspec.structs.replace(receipt, accelerator=type(receipt.accelerator)()), ())

    asyncio.run(write())
    return ledger


def do(operation: Callable[[], Awaitable[None]]) -> None:
    async def run() -> None:
        await operation()

    asyncio.run(run())


def fit(version: str, model: str, at_ns: int, configuration: str = "fp32") -> StepTimeFit:
    return StepTimeFit(version, "cpu", model, configuration, 1e6, 2e6, 3e5, 1e5, 40.0, 0.5, 20, None, at_ns)


def test_lines_are_appended_and_one_with_the_same_id_only_once() -> None:
    receipt = settled()
    ledger = ledger_with(receipt)
    line = outside_line(COST, LATER_NS)
    for _ in range(2):
        do(lambda: ledger.post_lines(receipt.id, (line, msgspec.structs.replace(line, id=None))))
    found = ledger.queries.receipt(receipt.id)
    assert found is not None
    assert [each.amount for each in found.lines] == [Money(25_000), Money(500), Money(500), Money(500)]
    assert found.total == Money(26_500)
    assert found.lines[1].unit_price_usd == Decimal("2.5E-7")


def test_a_line_comes_after_the_end_even_where_the_clock_was_set_back() -> None:
    receipt = settled()
    ledger = ledger_with(receipt)
    do(lambda: ledger.post_lines(receipt.id, (outside_line(COST, END_NS - 3600 * 10**9),)))
    found = ledger.queries.receipt(receipt.id)
    assert found is not None
    assert found.settled_at_ns is not None
    assert [line.posted_at_ns > found.settled_at_ns for line in found.lines] == [False, True]


def test_the_last_verdict_counts_even_where_the_clock_was_set_back() -> None:
    receipt = settled()
    ledger = ledger_with(receipt)
    for at_ns, useful in ((LATER_NS, True), (END_NS - 3600 * 10**9, False)):
        given = Feedback(receipt.id, at_ns, useful=useful)
        do(lambda given=given: ledger.add_feedback((given,)))  # type: ignore[misc]
    found = ledger.queries.receipt(receipt.id)
    assert found is not None
    assert found.useful is False


def test_the_same_id_for_another_opinion_is_a_conflict_and_adds_nothing() -> None:
    receipt = settled()
    ledger = ledger_with(receipt)
    good = Feedback(receipt.id, LATER_NS, Decimal(1), "good", useful=True, id="mine")
    for _ in range(2):
        do(lambda: ledger.add_feedback((good,)))
    bad = msgspec.structs.replace(good, score=Decimal(0), useful=False)
    other = Feedback(receipt.id, LATER_NS, useful=False)
    with pytest.raises(Conflict, match="another score"):
        do(lambda: ledger.add_feedback((other, bad)))
    found = ledger.queries.receipt(receipt.id)
    assert found is not None
    assert found.useful is True


def test_the_same_id_for_another_cost_is_a_conflict_and_adds_nothing() -> None:
    receipt = settled()
    ledger = ledger_with(receipt)
    line = outside_line(COST, LATER_NS)
    do(lambda: ledger.post_lines(receipt.id, (line,)))
    other = msgspec.structs.replace(line, amount=Money(501))
    with pytest.raises(Conflict, match="another amount"):
        do(lambda: ledger.post_lines(receipt.id, (msgspec.structs.replace(line, id="two"), other)))
    found = ledger.queries.receipt(receipt.id)
    assert found is not None
    assert len(found.lines) == 2


def test_lines_for_an_open_or_unknown_receipt_are_refused() -> None:
    ledger = ledger_with(running())
    with pytest.raises(Conflict, match="still open"):
        do(lambda: ledger.post_lines(running().id, (outside_line(COST, LATER_NS),)))
    with pytest.raises(NotFound):
        do(lambda: ledger.post_lines("rcpt_none", (outside_line(COST, LATER_NS),)))


def test_the_latest_verdict_counts_and_feedback_with_the_same_id_is_the_same() -> None:
    receipt = settled()
    ledger = ledger_with(receipt)
    given = Feedback(receipt.id, LATER_NS, Decimal("0.9"), None, None, True, "mine")
    do(lambda: ledger.add_feedback((given, msgspec.structs.replace(given, useful=False))))
    assert (found := ledger.queries.receipt(receipt.id)) is not None
    assert found.useful is True
    do(lambda: ledger.add_feedback((Feedback(receipt.id, LATER_NS + 1, None, "bad", None, False),)))
    do(lambda: ledger.add_feedback((Feedback(receipt.id, LATER_NS + 2, None, None, "hm", None),)))
    assert (found := ledger.queries.receipt(receipt.id)) is not None
    assert found.useful is False


def test_feedback_on_one_unknown_receipt_adds_nothing_at_all() -> None:
    receipt = settled()
    ledger = ledger_with(receipt)
    with pytest.raises(NotFound, match="rcpt_none"):
        do(lambda: ledger.add_feedback(tuple(Feedback(one, 1, useful=True) for one in (receipt.id, "rcpt_none"))))
    [found] = ledger.queries.usefulness("feature", ReceiptFilter())
    assert (found.requests, found.rated, found.cost_per_useful) == (1, 0, None)


def test_roles_add_up_to_the_cost_of_predictivity() -> None:
    receipt = settled()
    ledger = ledger_with(receipt)
    do(lambda: ledger.post_lines(receipt.id, (outside_line(COST, LATER_NS),)))
    [costs] = ledger.queries.role_costs("feature", ReceiptFilter())
    assert costs.costs == {Role.INFERENCE: Money(25_000), Role.RETRIEVAL: Money(500)}
    assert [costs.total] == [each.cost for each in ledger.queries.totals("feature", ReceiptFilter())]


def test_the_newest_fit_of_each_model_is_read_back_as_it_was_written() -> None:
    ledger = MemoryLedger()
    fits = (fit("a", "m", 1), fit("b", "m", 2), fit("c", "n", 1), fit("d", "m", 3, "bf16"))

    async def saved() -> list[StepTimeFit]:
        await ledger.save_fits(fits)
        await ledger.save_fits(fits)
        return await ledger.latest_fits("cpu", "fp32")

    assert asyncio.run(saved()) == [fits[1], fits[2]]


def test_costs_known_at_opening_survive_without_a_closing() -> None:
    opened = msgspec.structs.replace(running(), lines=(outside_line(COST, END_NS),))
    ledger = ledger_with(opened)
    assert (found := ledger.queries.receipt(opened.id)) is not None
    assert found.lines == opened.lines
    closed = msgspec.structs.replace(
        settled(opened.id), lines=(*opened.lines, *settled().lines), accelerator=running().accelerator
    )
    do(lambda: ledger.close(closed, ()))
    assert (found := ledger.queries.receipt(opened.id)) is not None
    assert found.lines == closed.lines
    assert ledger.queries.verify() == []


@pytest.mark.parametrize(
    ("useful", "rated", "low", "high"),
    [(8, 10, "0.4902", "0.9433"), (0, 10, "0", "0.2775"), (10, 10, "0.7225", "1")],  # Wilson 1927, tabulated
)
def test_the_interval_is_wilsons(useful: int, rated: int, low: str, high: str) -> None:
    found = wilson(useful, rated)
    assert [round(end, 4) for end in found] == [Decimal(low), Decimal(high)]


@given(st.integers(1, 10**6).flatmap(lambda rated: st.tuples(st.integers(0, rated), st.just(rated))))
def test_the_rate_lies_in_its_interval(counts: tuple[int, int]) -> None:
    low, high = wilson(*counts)
    assert 0 <= low <= Decimal(counts[0]) / counts[1] <= high <= 1


def test_a_useful_output_costs_the_mean_over_the_rate_and_nothing_rated_is_nothing_known() -> None:
    found = Usefulness("f", requests=10, priced=8, cost=Money(800), rated=4, useful=2)
    assert found.cost_per_useful == Money(200)
    low, high = found.cost_per_useful_interval
    assert low is not None
    assert high is not None
    assert low < Money(200) < high
    unrated = msgspec.structs.replace(found, rated=0, useful=0)
    assert (unrated.cost_per_useful, unrated.cost_per_useful_interval, unrated.rate) == (None, (None, None), None)
    assert msgspec.structs.replace(found, useful=0).cost_per_useful is None
