"""What requests took, kept beside the rollups: a `Tally` per quarter-hour, hour, day and eight days (UTC), feature and
model.

Folding a receipt into the rollups takes it in here too, so that both hold the same receipts, whatever is deleted later.
"""

# ruff: noqa: S608 - every name in the SQL is ours; values are parameters

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from decimal import Decimal
from typing import Any, TypeVar

import msgspec

from millicent.core.clock import iso_utc
from millicent.core.tallies import Sums, Tally, add_to, add_up, bucket_of
from millicent.ledger.spans import DAY_S, HOUR_S, LEAST, QUARTER_NS, QUARTER_S, WIDE_S, down, newest_from_ns, pieces, up

SPANS_S = (QUARTER_S, HOUR_S, DAY_S, WIDE_S)
ROLLED = frozenset({"feature", "model"})
# Receipts read one by one for a question that no tally answers: some tenths of a second.
MOST_DETAIL = 10_000
# Receipts of an older version that one checkpoint takes in.
_BACKFILL = 2_000

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Tally)
# What isn't in a struct is skipped, and costs next to nothing.
_decoders: dict[type[Sums], msgspec.msgpack.Decoder[Any]] = {Sums: msgspec.msgpack.Decoder(Sums), Tally: _decoder}
_lines_decoder = msgspec.json.Decoder(list[tuple[int, str, str, int | None]])


class _Leaf(msgspec.Struct):
    tokens: int | None


class _Usage(msgspec.Struct):
    leaves: dict[str, _Leaf] = {}


_usage_decoder = msgspec.json.Decoder(_Usage)

_FIGURES = """
    r.created_at_ns, r.status, r.stream, r.usage, r.queue_ns, r.ttft_ns, r.tpot_ns, r.total_ns, r.prefill_ns,
    r.decode_ns, r.joules, coalesce(json_extract(r.policy, '$.routing') IS NOT NULL, 0),
    json_extract(r.policy, '$.response_cache'),
    (SELECT json_group_array(json_array(l.ordinal, l.role, l.meter, l.amount_nanousd)) FROM lines AS l
        WHERE l.receipt = r.id AND l.book = 'actual')
"""
Row = tuple[object, ...]
Kind = TypeVar("Kind", bound=Sums)
# A quarter-hour, a feature and a model.
Place = tuple[int, str, str]
_SPAN = ("span_s", "start_ns", "feature", "model")
# What to count: whose, its figures, which of its lines, and whether it is added (1) or taken off (-1).
Difference = tuple[Sequence[str], Row, int | None, int]


def fold(connection: sqlite3.Connection, last: str) -> None:
    """Take in what is noted in `unrolled` up to this receipt, and will be taken off it."""
    noted = _unrolled(("feature", "model"), "u.receipt <= ? AND r.created_at_ns >= ?")
    quarters = _counted(_differences(connection.execute(noted, (last, raw_before_ns(connection))), 2))
    _add(connection, "tallies_pending", ("quarter_ns", "feature", "model"), quarters)


def spread(connection: sqlite3.Connection, before_ns: int, most: int) -> bool:
    """Move so many pending tallies, oldest first, of quarter-hours before this to all spans; whether there were any."""
    found = connection.execute(
        "SELECT quarter_ns, feature, model, tally FROM tallies_pending WHERE quarter_ns < ?"
        " ORDER BY quarter_ns, feature, model LIMIT ?",
        (before_ns, most),
    ).fetchall()
    quarters = {row[:3]: _decoder.decode(row[3]) for row in found}
    connection.executemany(
        "DELETE FROM tallies_pending WHERE quarter_ns = ? AND feature = ? AND model = ?", [*quarters]
    )
    _add_to_spans(connection, quarters)
    return bool(found)


def backfill(connection: sqlite3.Connection, most: int = _BACKFILL) -> None:
    """Take in the newest receipts of an older version. What is noted in `unrolled` is taken in, or changed, from there:
    once it is no longer beyond what this has reached."""
    before_ns = raw_before_ns(connection)
    if before_ns == LEAST:
        return
    from_ns = newest_from_ns(connection, before_ns, most)
    old = (
        f"SELECT ifnull(r.feature, ''), r.model, {_FIGURES}, u.lines, u.receipt IS NOT NULL AND u.lines IS NULL"
        " FROM receipts AS r LEFT JOIN unrolled AS u ON u.receipt = r.id"
        " WHERE r.created_at_ns >= ? AND r.created_at_ns < ? AND r.status IS NOT NULL"
    )
    rows = connection.execute(old, (from_ns, before_ns)).fetchall()
    _add_to_spans(connection, _counted((row[:2], row[2:-2], row[-2], 1) for row in rows if not row[-1]))
    connection.execute("UPDATE tally_progress SET raw_before_ns = ?", (from_ns,))


def widen(connection: sqlite3.Connection) -> None:
    """Take the newest day that isn't in the wide tallies into them: of an older version's."""
    before_ns = wide_before_ns(connection)
    if before_ns == LEAST:
        return
    (day_ns,) = connection.execute(
        "SELECT max(start_ns) FROM tallies WHERE span_s = ? AND start_ns < ?", (DAY_S, before_ns)
    ).fetchone()
    days = connection.execute(
        "SELECT feature, model, tally FROM tallies WHERE span_s = ? AND start_ns = ?", (DAY_S, day_ns)
    ).fetchall()
    wide = {(WIDE_S, down(day_ns, WIDE_S), *place): _decoder.decode(tally) for *place, tally in days}
    _add(connection, "tallies_wide", _SPAN, wide)
    connection.execute("UPDATE tally_progress SET wide_before_ns = ?", (LEAST if day_ns is None else day_ns,))


def wide_before_ns(connection: sqlite3.Connection) -> int:
    """Days that began before this are not in the wide tallies yet."""
    (before_ns,) = connection.execute("SELECT wide_before_ns FROM tally_progress").fetchone()
    return int(before_ns)


def raw_before_ns(connection: sqlite3.Connection) -> int:
    (before_ns,) = connection.execute("SELECT raw_before_ns FROM tally_progress").fetchone()
    return int(before_ns)


def is_complete(connection: sqlite3.Connection) -> bool:
    return raw_before_ns(connection) == LEAST


def first_days_ns(connection: sqlite3.Connection) -> dict[str, int]:
    """When the first day began on which each feature was asked for, '' for none."""
    found = connection.execute(
        f"SELECT feature, min(at_ns) FROM (SELECT feature, min(start_ns) AS at_ns FROM tallies WHERE span_s = {DAY_S}"
        " GROUP BY feature UNION ALL SELECT feature, min(quarter_ns) FROM tallies_pending GROUP BY feature"
        " UNION ALL SELECT ifnull(feature, ''), min(created_at_ns) FROM unrolled AS u"
        " CROSS JOIN receipts AS r ON r.id = u.receipt GROUP BY feature) GROUP BY feature"
    )
    return {feature: down(at_ns, DAY_S) for feature, at_ns in found}


def read(
    kind: type[Kind],
    connection: sqlite3.Connection,
    by: Sequence[str],
    fixed: Mapping[str, str],
    from_ns: int,
    to_ns: int,
    label_of: Callable[[int], str] | None,
    coarsest_s: int,
    requests: int = 0,
) -> dict[tuple[str, ...], Kind] | None:
    """Tallies, or their sums alone, by these columns, and by time where there is a label for it, which then comes last.
    `fixed` columns must have a value, '' for none. Features and models are read from tallies, what else there is from
    up to `MOST_DETAIL` receipts: None where there are more."""
    found: dict[tuple[str, ...], Kind] = {}
    decode = _decoders[kind].decode

    def into(members: Sequence[str], at_ns: int) -> Kind:
        key = (*members, *(() if label_of is None else (label_of(at_ns),)))
        tally = found.get(key)
        if tally is None:
            tally = found[key] = kind()
        return tally

    parts = ["1"]
    values: list[object] = []
    for name, value in fixed.items():
        parts.append(f"ifnull(r.{name}, '') = ?" if value == "" else f"r.{name} = ?")
        values.append(value)
    condition = " AND ".join(parts)
    if not {*by, *fixed} <= ROLLED:
        if requests > MOST_DETAIL:
            return None
        return found if _detail(connection, by, condition, values, from_ns, to_ns, into, MOST_DETAIL) else None
    rolled_ns = min(max(from_ns, up(raw_before_ns(connection), QUARTER_S)), to_ns)
    first, last = up(rolled_ns, QUARTER_S), down(to_ns, QUARTER_S)
    if first >= last:
        _detail(connection, by, condition, values, from_ns, to_ns, into)
        return found
    _detail(connection, by, condition, values, from_ns, first, into)
    _detail(connection, by, condition, values, last, to_ns, into)
    for start_ns, packed, *those in _kept(connection, by, fixed, first, last, label_of, coarsest_s):
        into(those, start_ns).add(decode(packed))
    noted = _unrolled(by, f"r.created_at_ns >= ? AND r.created_at_ns < ? AND {condition}")
    for members, figures, before, sign in _differences(connection.execute(noted, (first, last, *values)), len(by)):
        _count(into(members, figures[0]), figures, before, sign)  # type: ignore[arg-type]
    return found


def _kept(
    connection: sqlite3.Connection,
    by: Sequence[str],
    fixed: Mapping[str, str],
    first: int,
    last: int,
    label_of: Callable[[int], str] | None,
    coarsest_s: int,
) -> Iterator[tuple[Any, ...]]:
    """What is kept of whole quarter-hours: when it began, the packed tally, and its columns. An hour in which a day of
    the label's begins is read by its quarters."""
    wanted = " AND ".join(["start_ns >= ?", "start_ns < ?", *(f"{name} = ?" for name in fixed)])
    columns = ", ".join(("start_ns", "tally", *by))
    usable_s = [span_s for span_s in SPANS_S if span_s <= coarsest_s]
    wide_ns = min(max(first, up(wide_before_ns(connection), WIDE_S)), last)
    whole = [*pieces([s for s in usable_s if s < WIDE_S], first, wide_ns), *pieces(usable_s, wide_ns, last)]
    cut: set[int] = set()
    for span_s, *part in whole:
        sql = f"SELECT {columns} FROM {_table(span_s)} WHERE span_s = ? AND {wanted}"
        for row in connection.execute(sql, (span_s, *part, *fixed.values())):
            if span_s == HOUR_S and label_of and label_of(row[0]) != label_of(row[0] + 3 * QUARTER_NS):
                cut.add(row[0])
            else:
                yield row
    sql = f"SELECT {columns} FROM tallies WHERE span_s = ? AND {wanted}"
    for start_ns in cut:
        yield from connection.execute(sql, (QUARTER_S, start_ns, start_ns + 4 * QUARTER_NS, *fixed.values()))
    pending = "(SELECT quarter_ns AS start_ns, * FROM tallies_pending)"
    yield from connection.execute(f"SELECT {columns} FROM {pending} WHERE {wanted}", (first, last, *fixed.values()))


def problems(connection: sqlite3.Connection) -> list[str]:
    """Times at which tallies and rollups, which are folded together, hold other requests or another cost."""
    since_ns, raw_ns = connection.execute("SELECT since_ns, raw_before_ns FROM tally_progress").fetchone()
    (rolled_ns,) = connection.execute("SELECT raw_before_ns FROM rollup_progress").fetchone()
    from_ns = up(max(since_ns, raw_ns, rolled_ns), DAY_S)
    wide_ns = up(max(from_ns, wide_before_ns(connection)), WIDE_S)
    tallied: dict[tuple[int, int], list[int]] = {}
    for span_s, start_ns, packed in connection.execute(
        "SELECT span_s, start_ns, tally FROM tallies WHERE start_ns >= ? UNION ALL"
        " SELECT span_s, start_ns, tally FROM tallies_wide UNION ALL"
        " SELECT 0, quarter_ns, tally FROM tallies_pending WHERE quarter_ns >= ?",
        (from_ns, from_ns),
    ):
        tally = _decoder.decode(packed)
        for each_s in (span_s,) if span_s else SPANS_S:
            have = tallied.setdefault((down(start_ns, each_s), each_s), [0, 0])
            have[0] += tally.requests
            have[1] += tally.cost_nanousd
    rolled: dict[tuple[int, int], list[int]] = {}
    for start_ns, requests, nanousd in connection.execute(
        "SELECT start_ns, requests, cost_nanousd FROM rollups JOIN rollup_groups AS g ON g.id = grouped"
        " WHERE cube = 'time' AND span_s = ? AND start_ns >= ? UNION ALL"
        " SELECT quarter_ns, requests, cost_nanousd FROM rollups_pending WHERE quarter_ns >= ?",
        (QUARTER_S, from_ns, from_ns),
    ):
        for span_s in SPANS_S:
            have = rolled.setdefault((down(start_ns, span_s), span_s), [0, 0])
            have[0] += requests
            have[1] += nanousd
    return [
        f"the tally of {span_s} s from {iso_utc(start_ns)} isn't the rollup of that time"
        for start_ns, span_s in sorted({*tallied, *rolled})
        if (span_s < WIDE_S or start_ns >= wide_ns)
        and tallied.get((start_ns, span_s), [0, 0]) != rolled.get((start_ns, span_s), [0, 0])
    ]


def _detail(
    connection: sqlite3.Connection,
    by: Sequence[str],
    condition: str,
    values: Sequence[object],
    from_ns: int,
    to_ns: int,
    into: Callable[[Sequence[str], int], Sums],
    most: int = -1,
) -> bool:
    """Receipts one by one; False where there are more than so many, of which some were taken."""
    if from_ns >= to_ns:
        return True
    columns = "".join(f"ifnull(r.{name}, ''), " for name in by)
    sql = (
        f"SELECT {columns}{_FIGURES} FROM receipts AS r WHERE r.created_at_ns >= ? AND r.created_at_ns < ?"
        f" AND r.status IS NOT NULL AND {condition} LIMIT ?"
    )
    limit = -1 if most < 0 else most + 1
    for count, row in enumerate(connection.execute(sql, (from_ns, to_ns, *values, limit)), start=1):
        if count == limit:
            return False
        _count(into(row[: len(by)], row[len(by)]), row[len(by) :])
    return True


def _unrolled(by: Sequence[str], condition: str) -> str:
    """What the tallies lack: a receipt's figures, then how many of its lines they hold, NULL for nothing of it."""
    columns = "".join(f"ifnull(r.{name}, ''), " for name in by)
    return (
        f"SELECT {columns}{_FIGURES}, u.lines FROM unrolled AS u CROSS JOIN receipts AS r ON r.id = u.receipt"
        f" WHERE {condition}"
    )


def _differences(rows: Iterable[Row], members: int) -> Iterator[Difference]:
    for row in rows:
        key, figures, lines = row[:members], row[members:-1], row[-1]
        yield key, figures, None, 1  # type: ignore[misc]
        if lines is not None:
            yield key, figures, lines, -1  # type: ignore[misc]


def _counted(added: Iterable[Difference]) -> dict[Place, Tally]:
    """By quarter-hour, feature and model."""
    quarters: dict[Place, Tally] = {}
    for (feature, model), figures, before, sign in added:
        place = (down(figures[0], QUARTER_S), feature, model)  # type: ignore[arg-type]
        tally = quarters.get(place)
        if tally is None:
            tally = quarters[place] = Tally()
        _count(tally, figures, before, sign)
    return quarters


def _add_to_spans(connection: sqlite3.Connection, quarters: Mapping[Place, Tally]) -> None:
    wide_ns = wide_before_ns(connection)
    for span_s in SPANS_S:
        sums: dict[tuple[int, int, str, str], Tally] = {}
        for (start_ns, feature, model), tally in quarters.items():
            if span_s < WIDE_S or start_ns >= wide_ns:
                sums.setdefault((span_s, down(start_ns, span_s), feature, model), Tally()).add(tally)
        _add(connection, _table(span_s), _SPAN, sums)


def _table(span_s: int) -> str:
    return "tallies_wide" if span_s == WIDE_S else "tallies"


def _add(
    connection: sqlite3.Connection,
    table: str,
    key: Sequence[str],
    sums: Mapping[Place, Tally] | Mapping[tuple[int, int, str, str], Tally],
) -> None:
    """To those that are in the table."""
    where = " AND ".join(f"{name} = ?" for name in key)
    for place, tally in sums.items():
        kept = connection.execute(f"SELECT tally FROM {table} WHERE {where}", place).fetchone()
        if kept is not None:
            tally.add(_decoder.decode(kept[0]))
        connection.execute(
            f"INSERT OR REPLACE INTO {table} VALUES ({'?, ' * len(key)}?)", (*place, _encoder.encode(tally))
        )


def _count(tally: Sums, figures: Row, before: int | None = None, sign: int = 1) -> None:
    """Add one receipt to the tally, or take it off again with a sign of -1; with only its lines before that ordinal,
    where one is given."""
    _, status, stream, usage, *took, prefill_ns, decode_ns, joules, routed, cache, lines = figures
    given = _lines_decoder.decode(lines)  # type: ignore[arg-type]
    if before is not None:
        given = [line for line in given if line[0] < before]
    leaves = _usage_decoder.decode(usage).leaves  # type: ignore[arg-type]
    tokens = {leaf: each.tokens for leaf, each in leaves.items() if each.tokens}
    tally.requests += sign
    tally.routed += sign * int(routed)  # type: ignore[call-overload]
    if cache == "hit":
        tally.cache_hits += sign
    else:
        tally.cache_misses += sign * (cache == "miss")
        add_up(tally.tokens, tokens, sign)
    if joules is not None:
        tally.measured += sign
        tally.energy_uj += sign * int(Decimal(joules).scaleb(6))  # type: ignore[arg-type]
    whole = tally if isinstance(tally, Tally) else None
    if whole is not None and status == "succeeded":
        if (waited_ns := took[1 if stream else 3]) is not None:
            add_to(whole.wait, bucket_of(waited_ns), sign)  # type: ignore[arg-type]
        for histogram, took_ns in zip((whole.queue, whole.ttft, whole.tpot, whole.total), took, strict=True):
            if took_ns is not None and cache != "hit":
                add_to(histogram, bucket_of(took_ns), sign)  # type: ignore[arg-type]
    if given and all(amount is not None for *_, amount in given):
        tally.priced += sign
        tally.prefill_ns += sign * prefill_ns  # type: ignore[operator]
        tally.decode_ns += sign * decode_ns  # type: ignore[operator]
        add_up(tally.priced_tokens, _of_hit(tokens) if cache == "hit" else tokens, sign)
        cost = 0
        for _, role, meter, amount in given:
            add_to(tally.nanousd, f"{role} {meter}", sign * (amount or 0))
            cost += amount or 0
        if whole is not None:
            add_to(whole.cost, bucket_of(cost), sign)


def _of_hit(tokens: Mapping[str, int]) -> dict[str, int]:
    """Tokens that nobody computed and nobody paid for."""
    sides = {
        side: sum(count for leaf, count in tokens.items() if leaf.startswith(side)) for side in ("input", "output")
    }
    return {f"{side}_hit": count for side, count in sides.items() if count}
