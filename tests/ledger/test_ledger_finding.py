"""Receipts are found whatever is asked for, however few match, and without reading the rest."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millicent.core.accounts import Checkpoint
from millicent.core.clock import NS_PER_S, ManualClock
from millicent.core.receipts import Receipt, Status
from millicent.core.request import Attribution
from millicent.ledger import finding, rollups
from millicent.ledger.maintenance import delete_expired
from millicent.ledger.memory import MemoryLedger
from millicent.ledger.queries import ReceiptFilter

T0 = ManualClock().now_ns()
DAY_NS = 86_400 * NS_PER_S

names = st.sampled_from([None, None, "a", "b"])
# Months apart, days apart, and within one quarter-hour.
instants = st.builds(
    lambda days, seconds, rest: T0 - days * DAY_NS - seconds * NS_PER_S + rest,
    st.sampled_from([0, 0, 1, 2, 40, 200]),
    st.sampled_from([0, 1, 899, 900, 40_000]),
    st.integers(0, 2),
)
requests = st.fixed_dictionaries(
    {
        "created_at_ns": instants,
        "attribution": st.builds(Attribution, key=names, team=names, user=names, feature=names, tier=names, run=names),
        "model": st.sampled_from(["m", "n"]),
        "placement": st.sampled_from([None, "p"]),
        "status": st.sampled_from([None, *Status]),
    }
)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("request"), requests),
        st.tuples(st.just("request"), requests),
        st.just(("fold", None)),
        st.just(("fold some", None)),
        st.tuples(st.just("delete"), instants),
    ),
    max_size=25,
)
some = st.sampled_from([None, None, "a", "nobody", ""])
filters = st.builds(
    ReceiptFilter,
    user=some,
    feature=some,
    tier=some,
    key=st.sampled_from([None, None, "b"]),
    run=st.sampled_from([None, None, None, "a", ""]),
    model=st.sampled_from([None, None, "m", "other"]),
    placement=st.sampled_from([None, None, "p", ""]),
    status=st.sampled_from([None, None, "succeeded", "refused", "running"]),
    from_ns=st.one_of(st.none(), instants),
    to_ns=st.one_of(st.none(), instants),
)


def asked(number: int, **facts: Any) -> Receipt:
    return Receipt(id=f"rcpt_{number:04d}", dialect="openai", stream=False, **facts)


def matching(receipts: list[Receipt], where: ReceiptFilter) -> list[str]:
    """The same from the receipts themselves: newest first."""
    wanted = {name: value for name, value in msgspec.structs.asdict(where).items() if value is not None}
    low, high = wanted.pop("from_ns", -(2**63)), wanted.pop("to_ns", 2**63)
    found = []
    for receipt in receipts:
        named = msgspec.structs.asdict(receipt.attribution) | {
            "model": receipt.model,
            "placement": receipt.placement,
            "status": "running" if receipt.status is None else receipt.status.value,
        }
        if low <= receipt.created_at_ns < high and all((named[n] or "") == value for n, value in wanted.items()):
            found.append((receipt.created_at_ns, receipt.id))
    return [receipt_id for _, receipt_id in sorted(found, reverse=True)]


def paged(ledger: MemoryLedger, where: ReceiptFilter, limit: int) -> list[str]:
    """Page after page."""
    found: list[str] = []
    after = None
    while True:
        page = ledger.queries.receipts(where, limit=limit, after=after)
        found += [receipt.id for receipt in page.receipts]
        after = page.next
        if after is None:
            return found


async def play(ledger: MemoryLedger, script: list[tuple[str, Any]]) -> list[Receipt]:
    receipts: list[Receipt] = []
    for verb, facts in script:
        if verb == "request":
            status = facts["status"]
            receipt = asked(len(receipts), **{**facts, "status": None})
            await ledger.open(receipt)
            if status is not None:
                receipt = msgspec.structs.replace(receipt, status=status, settled_at_ns=receipt.created_at_ns + 1)
                await ledger.close(receipt, ())
            receipts.append(receipt)
        elif verb == "fold":
            await ledger.checkpoint(Checkpoint(T0, (), ()))
        elif verb == "fold some":
            await ledger.write(partial(rollups.fold_some, most=2))
        else:
            await ledger.write(partial(delete_expired, before_ns=facts))
            kept = {each.id for each in ledger.queries.receipts(ReceiptFilter(), limit=99).receipts}
            receipts = [each for each in receipts if each.id in kept]
    return receipts


@settings(max_examples=80, deadline=None)
@given(script=steps, questions=st.lists(st.tuples(filters, st.integers(1, 3)), min_size=3, max_size=8))
def test_pages_hold_every_receipt_that_matches_once_and_newest_first_whatever_is_folded(
    script: list[tuple[str, Any]], questions: list[tuple[ReceiptFilter, int]]
) -> None:
    ledger = MemoryLedger()
    receipts = asyncio.run(play(ledger, script))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(finding, "_LOOKED_THROUGH", 2)
        for where, limit in questions:
            assert paged(ledger, where, limit) == matching(receipts, where), where
    asyncio.run(ledger.stop())


@pytest.mark.parametrize(
    "where",
    [
        ReceiptFilter(status="refused"),
        ReceiptFilter(model="rare"),
        ReceiptFilter(placement="rare"),
        ReceiptFilter(feature=""),
        ReceiptFilter(user="u", status="failed"),
        ReceiptFilter(feature="f", user="rare"),
    ],
)
def test_a_rare_receipt_is_found_without_reading_the_others(
    where: ReceiptFilter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 400 receipts over 100 days, one matches, the oldest. SQLite counts its steps: reading them all takes
    thousands."""
    ledger = MemoryLedger()
    rare: dict[str, Any] = {
        "attribution": Attribution(user=where.user or "u", feature=None if where.feature == "" else "f"),
        "model": where.model or "m",
        "placement": where.placement or "p",
        "status": Status(where.status or "succeeded"),
    }
    common: dict[str, Any] = {"attribution": Attribution(user="u", feature="f"), "model": "m", "placement": "p"} | {
        "status": Status.SUCCEEDED
    }

    async def write() -> None:
        for number in range(400):
            at_ns = T0 + number * DAY_NS // 4
            await ledger.close(
                asked(number, created_at_ns=at_ns, settled_at_ns=at_ns + 1, **(common if number else rare)), ()
            )
        await ledger.checkpoint(Checkpoint(T0, (), ()))

    asyncio.run(write())
    monkeypatch.setattr(finding, "_LOOKED_THROUGH", 10)
    steps = 0

    def count() -> int:
        nonlocal steps
        steps += 1
        return 0

    def ask(connection: Any) -> int:
        connection.set_progress_handler(count, 1)
        condition = " AND ".join(f"ifnull({name}, '') = ?" for name in filled)
        found = finding.newest(connection, filled, condition, [*filled.values()], -(2**63), 2**63 - 1, 51)
        assert len(found) == 1
        everything = steps
        connection.execute(f"SELECT id FROM receipts WHERE {condition}", [*filled.values()]).fetchall()
        return everything

    filled = {name: value for name, value in msgspec.structs.asdict(where).items() if value is not None}
    taken = ledger.queries.ask(ask)
    assert taken is not None
    assert taken < steps - taken
    asyncio.run(ledger.stop())
