"""Tallies are the sum of receipts, at every instant, whatever is asked; and what a histogram says is near the truth."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import datetime
from decimal import Decimal
from functools import partial
from typing import Any
from zoneinfo import ZoneInfo

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millicent.core.accounts import Checkpoint
from millicent.core.clock import NS_PER_S, ManualClock, iso_utc
from millicent.core.money import Money
from millicent.core.receipts import Accelerator, Energy, Line, Meter, Receipt, Role, Status, Timing
from millicent.core.request import Attribution
from millicent.core.tallies import Sums, Tally, bounds_of, bucket_of, count_at_most, percentile
from millicent.core.usage import Provenance, Usage
from millicent.ledger import rollups, rows, tallies
from millicent.ledger.maintenance import delete_expired
from millicent.ledger.memory import MemoryLedger
from millicent.ledger.queries import GroupBy, ReceiptFilter

Make = Callable[..., Receipt]
T0 = ManualClock().now_ns()
QUARTER_NS = 900 * NS_PER_S

names = st.sampled_from([None, "a", "b"])
given_lines = st.lists(
    st.tuples(
        st.one_of(st.none(), st.integers(-5, 10**12)),
        st.sampled_from(list(Role)),
        st.sampled_from([Meter.INPUT, Meter.OUTPUT]),
        st.sampled_from(["actual", "actual", "what-if"]),
    ),
    max_size=3,
)
# Three days, and some that lie in other spans of eight.
quarters = st.one_of(st.integers(-2 * 96, 96), st.sampled_from([-20, -9, -7, 5, 9, 30]).map(lambda day: day * 96))
instants = quarters.flatmap(
    lambda quarter: st.sampled_from([0, 1, QUARTER_NS - 1]).map(lambda rest: T0 + quarter * QUARTER_NS + rest)
)
closings = st.fixed_dictionaries(
    {
        "created_at_ns": instants,
        "feature": names,
        "user": names,
        "model": st.sampled_from(["m", "n"]),
        "status": st.sampled_from(list(Status)),
        "lines": given_lines,
        "tokens": st.integers(0, 9),
        "took_ns": st.one_of(st.none(), st.integers(0, 10**13)),
        "joules": st.one_of(st.none(), st.sampled_from(["0.5", "3"])),
        "stream": st.booleans(),
        "policy": st.sampled_from(
            [None, {"routing": "smart"}, {"response_cache": "hit"}, {"response_cache": "miss"}, {"route": "x"}]
        ),
    }
)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("close"), closings),
        st.tuples(st.just("late"), given_lines),
        st.just(("fold", None)),
        st.just(("fold some", None)),
    ),
    min_size=4,
    max_size=25,
)
filters = st.builds(
    ReceiptFilter,
    feature=st.sampled_from([None, None, "a", ""]),
    model=st.sampled_from([None, None, "m"]),
    user=st.sampled_from([None, None, None, "a", ""]),
    from_ns=st.one_of(st.none(), instants),
    to_ns=st.one_of(st.none(), instants),
)
groups = st.sampled_from(
    [("feature",), ("model",), ("feature", "model"), ("day",), ("feature", "month"), ("hour",), ("user",), ()]
)
zones = st.sampled_from(["UTC", "Asia/Kolkata", "Asia/Kathmandu", "America/St_Johns", "Europe/Berlin"])


def line_of(facts: tuple[int | None, Role, Meter, str]) -> Line:
    nanousd, role, meter, book = facts
    amount = None if nanousd is None else Money(nanousd)
    return Line(1, role, meter, Decimal(1), "token", None, amount, Provenance.MEASURED, T0, T0, book)


def receipt_of(number: int, facts: dict[str, Any]) -> Receipt:
    return Receipt(
        id=f"rcpt_{number:04d}",
        created_at_ns=facts["created_at_ns"],
        settled_at_ns=facts["created_at_ns"] + 1,
        status=facts["status"],
        model=facts["model"],
        dialect="openai",
        stream=facts["stream"],
        attribution=Attribution(feature=facts["feature"], user=facts["user"]),
        usage=Usage.of(Provenance.MEASURED, input_fresh=facts["tokens"], input_cache_read=2),
        timing=Timing(ttft_ns=None if facts["took_ns"] is None else facts["took_ns"] // 3, total_ns=facts["took_ns"]),
        accelerator=Accelerator(5, 3, 2),
        energy=Energy(None if facts["joules"] is None else Decimal(facts["joules"]), Provenance.UNKNOWN),
        lines=tuple(map(line_of, facts["lines"])),
        policy=facts["policy"],
    )


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
        elif receipts:
            place = len(receipts) // 2
            changed = receipts[place]
            for facts_of_line in facts:
                added = line_of(facts_of_line)
                row = rows.line_row(changed.id, len(changed.lines), added)
                await ledger.write(lambda connection, row=row: connection.execute(rows.INSERT_LINE, row))  # type: ignore[misc]
                changed = msgspec.structs.replace(changed, lines=(*changed.lines, added))
            receipts[place] = changed
    return receipts


def expected(
    receipts: list[Receipt], by: tuple[GroupBy, ...], where: ReceiptFilter, zone: str = "UTC"
) -> dict[Any, Tally]:
    found: dict[Any, Tally] = {}
    for receipt in receipts:
        named = {"feature": receipt.attribution.feature, "model": receipt.model, "user": receipt.attribution.user}
        moment = datetime.fromtimestamp(receipt.created_at_ns // NS_PER_S, ZoneInfo(zone)).isoformat()
        hour = moment[:13] + ":00:00" + moment[19:].replace("+00:00", "Z")
        named |= {"day": moment[:10], "month": moment[:7], "hour": hour}
        wanted = {name: value for name, value in msgspec.structs.asdict(where).items() if value is not None}
        low, high = wanted.pop("from_ns", -(2**63)), wanted.pop("to_ns", 2**63)
        if low <= receipt.created_at_ns < high and all((named[n] or "") == value for n, value in wanted.items()):
            found.setdefault(tuple(named[name] for name in by), Tally()).add(tally_of(receipt))
    return found


def tally_of(receipt: Receipt) -> Tally:
    tokens = {str(leaf): count.tokens for leaf, count in receipt.usage.leaves.items() if count.tokens}
    tally = Tally(requests=1, tokens=tokens, routed=int("routing" in (receipt.policy or {})))
    found = (receipt.policy or {}).get("response_cache")
    if found == "hit":
        tally.tokens = {}
        tokens = {"input_hit": sum(tokens.values())}
    tally.cache_hits, tally.cache_misses = int(found == "hit"), int(found == "miss")
    if receipt.energy.joules is not None:
        tally.measured, tally.energy_uj = 1, int(receipt.energy.joules * 10**6)
    if receipt.status is Status.SUCCEEDED and receipt.timing.total_ns is not None:
        tally.total = {bucket_of(receipt.timing.total_ns): 1}
        tally.ttft = {} if receipt.timing.ttft_ns is None else {bucket_of(receipt.timing.ttft_ns): 1}
        tally.wait = tally.ttft if receipt.stream else tally.total
        if found == "hit":
            tally.ttft = tally.total = {}
    if receipt.total is not None:
        tally.priced, tally.prefill_ns, tally.decode_ns, tally.priced_tokens = 1, 3, 2, tokens
        for line in receipt.lines:
            if line.book == "actual" and line.amount is not None:
                tally.add(Tally(nanousd={f"{line.role} {line.meter}": line.amount.nanousd}))
        tally.cost = {bucket_of(receipt.total.nanousd): 1}
    return tally


@settings(max_examples=40, deadline=None)
@given(script=steps, questions=st.lists(st.tuples(groups, filters, zones), min_size=3, max_size=6))
def test_tallies_are_the_sum_of_receipts_whatever_was_folded_and_whatever_is_asked(
    script: list[tuple[str, Any]], questions: list[tuple[tuple[GroupBy, ...], ReceiptFilter, str]]
) -> None:
    ledger = MemoryLedger()
    receipts = asyncio.run(play(ledger, script))
    for by, where, zone in questions:
        assert ledger.queries.tallies(by, where, zone=zone) == expected(receipts, by, where, zone), (by, where, zone)
        if not {"day", "month", "hour"} & {*by}:
            sums = {key: summed(tally) for key, tally in expected(receipts, by, where).items()}
            assert ledger.queries.sums(by, where) == sums, (by, where)
        hours = {each.group: each.requests for each in ledger.queries.totals("hour", where)}
        found = ledger.queries.requests_by_hour(where)
        assert {iso_utc(start_ns)[:19] + "Z": requests for start_ns, requests in found.items()} == hours
    assert not [each for each in ledger.queries.verify() if "tally" in each]
    asyncio.run(ledger.stop())


def summed(tally: Tally) -> Sums:
    """Without its histograms."""
    return Sums(**{name: getattr(tally, name) for name in Sums.__struct_fields__})


@settings(max_examples=15, deadline=None)
@given(
    before=st.lists(closings, max_size=8),
    after=st.lists(
        st.one_of(
            st.tuples(st.just("close"), closings),
            st.tuples(st.just("late"), given_lines),
            st.just(("fold", None)),
            st.just(("fold some", None)),
        ),
        max_size=12,
    ),
    question=st.tuples(groups, filters),
    batch=st.integers(1, 4),
    folded=st.booleans(),
    kept=st.booleans(),
)
def test_tallies_take_in_what_an_older_version_wrote_bit_by_bit_and_count_it_once_all_the_while(
    before: list[dict[str, Any]],
    after: list[tuple[str, Any]],
    question: tuple[tuple[GroupBy, ...], ReceiptFilter],
    batch: int,
    folded: bool,
    kept: bool,
) -> None:
    """`kept`: a version that had tallies, without wide ones."""
    ledger = MemoryLedger()
    script: list[tuple[str, Any]] = [("close", facts) for facts in before]
    asyncio.run(play(ledger, [*script, *([("fold", None)] if folded else [])]))
    ledger._connection.execute("DELETE FROM tallies_wide")
    # As the migration leaves it: rollups go on, nothing is tallied.
    if not kept:
        ledger._connection.execute("DELETE FROM tallies")
        ledger._connection.execute(
            "UPDATE tally_progress SET since_ns = (SELECT coalesce(max(created_at_ns) + 1, -1 << 63) FROM receipts),"
            " raw_before_ns = (SELECT coalesce(max(created_at_ns) + 1, -1 << 63) FROM receipts)"
        )
    ledger._connection.execute(
        "UPDATE tally_progress SET wide_before_ns ="
        " (SELECT coalesce(max(start_ns) + 86400000000000, -1 << 63) FROM tallies WHERE span_s = 86400)"
    )
    receipts = [receipt_of(number, facts) for number, facts in enumerate(before)]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(tallies, "backfill", partial(tallies.backfill, most=batch))
        for verb, facts in [*after, *[("fold", None)] * 12]:
            if verb == "close":
                receipts.append(receipt_of(len(receipts), facts))
                asyncio.run(ledger.close(receipts[-1], ()))
            elif verb == "late" and receipts:
                place = len(receipts) // 2
                for facts_of_line in facts:
                    added = line_of(facts_of_line)
                    row = rows.line_row(receipts[place].id, len(receipts[place].lines), added)
                    asyncio.run(ledger.write(lambda connection, row=row: connection.execute(rows.INSERT_LINE, row)))  # type: ignore[misc]
                    receipts[place] = msgspec.structs.replace(receipts[place], lines=(*receipts[place].lines, added))
            elif verb == "fold":
                asyncio.run(ledger.checkpoint(Checkpoint(T0, (), ())))
            elif verb == "fold some":
                asyncio.run(ledger.write(partial(rollups.fold_some, most=2)))
            assert ledger.queries.tallies(*question) == expected(receipts, *question)
    assert tallies.is_complete(ledger._connection)
    assert tallies.wide_before_ns(ledger._connection) == -(2**63)
    assert not [each for each in ledger.queries.verify() if "tally" in each]
    asyncio.run(ledger.stop())


def test_tallies_outlive_the_detail_and_what_needs_detail_says_when_there_is_too_much(
    opened: Make, closed: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = MemoryLedger()
    for number in range(3):
        asyncio.run(ledger.close(closed(opened(number), accelerator=Accelerator()), ()))
    whole = ledger.queries.tallies(("feature",), ReceiptFilter())
    assert whole is not None
    assert whole[(None,)].requests == 3
    monkeypatch.setattr(tallies, "MOST_DETAIL", 2)
    assert ledger.queries.tallies(("user",), ReceiptFilter()) is None
    assert ledger.queries.tallies(("user",), ReceiptFilter(to_ns=T0 + 2)) is not None
    asyncio.run(ledger.write(partial(delete_expired, before_ns=T0 + 10)))
    assert ledger.queries.receipts(ReceiptFilter()).receipts == ()
    assert ledger.queries.tallies(("feature",), ReceiptFilter()) == whole
    assert ledger.queries.first_days_ns() == {None: T0}
    assert ledger.queries.verify() == []
    asyncio.run(ledger.stop())


def test_damage_to_a_tally_is_found(opened: Make, closed: Make) -> None:
    ledger = MemoryLedger()
    asyncio.run(ledger.close(closed(opened(1), accelerator=Accelerator()), ()))
    asyncio.run(ledger.checkpoint(Checkpoint(T0, (), ())))
    ledger._connection.execute("DELETE FROM tallies WHERE span_s = 86400")
    assert ledger.queries.verify() == [
        "the tally of 86400 s from 2026-01-01T00:00:00.000000Z isn't the rollup of that time"
    ]
    asyncio.run(ledger.stop())


@given(st.integers(0, 2**62))
def test_a_bucket_holds_its_value_within_a_thirty_second(value: int) -> None:
    low, high = bounds_of(bucket_of(value))
    assert low <= value < high
    assert abs((low + high - 1) // 2 - value) * 32 <= max(value, 0)
    assert bucket_of(high) == bucket_of(value) + 1


@given(st.lists(st.integers(0, 10**12), min_size=1, max_size=60), st.integers(1, 100), st.integers(0, 10**12))
def test_percentiles_and_shares_are_within_a_bucket_of_the_exact_ones(
    values: list[int], percent: int, bound: int
) -> None:
    histogram: dict[int, int] = {}
    for value in values:
        histogram[bucket_of(value)] = histogram.get(bucket_of(value), 0) + 1
    exact = sorted(values)[-(-percent * len(values) // 100) - 1]
    found = percentile(histogram, percent)
    assert found is not None
    assert abs(found - exact) * 32 <= exact
    low, high = bounds_of(bucket_of(bound))
    least, most = sum(value < low for value in values), sum(value < high for value in values)
    assert least <= count_at_most(histogram, bound) <= most


def test_nothing_counted_has_no_percentile() -> None:
    assert percentile({}, 50) is None
    assert count_at_most({}, 5) == 0
