"""After a crash: close what a dead gateway left open, from its last checkpoint, so that every account still balances.

Receipts become `interrupted`: their figures are estimates and their price is at most the hold. Of the time between
the last sight of a busy device and now, up to a second (the checkpoint's period) is lost, the rest down; what was
posted to receipts in that time stays served.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator
from decimal import Decimal

import msgspec

from millicent.core.accounts import DeviceSession, HourTime
from millicent.core.clock import NS_PER_S, hour_start_ns, hours_between
from millicent.core.money import ZERO, Money
from millicent.core.receipts import (
    METERS,
    RATE_KEY,
    Attempt,
    Energy,
    HourShare,
    Line,
    Meter,
    Receipt,
    Status,
    device_line,
)
from millicent.core.usage import Count, Leaf, Provenance, Usage, weakest
from millicent.ledger.reading import read_receipts, session_of, wall_covering
from millicent.ledger.store import close_receipt, write_session

_LOST_AT_MOST_NS = NS_PER_S
_FROM = "from the last checkpoint"
# What a running answer shows of its usage, and its price on the receipt.
_PRICES = {Leaf.INPUT_FRESH: "input", Leaf.INPUT_CACHE_READ: "input_cached", Leaf.OUTPUT_TEXT: "output"}
_ERROR = "the gateway ended before the answer did; figures are from its last checkpoint"


def unsettled_gateways(connection: sqlite3.Connection) -> list[str]:
    """Gateways, live or dead, with an open receipt or session."""
    found = connection.execute(
        "SELECT gateway FROM receipts WHERE status IS NULL UNION SELECT gateway FROM device_sessions WHERE NOT closed"
    )
    return [gateway for (gateway,) in found]


def recover(connection: sqlite3.Connection, gateway: str, now_ns: int) -> int:
    """Settle everything of a gateway that is gone; how many receipts that closed. Repeating it changes nothing."""
    open_ids = [
        receipt_id
        for (receipt_id,) in connection.execute(
            "SELECT id FROM receipts WHERE status IS NULL AND gateway = ?", (gateway,)
        )
    ]
    for receipt in read_receipts(connection, open_ids):
        shares = _shares(connection, receipt.id)
        close_receipt(connection, _interrupted(connection, receipt, shares, gateway, now_ns), shares, gateway)
    sessions = connection.execute("SELECT * FROM device_sessions WHERE NOT closed AND gateway = ?", (gateway,))
    sessions.row_factory = sqlite3.Row
    for session in [session_of(row) for row in sessions]:
        write_session(connection, _ended(connection, session, now_ns))
    return len(open_ids)


def _interrupted(
    connection: sqlite3.Connection, receipt: Receipt, shares: tuple[HourShare, ...], gateway: str, now_ns: int
) -> Receipt:
    estimated = {
        leaf: count if count.tokens is None else Count(count.tokens, Provenance.ESTIMATED)
        for leaf, count in receipt.usage.leaves.items()
    }
    # Priced by device time, or seen by the meter: then what wasn't checkpointed counts as nothing. Else what had come
    # is priced where tokens have prices; of the rest nobody knows.
    known = RATE_KEY in receipt.prices.snapshot or receipt.accelerator.provenance is not Provenance.UNKNOWN
    provenance = Provenance.ESTIMATED if known else Provenance.UNKNOWN
    return msgspec.structs.replace(
        receipt,
        status=Status.INTERRUPTED,
        settled_at_ns=max(now_ns, receipt.created_at_ns),
        usage=Usage(estimated),
        accelerator=msgspec.structs.replace(receipt.accelerator, provenance=provenance),
        energy=Energy(receipt.energy.joules, weakest((receipt.energy.provenance, Provenance.ESTIMATED))),
        lines=(
            *receipt.lines,
            *(
                _within_hold(receipt, _device_lines(connection, receipt, shares, gateway, now_ns))
                if known
                else _within_hold(receipt, _token_lines(receipt, now_ns)) or _unpriced(receipt, now_ns)
            ),
        ),
        attempts=tuple(_ended_attempt(attempt, now_ns) for attempt in receipt.attempts),
        error=_ERROR,
    )


def _ended_attempt(attempt: Attempt, now_ns: int) -> Attempt:
    if attempt.ended_at_ns is not None:
        return attempt
    ended_at_ns = max(now_ns, attempt.started_at_ns)
    return msgspec.structs.replace(attempt, ended_at_ns=ended_at_ns, status=Status.INTERRUPTED, error=_ERROR)


def _within_hold(receipt: Receipt, lines: Iterable[Line]) -> tuple[Line, ...]:
    """Together within what the hold leaves beside the lines that are there: the costs that the request came with, and
    earlier attempts."""
    left = receipt.hold
    if left is None:
        return tuple(lines)
    left = max(ZERO, left - Money.total(line.amount or ZERO for line in receipt.lines if line.book == "actual"))
    kept = []
    for line in lines:
        if line.amount is not None and line.amount > left:
            line = msgspec.structs.replace(line, amount=left, note=f"{_FROM}; reduced to the hold")  # noqa: PLW2901
        left -= line.amount or ZERO
        kept.append(line)
    return tuple(kept)


def _device_lines(
    connection: sqlite3.Connection, receipt: Receipt, shares: tuple[HourShare, ...], gateway: str, now_ns: int
) -> Iterator[Line]:
    """One accelerator line per attempt that ran, at the rate on the receipt or else the session's."""
    for attempt in receipt.attempts:
        if attempt.ended_at_ns is not None:
            continue
        own = [share for share in shares if share.attempt == attempt.ordinal]
        rate, provenance = _rate(connection, receipt, attempt, own, gateway)
        yield device_line(
            attempt.ordinal,
            attempt.role,
            sum(share.serving_ns for share in own),
            rate,
            provenance,
            incurred_at_ns=receipt.created_at_ns,
            posted_at_ns=max(now_ns, receipt.created_at_ns),
            note=_FROM,
        )


def _token_lines(receipt: Receipt, now_ns: int) -> list[Line]:
    """What had come of the only attempt, at the prices on the receipt; none where nothing had, or something has no
    price. Of a later attempt the last checkpoint may not know yet."""
    prices = receipt.prices.snapshot
    leaves = receipt.usage.leaves
    if len(receipt.attempts) != 1 or not receipt.usage.output_tokens or not all(leaf in _PRICES for leaf in leaves):
        return []
    attempt, paid = receipt.attempts[0], 1 - Decimal(prices.get("discount", "0"))
    charged = [(METERS[leaf], "token", count.tokens, _PRICES[leaf], -6) for leaf, count in leaves.items()]
    charged += [(Meter.REQUEST_FEE, "request", 1, "request_fee", 0)] if "request_fee" in prices else []
    lines = []
    for meter, unit, quantity, name, scale in charged:
        if name not in prices or quantity is None:
            return []
        each = Decimal(prices[name]).scaleb(scale) * paid
        lines.append(
            Line(
                attempt=attempt.ordinal,
                role=attempt.role,
                meter=meter,
                quantity=Decimal(quantity),
                unit=unit,
                unit_price_usd=each,
                amount=Money.price(quantity, each),
                provenance=Provenance.ESTIMATED,
                incurred_at_ns=attempt.started_at_ns,
                posted_at_ns=max(now_ns, receipt.created_at_ns),
            )
        )
    return [line for line in lines if line.quantity]


def _unpriced(receipt: Receipt, now_ns: int) -> Iterator[Line]:
    """Nobody knows what the attempt that ran has cost: where there are other lines, one says so, lest they pass for all
    of it."""
    for attempt in receipt.attempts if receipt.lines else ():
        if attempt.ended_at_ns is None:
            yield Line(
                attempt=attempt.ordinal,
                role=attempt.role,
                meter=Meter.OTHER,
                quantity=Decimal(1),
                unit="call",
                unit_price_usd=None,
                amount=None,
                provenance=Provenance.UNKNOWN,
                incurred_at_ns=attempt.started_at_ns,
                posted_at_ns=max(now_ns, receipt.created_at_ns),
                note="cut off by the gateway's end",
            )


def _rate(
    connection: sqlite3.Connection, receipt: Receipt, attempt: Attempt, shares: list[HourShare], gateway: str
) -> tuple[Decimal | None, Provenance]:
    """Dollars per accelerator-hour, and how a price that rests on them is known."""
    found = connection.execute(
        "SELECT usd_per_hour, rate_provenance FROM device_sessions"
        " WHERE id = ? OR (gateway = ? AND placement = ?) ORDER BY id = ? DESC, seen_at_ns DESC LIMIT 1",
        (shares[0].session if shares else "", gateway, attempt.placement, shares[0].session if shares else ""),
    ).fetchone()
    session_rate, known = found or (None, Provenance.ESTIMATED)
    rate = receipt.prices.snapshot.get(RATE_KEY, session_rate)
    if rate is None:
        return None, Provenance.UNKNOWN
    return Decimal(rate), weakest((Provenance.ESTIMATED, Provenance(known)))


def _shares(connection: sqlite3.Connection, receipt_id: str) -> tuple[HourShare, ...]:
    found = connection.execute(
        "SELECT attempt, session, hour_ns, serving_ns FROM device_time WHERE receipt = ?", (receipt_id,)
    )
    return tuple(HourShare(*row) for row in found)


def _ended(connection: sqlite3.Connection, session: DeviceSession, now_ns: int) -> DeviceSession:
    """The session closed now, with the time since it was last seen split into lost and down."""
    until_ns = max(now_ns, session.seen_at_ns)
    lost_left = _LOST_AT_MOST_NS * session.accelerators if session.busy else 0
    gap = dict(hours_between(session.seen_at_ns, until_ns))
    last_ns = hour_start_ns(session.seen_at_ns)
    written = connection.execute(
        "SELECT hour_ns FROM device_hours WHERE session = ? AND hour_ns >= ?", (session.id, last_ns)
    )
    hours = []
    for hour_ns in sorted({*gap, *(hour_ns for (hour_ns,) in written)}):
        hour, serving_ns, served_since_ns = _hour(connection, session, hour_ns)
        gap_ns = gap.get(hour_ns, 0)
        unserved_ns = max(0, gap_ns * session.accelerators - served_since_ns)
        lost_ns = min(lost_left, unserved_ns)
        lost_left -= lost_ns
        hour = msgspec.structs.replace(
            hour,
            wall_ns=hour.wall_ns + gap_ns,
            lost_ns=hour.lost_ns + lost_ns,
            down_ns=hour.down_ns + unserved_ns - lost_ns,
        )
        hours.append(msgspec.structs.replace(hour, wall_ns=wall_covering(hour, serving_ns, session.accelerators)))
    return msgspec.structs.replace(session, seen_at_ns=until_ns, closed=True, hours=tuple(hours))


def _hour(connection: sqlite3.Connection, session: DeviceSession, hour_ns: int) -> tuple[HourTime, int, int]:
    """What is written of the hour, its serving time, and how much of that was served since the session was seen:
    at least what doesn't fit before."""
    found = connection.execute(
        "SELECT wall_ns, overhead_ns, lost_ns, down_ns, serving_ns, seen_serving_ns FROM device_hours"
        " WHERE session = ? AND hour_ns = ?",
        (session.id, hour_ns),
    ).fetchone()
    wall_ns, overhead_ns, lost_ns, down_ns, serving_ns, seen_serving_ns = found or (0, 0, 0, 0, 0, 0)
    excess_ns = serving_ns + overhead_ns + lost_ns + down_ns - wall_ns * session.accelerators
    since_ns = max(serving_ns - seen_serving_ns, excess_ns)
    return HourTime(hour_ns, wall_ns, overhead_ns, lost_ns, down_ns), serving_ns, since_ns
