"""Rollups are the sum of entries, at every instant, whatever is asked."""

from __future__ import annotations

import asyncio
import sqlite3
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from importlib import resources
from typing import Any, get_args

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millicent.core.accounts import Checkpoint
from millicent.core.clock import NS_PER_HOUR, NS_PER_S, ManualClock, iso_utc
from millicent.core.money import Money
from millicent.core.receipts import Accelerator, Feedback, Line, Meter, Receipt, Role, Status
from millicent.core.request import Attribution
from millicent.core.usage import Count, Leaf, Provenance, Usage
from millicent.ledger import rollups, rows, tallies
from millicent.ledger.maintenance import delete_expired
from millicent.ledger.memory import MemoryLedger
from millicent.ledger.queries import GroupBy, ReceiptFilter

Make = Callable[..., Receipt]
T0 = ManualClock().now_ns()
QUARTER_NS = 900 * NS_PER_S
GROUPS: tuple[GroupBy, ...] = get_args(GroupBy)

names = st.sampled_from([None, None, "a", "b"])
amounts = st.one_of(st.none(), st.integers(-5, 10**12))
lines = st.tuples(
    amounts,
    st.sampled_from(["measured", "assumed"]),
    st.sampled_from(["actual", "actual", "what-if"]),
    st.sampled_from(list(Role)),
)
# Over three days, so that whole days, quarter-hours at their ends and cut ones are all asked for.
instants = st.integers(-2 * 96, 96).flatmap(
    lambda quarter: st.sampled_from([0, 1, QUARTER_NS - 1]).map(lambda rest: T0 + quarter * QUARTER_NS + rest)
)
closings = st.fixed_dictionaries(
    {
        "created_at_ns": instants,
        "attribution": st.builds(Attribution, key=names, team=names, user=names, feature=names, tier=names, run=names),
        "model": st.sampled_from(["m", "n"]),
        "status": st.sampled_from(list(Status)),
        "lines": st.lists(lines, max_size=3),
        "tokens": st.one_of(st.none(), st.integers(0, 9)),
        "serving_ns": st.integers(0, 3),
        "useful": st.sampled_from([None, True, False]),
    }
)
filters = st.builds(
    ReceiptFilter,
    user=st.sampled_from([None, None, "a", ""]),
    feature=st.sampled_from([None, None, "a", ""]),
    tier=st.sampled_from([None, None, None, "a"]),
    run=st.sampled_from([None, None, None, "a", ""]),
    status=st.sampled_from([None, None, "succeeded"]),
    from_ns=st.one_of(st.none(), instants),
    to_ns=st.one_of(st.none(), instants),
)
verdicts = st.sampled_from([True, False, None])
steps = st.lists(
    st.one_of(
        st.tuples(st.just("close"), closings),
        st.tuples(st.just("late"), lines),
        st.tuples(st.just("feedback"), verdicts),
        st.just(("fold", None)),
        st.just(("fold some", None)),
        st.tuples(st.just("delete"), instants),
    ),
    min_size=6,
    max_size=30,
)


def line(given_line: tuple[int | None, str, str, Role]) -> Line:
    nanousd, provenance, book, role = given_line
    amount = None if nanousd is None else Money(nanousd)
    return Line(1, role, Meter.OTHER, 1, "unit", None, amount, Provenance(provenance), T0, T0, book)  # type: ignore[arg-type]


def receipt_of(number: int, facts: dict[str, Any]) -> Receipt:
    tokens = facts["tokens"]
    count = Count(None, Provenance.UNKNOWN) if tokens is None else Count(tokens, Provenance.MEASURED)
    return Receipt(
        id=f"rcpt_{number:04d}",
        created_at_ns=facts["created_at_ns"],
        settled_at_ns=facts["created_at_ns"] + 1,
        status=facts["status"],
        model=facts["model"],
        placement="p" if facts["model"] == "m" else None,
        dialect="openai",
        stream=False,
        attribution=facts["attribution"],
        usage=Usage({Leaf.INPUT_FRESH: count}),
        accelerator=Accelerator(serving_ns=facts["serving_ns"]),
        lines=tuple(map(line, facts["lines"])),
        useful=facts["useful"],
    )


def add_line(connection: sqlite3.Connection, receipt_id: str, ordinal: int, added: Line) -> None:
    connection.execute(rows.INSERT_LINE, rows.line_row(receipt_id, ordinal, added))


def selected(receipts: list[Receipt], by: GroupBy, where: ReceiptFilter) -> dict[str | None, list[Receipt]]:
    """Those asked for, by group."""
    found: dict[str | None, list[Receipt]] = defaultdict(list)
    for receipt in receipts:
        named = msgspec.structs.asdict(receipt.attribution) | {
            "model": receipt.model,
            "status": receipt.status,
            "placement": receipt.placement,
            "month": iso_utc(receipt.created_at_ns)[:7],
            "day": iso_utc(receipt.created_at_ns)[:10],
            "hour": iso_utc(receipt.created_at_ns)[:13] + ":00:00Z",
        }
        wanted = {name: value for name, value in msgspec.structs.asdict(where).items() if value is not None}
        low, high = wanted.pop("from_ns", -(2**63)), wanted.pop("to_ns", 2**63)
        if low <= receipt.created_at_ns < high and all((named[n] or "") == value for n, value in wanted.items()):
            found[named[by]].append(receipt)
    return found


def expected(receipts: list[Receipt], by: GroupBy, where: ReceiptFilter) -> dict[str | None, tuple[int, ...]]:
    """The same sums, from the receipts themselves."""
    return {
        group: tuple(map(sum, zip(*map(figures, members), strict=True)))
        for group, members in selected(receipts, by, where).items()
    }


def figures(receipt: Receipt) -> tuple[int, ...]:
    actual = [each for each in receipt.lines if each.book == "actual"]
    ran = receipt.status is not Status.REFUSED and (
        receipt.status is Status.INTERRUPTED or receipt.usage.input_tokens != 0 or receipt.accelerator.serving_ns != 0
    )
    return (
        1,
        receipt.usage.input_tokens or 0,
        0,
        receipt.accelerator.serving_ns,
        0 if receipt.total is None else receipt.total.nanousd,
        any(each.amount is None for each in actual) if actual else ran,
        receipt.total is not None and any(each.provenance is Provenance.ASSUMED for each in actual),
        receipt.usage.input_tokens is None,
    )


def expected_worth(receipts: list[Receipt], by: GroupBy, where: ReceiptFilter) -> dict[str | None, tuple[int, ...]]:
    return {
        group: (
            len(members),
            sum(each.total is not None for each in members),
            sum(each.total.nanousd for each in members if each.total is not None),
            sum(each.useful is not None for each in members),
            sum(each.useful is True for each in members),
        )
        for group, members in selected(receipts, by, where).items()
    }


def expected_roles(receipts: list[Receipt], by: GroupBy, where: ReceiptFilter) -> dict[str | None, Any]:
    found: dict[str | None, Any] = {}
    for group, members in selected(receipts, by, where).items():
        actual = [each for receipt in members for each in receipt.lines if each.book == "actual"]
        costs: dict[Role, int] = defaultdict(int)
        for each in actual:
            costs[each.role] += 0 if each.amount is None else each.amount.nanousd
        if actual:
            unpriced = sum(each.amount is None for each in actual)
            found[group] = ({role: Money(cost) for role, cost in costs.items() if cost}, unpriced)
    return found


def answered(ledger: MemoryLedger, by: GroupBy, where: ReceiptFilter, zone: str = "UTC") -> dict[str | None, Any]:
    totals = ledger.queries.totals(by, where, zone=zone)
    return {
        each.group: (
            each.requests,
            each.input_tokens,
            each.output_tokens,
            each.serving_ns,
            each.cost.nanousd,
            each.unpriced,
            each.assumed,
            each.unknown_usage,
        )
        for each in totals
    }


async def play(ledger: MemoryLedger, script: list[tuple[str, Any]]) -> list[Receipt]:
    receipts: list[Receipt] = []
    for verb, facts in script:
        if verb == "close":
            receipts.append(receipt_of(len(receipts), facts))
            await ledger.close(receipts[-1], ())
        elif verb == "fold":
            await ledger.checkpoint(Checkpoint(T0, (), ()))
        elif verb == "fold some":
            await ledger.write(partial(rollups.fold_some, most=2))
        elif verb == "delete":
            # As kept in every sum; times are of the quarter-hour then.
            await ledger.write(partial(delete_expired, before_ns=facts))
            kept = {each.id for each in ledger.queries.receipts(ReceiptFilter(), limit=99).receipts}
            receipts = [each if each.id in kept else deleted(each) for each in receipts]
        elif not (kept_ones := [each for each in receipts if not each.error]):
            continue
        elif verb == "feedback":
            given = kept_ones[len(kept_ones) // 2]
            await ledger.add_feedback((Feedback(given.id, T0, useful=facts),))
            if facts is not None:
                receipts[receipts.index(given)] = msgspec.structs.replace(given, useful=facts)
        else:
            changed = kept_ones[len(kept_ones) // 2]
            place = receipts.index(changed)
            added = line(facts)
            await ledger.write(partial(add_line, receipt_id=changed.id, ordinal=len(changed.lines), added=added))
            receipts[place] = msgspec.structs.replace(changed, lines=(*changed.lines, added))
    return receipts


def deleted(receipt: Receipt) -> Receipt:
    """What its sums still know: neither runs nor conversations, and when it was to the quarter-hour."""
    start_ns = receipt.created_at_ns - receipt.created_at_ns % QUARTER_NS
    given = msgspec.structs.replace(receipt.attribution, run=None, conversation=None)
    return msgspec.structs.replace(receipt, created_at_ns=start_ns, attribution=given, error="deleted")


@settings(max_examples=100, deadline=None)
@given(
    script=steps,
    questions=st.lists(st.tuples(st.sampled_from(GROUPS), filters), min_size=4, max_size=8),
    most_pending=st.sampled_from([1, 4096]),
)
def test_totals_are_the_sum_of_entries_whatever_was_folded_and_whatever_is_asked(
    script: list[tuple[str, Any]], questions: list[tuple[GroupBy, ReceiptFilter]], most_pending: int
) -> None:
    ledger = MemoryLedger()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(rollups, "_MOST_PENDING", most_pending)
        receipts = asyncio.run(play(ledger, script))
    always: list[tuple[GroupBy, ReceiptFilter]] = [("status", ReceiptFilter()), ("user", ReceiptFilter(feature="a"))]
    for by, where in [*always, *questions]:
        if where.run is not None and any(each.error for each in receipts):
            # What was deleted is known of no run.
            continue
        assert answered(ledger, by, where) == expected(receipts, by, where), (by, where)
        worth = {
            each.group: (each.requests, each.priced, each.cost.nanousd, each.rated, each.useful)
            for each in ledger.queries.usefulness(by, where)
        }
        assert worth == expected_worth(receipts, by, where), (by, where)
        roles = {each.group: (each.costs, each.unpriced) for each in ledger.queries.role_costs(by, where)}
        assert roles == expected_roles(receipts, by, where), (by, where)
    assert not [each for each in ledger.queries.verify() if "rollup" in each]
    asyncio.run(ledger.stop())


@settings(max_examples=25, deadline=None)
@given(
    before=st.lists(closings, max_size=12),
    after=st.lists(st.one_of(st.tuples(st.just("close"), closings), st.just(("fold", None))), max_size=15),
    question=st.tuples(st.sampled_from(GROUPS), filters),
    batch=st.integers(1, 4),
)
def test_receipts_of_an_older_version_are_taken_in_bit_by_bit_and_counted_once_all_the_while(
    before: list[dict[str, Any]], after: list[tuple[str, Any]], question: tuple[GroupBy, ReceiptFilter], batch: int
) -> None:
    ledger = MemoryLedger()
    old = asyncio.run(play(ledger, [("close", facts) for facts in before]))
    # As a migration leaves it: nothing rolled up, everything still to be taken in.
    ledger._connection.execute("DELETE FROM unrolled")
    for table in ("rollup_progress", "tally_progress"):
        ledger._connection.execute(
            f"UPDATE {table} SET raw_before_ns = (SELECT coalesce(max(created_at_ns) + 1, -1 << 63) FROM receipts)"
        )
    with pytest.MonkeyPatch.context() as patched:
        for room in (rollups, tallies):
            patched.setattr(room, "backfill", partial(room.backfill, most=batch))
        script = [*after, *[("fold", None)] * 13]
        receipts = old
        for verb, facts in script:
            if verb == "close":
                receipts.append(receipt_of(len(receipts), facts))
                asyncio.run(ledger.close(receipts[-1], ()))
            elif verb == "fold":
                asyncio.run(ledger.checkpoint(Checkpoint(T0, (), ())))
            assert answered(ledger, *question) == expected(receipts, *question)
        for _ in range(26):
            asyncio.run(ledger.checkpoint(Checkpoint(T0, (), ())))
    assert rollups.is_complete(ledger._connection)
    assert not [each for each in ledger.queries.verify() if "rollup" in each or "tally" in each]
    asyncio.run(ledger.stop())


def test_sums_go_on_to_the_cubes_when_their_quarter_hour_is_over_or_too_many_wait(
    opened: Make, closed: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = MemoryLedger()
    connection = ledger._connection
    monkeypatch.setattr(rollups, "_MOST_PENDING", 3)

    def close(number: int, at_ns: int) -> tuple[int, int]:
        """What waits then, and what the finest cube has."""
        receipt = opened(number, created_at_ns=at_ns, attribution=Attribution(user=f"user-{number}"))
        asyncio.run(ledger.close(closed(receipt, accelerator=Accelerator()), ()))
        while rollups.fold_some(connection, 2):
            pass
        (waiting,) = connection.execute("SELECT count(*) FROM rollups_pending").fetchone()
        (requests,) = connection.execute(
            "SELECT ifnull(sum(requests), 0) FROM rollups JOIN rollup_groups ON id = grouped"
            " WHERE cube = 'user' AND span_s = 900"
        ).fetchone()
        assert sum(each.requests for each in ledger.queries.totals("user", ReceiptFilter())) == number + 1
        return waiting, requests

    assert close(0, T0) == (1, 0)
    assert close(1, T0 + 1) == (2, 0)
    assert close(2, T0 + QUARTER_NS) == (1, 2), "the first quarter-hour is over"
    assert close(3, T0) == (1, 3), "what is late goes on at once"
    assert [close(number, T0 + QUARTER_NS) for number in (4, 5, 6)] == [(2, 3), (3, 3), (2, 5)]
    asyncio.run(ledger.stop())


def test_days_and_hours_are_those_of_the_zone_through_changes_of_the_clock(opened: Make, closed: Make) -> None:
    """Berlin's 2026-03-29 has 23 hours and its 2026-10-25 has 25; both are told apart from UTC's."""
    ledger = MemoryLedger()
    spring = 1_774_738_800 * NS_PER_S  # 2026-03-28T23:00:00Z, midnight in Berlin
    autumn = 1_792_879_200 * NS_PER_S  # 2026-10-24T22:00:00Z, midnight in Berlin
    for number, created_at_ns in enumerate(
        [
            spring - 1,
            spring,
            spring + 23 * NS_PER_HOUR - 1,
            spring + 23 * NS_PER_HOUR,
            autumn + 2 * NS_PER_HOUR,
            autumn + 3 * NS_PER_HOUR,
            autumn + 25 * NS_PER_HOUR,
        ]
    ):
        receipt = closed(opened(number, created_at_ns=created_at_ns), accelerator=Accelerator())
        asyncio.run(ledger.close(receipt, ()))
    days = ledger.queries.totals("day", ReceiptFilter(), zone="Europe/Berlin")
    assert [(each.group, each.requests) for each in days] == [
        ("2026-03-28", 1),
        ("2026-03-29", 2),
        ("2026-03-30", 1),
        ("2026-10-25", 2),
        ("2026-10-26", 1),
    ]
    hours = ledger.queries.totals("hour", ReceiptFilter(from_ns=autumn), zone="Europe/Berlin")
    assert [each.group for each in hours] == [
        "2026-10-25T02:00:00+02:00",
        "2026-10-25T02:00:00+01:00",
        "2026-10-26T00:00:00+01:00",
    ]
    asyncio.run(ledger.stop())


@pytest.mark.parametrize(
    ("changes", "unpriced"),
    [
        ({"status": Status.REFUSED}, 0),
        ({"status": Status.FAILED, "usage": Usage()}, 0),
        ({"status": Status.INTERRUPTED, "usage": Usage()}, 1),
        ({"status": Status.SUCCEEDED}, 1),
    ],
)
def test_what_cost_nothing_is_not_unpriced(opened: Make, closed: Make, changes: dict[str, Any], unpriced: int) -> None:
    ledger = MemoryLedger()
    asyncio.run(ledger.close(closed(opened(1), lines=(), accelerator=Accelerator(), **changes), ()))
    assert ledger.queries.totals("model", ReceiptFilter())[0].unpriced == unpriced
    asyncio.run(ledger.stop())


def test_a_late_line_counts_in_its_day_before_it_is_folded(opened: Make, closed: Make) -> None:
    """The day is read from a rollup, at whose start the receipt isn't."""
    ledger = MemoryLedger()
    noon_ns = T0 + 12 * NS_PER_HOUR
    priced = line((5, "measured", "actual", Role.INFERENCE))
    asyncio.run(ledger.close(closed(opened(1, created_at_ns=noon_ns), lines=(priced,)), ()))
    asyncio.run(ledger.checkpoint(Checkpoint(T0, (), ())))
    asyncio.run(ledger.post_lines(opened(1).id, (line((7, "measured", "actual", Role.RETRIEVAL)),)))
    (costs,) = ledger.queries.role_costs("day", ReceiptFilter())
    assert costs.costs == {Role.INFERENCE: Money(5), Role.RETRIEVAL: Money(7)}
    asyncio.run(ledger.stop())


def test_unattributed_and_running_receipts_can_be_selected(opened: Make, closed: Make) -> None:
    ledger = MemoryLedger()
    asyncio.run(ledger.open(opened(1)))
    asyncio.run(ledger.close(closed(opened(2), accelerator=Accelerator()), ()))
    asyncio.run(ledger.open(opened(3, attribution=Attribution(feature="f"))))

    def found(**where: Any) -> list[str]:
        return [receipt.id[-1] for receipt in ledger.queries.receipts(ReceiptFilter(**where)).receipts]

    assert found(feature="") == ["2", "1"]
    assert found(status="running") == ["3", "1"]
    assert ledger.queries.totals("feature", ReceiptFilter(status="running")) == []
    asyncio.run(ledger.stop())


def test_smaller_cubes_begin_as_the_sum_of_what_was_kept_before_there_were_any(opened: Make, closed: Make) -> None:
    """Their migration, on a ledger of several days, features, models, places and states."""
    ledger = MemoryLedger()
    for number in range(40):
        given = Attribution(feature=["f", None, "g"][number // 2 % 3], user="u")
        at_ns = T0 + number * 7 * NS_PER_HOUR
        receipt = opened(number, model="mn"[number % 2], created_at_ns=at_ns, attribution=given)
        receipt = closed(receipt, accelerator=Accelerator(), placement=["p", None, "q"][number % 3])
        status = Status.FAILED if number % 5 == 0 else Status.SUCCEEDED
        asyncio.run(ledger.close(msgspec.structs.replace(receipt, status=status), ()))
    asyncio.run(ledger.checkpoint(Checkpoint(T0, (), ())))
    questions = (ReceiptFilter(model="m", placement="p", status="succeeded"), ReceiptFilter(feature="g"))
    hours = [ledger.queries.requests_by_hour(where) for where in questions]
    assert all(len(each) > 3 for each in hours)
    kept = ledger._connection
    smaller = "cube IN ('place', 'feature')"
    kept.execute(f"DELETE FROM rollups WHERE grouped IN (SELECT id FROM rollup_groups WHERE {smaller})")
    kept.execute(f"DELETE FROM rollup_groups WHERE {smaller}")
    assert {each.split(" of ")[0] for each in ledger.queries.verify()} == {
        "the rollup by model, placement, status",
        "the rollup by feature, status",
    }
    kept.executescript(
        (resources.files("millicent.ledger") / "migrations" / "0020_smaller_cubes.sql").read_text("utf-8")
    )
    assert ledger.queries.verify() == []
    assert [ledger.queries.requests_by_hour(where) for where in questions] == hours
    asyncio.run(ledger.stop())
