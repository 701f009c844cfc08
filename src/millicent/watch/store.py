"""The room's tables in the ledger. What one evaluation found is written in one transaction, by the one gateway that
claims it; reading never waits."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from millicent.core.clock import NS_PER_HOUR, NS_PER_S
from millicent.core.identifiers import Ids
from millicent.watch.burn import Target
from millicent.watch.findings import Cause, Finding, Subject
from millicent.watch.series import SeriesState

_DAY_NS = 24 * NS_PER_HOUR
# What is found each minute is over when it wasn't found for this long.
_SETTLING_NS = 15 * 60 * NS_PER_S
# A series that nobody asks for any more is forgotten; what is resolved stays for a year.
_FORGET_SERIES_NS = 35 * _DAY_NS
_FORGET_TARGETS_NS = 2 * _DAY_NS
_FORGET_ALERTS_NS = 365 * _DAY_NS

_subject_columns = "rule, kind, figure, dimension, member"
_causes = msgspec.json.Decoder(tuple[Cause, ...])
_states = msgspec.msgpack.Decoder(SeriesState)

SeriesName = tuple[str, str, str, str]


_SEEN = """
UPDATE alerts SET seen_at_ns = :at_ns, title = iif(:title = '', title, :title), facts = iif(:value = '', facts, :facts),
    peak = iif(:size > peak_size, :value, peak), peak_size = max(:size, peak_size)
WHERE (rule, kind, figure, dimension, member) = (:rule, :kind, :figure, :dimension, :member) AND resolved_at_ns IS NULL
"""
_MADE = """
INSERT INTO alerts VALUES (:id, :rule, :kind, :figure, :dimension, :member, :title, :facts, :causes, :since_ns, :at_ns,
    :at_ns, NULL, :told, :value, :value, :size, :receipts)
"""
# What there is to tell of an alert.
_NOTHING, _END_LATER, _BEGINNING, _END = range(4)


class Alert(msgspec.Struct, frozen=True):
    """One thing that was noticed, as it stood when it was last seen; `opened_with` and `peak` are what was watched at
    first and at worst. `receipts` are the filters of those under it. Open while `resolved_at_ns` is None."""

    id: str
    subject: Subject
    title: str
    facts: dict[str, str]
    causes: tuple[Cause, ...]
    since_ns: int
    opened_at_ns: int
    seen_at_ns: int
    resolved_at_ns: int | None
    opened_with: str
    peak: str
    receipts: dict[str, str]


class Look(msgspec.Struct, frozen=True):
    """What was found as things stood then. `kinds` are those that were looked at: what is open of these, and not found,
    is over. What wasn't looked at in time, `late`, is written down and not told."""

    at_ns: int
    kinds: frozenset[str]
    findings: Sequence[Finding]
    late: bool = False


class Evaluation(msgspec.Struct, kw_only=True):
    """Looks in order, and what was learned on the way."""

    what: str
    before_ns: int
    through_ns: int
    at_ns: int
    rules: frozenset[str]
    looks: list[Look]
    series: dict[SeriesName, SeriesState] = {}
    targets: list[Target] = []


class Changes(msgspec.Struct, frozen=True):
    """What is to be told now: what an evaluation opened and ended, and what waited for a rule that was quiet."""

    opened: tuple[Alert, ...]
    resolved: tuple[Alert, ...]


def through_ns(connection: sqlite3.Connection, what: str) -> int | None:
    found = connection.execute("SELECT through_ns FROM watch_progress WHERE what = ?", (what,)).fetchone()
    return None if found is None else int(found[0])


def read_series(connection: sqlite3.Connection) -> dict[SeriesName, SeriesState]:
    rows = connection.execute("SELECT rule, figure, dimension, member, state FROM watch_series")
    return {(rule, figure, dimension, member): _states.decode(state) for rule, figure, dimension, member, state in rows}


def read_targets(connection: sqlite3.Connection, from_ns: int) -> list[Target]:
    rows = connection.execute("SELECT * FROM watch_targets WHERE quarter_ns >= ?", (from_ns,))
    return [Target(*row) for row in rows]


def open_subjects(connection: sqlite3.Connection) -> set[Subject]:
    rows = connection.execute(f"SELECT {_subject_columns} FROM alerts WHERE resolved_at_ns IS NULL")  # noqa: S608 - our own names
    return {Subject(*row) for row in rows}


def read_alerts(connection: sqlite3.Connection, *, only_open: bool = False, limit: int = 100) -> list[Alert]:
    """Open ones first, then the newest."""
    where = "resolved_at_ns IS NULL" if only_open else "1"
    order = "resolved_at_ns IS NOT NULL, opened_at_ns DESC, id DESC"
    return _alerts(connection, f"SELECT * FROM alerts WHERE {where} ORDER BY {order} LIMIT ?", (limit,))  # noqa: S608 - our own text


def read_alert(connection: sqlite3.Connection, alert_id: str) -> Alert | None:
    found = _alerts(connection, "SELECT * FROM alerts WHERE id = ?", (alert_id,))
    return found[0] if found else None


def _alerts(connection: sqlite3.Connection, sql: str, values: Sequence[object]) -> list[Alert]:
    cursor = connection.execute(sql, values)
    names = [column[0] for column in cursor.description]
    return [_alert(dict(zip(names, row, strict=True))) for row in cursor]


def _alert(row: Mapping[str, Any]) -> Alert:
    return Alert(
        id=row["id"],
        subject=Subject(row["rule"], row["kind"], row["figure"], row["dimension"], row["member"]),
        title=row["title"],
        facts=msgspec.json.decode(row["facts"], type=dict[str, str]),
        causes=_causes.decode(row["causes"]),
        since_ns=row["since_ns"],
        opened_at_ns=row["opened_at_ns"],
        seen_at_ns=row["seen_at_ns"],
        resolved_at_ns=row["resolved_at_ns"],
        opened_with=row["opened_with"],
        peak=row["peak"],
        receipts=msgspec.json.decode(row["receipts"], type=dict[str, str]),
    )


def commit(connection: sqlite3.Connection, found: Evaluation, ids: Ids, quiet: Iterable[str] = ()) -> Changes | None:
    """Write what was found; None where another gateway was first, and nothing is written. Nothing of `quiet` rules and
    those that are muted is to be told: what still goes on once they are neither is told then."""
    claimed = connection.execute(
        "INSERT INTO watch_progress VALUES (?, ?) ON CONFLICT DO UPDATE SET through_ns = excluded.through_ns"
        " WHERE through_ns = ?",
        (found.what, found.through_ns, found.before_ns),
    )
    if claimed.rowcount == 0:
        return None
    connection.executemany(
        "INSERT INTO watch_series VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET state = excluded.state,"
        " seen_at_ns = excluded.seen_at_ns",
        [(*name, msgspec.msgpack.encode(state), found.at_ns) for name, state in found.series.items()],
    )
    connection.executemany("INSERT OR REPLACE INTO watch_targets VALUES (?, ?, ?, ?)", found.targets)
    silent = [*quiet, *read_mutes(connection, found.at_ns)]
    opened: list[Alert] = []
    resolved: list[Alert] = []
    for look in found.looks:
        _open(connection, look, ids)
        opened += _tell(connection, _BEGINNING, _END_LATER, silent)
        _resolve(connection, look, found.rules)
        resolved += _tell(connection, _END, _NOTHING, silent)
    _forget(connection, found.at_ns)
    return Changes(tuple(opened), tuple(resolved))


def _open(connection: sqlite3.Connection, found: Look, ids: Ids) -> None:
    """Begin an alert for what is new, and write down how what is open stands."""
    for finding in found.findings:
        values = msgspec.structs.asdict(finding.subject) | {
            "id": ids.new("alrt"),
            "title": finding.title,
            "facts": msgspec.json.encode(finding.facts).decode(),
            "value": next(iter(finding.facts.values()), ""),
            "size": finding.size,
            "causes": msgspec.json.encode(finding.causes).decode(),
            "since_ns": finding.since_ns,
            "at_ns": found.at_ns,
            "told": _NOTHING if found.late else _BEGINNING,
            "receipts": msgspec.json.encode(finding.change.receipts).decode(),
        }
        seen = connection.execute(_SEEN, values)
        if not seen.rowcount:
            connection.execute(_MADE, values)


def _resolve(connection: sqlite3.Connection, found: Look, rules: frozenset[str]) -> None:
    """An anomaly is over when its detector says so, what else was found when it has not been for a while, and what is
    no longer watched at once. The end of what nobody was told of isn't told."""
    present = {finding.subject for finding in found.findings}
    for alert in read_alerts(connection, only_open=True, limit=10_000):
        subject = alert.subject
        watched = subject.rule in rules
        if watched and (subject.kind not in found.kinds or subject in present):
            continue
        if watched and subject.kind != "anomaly" and found.at_ns - alert.seen_at_ns < _SETTLING_NS:
            continue
        connection.execute(
            "UPDATE alerts SET resolved_at_ns = ?, told = iif(told = ?, ?, ?) WHERE id = ?",
            (found.at_ns, _END_LATER, _END, _NOTHING, alert.id),
        )


def _tell(connection: sqlite3.Connection, waiting: int, then: int, silent: Sequence[str]) -> list[Alert]:
    """What waits to be told and can be now."""
    told = _alerts(
        connection,
        "UPDATE alerts SET told = ? WHERE told = ? AND rule NOT IN (SELECT value FROM json_each(?)) RETURNING *",
        (then, waiting, msgspec.json.encode(silent).decode()),
    )
    return sorted(told, key=lambda alert: (alert.opened_at_ns, alert.id))


def mute(connection: sqlite3.Connection, rule: str, until_ns: int) -> None:
    """Nothing of this rule is posted until then."""
    connection.execute(
        "INSERT INTO watch_mutes VALUES (?, ?) ON CONFLICT DO UPDATE SET until_ns = excluded.until_ns", (rule, until_ns)
    )


def read_mutes(connection: sqlite3.Connection, now_ns: int) -> dict[str, int]:
    """Until when each rule that is muted is."""
    return dict(connection.execute("SELECT rule, until_ns FROM watch_mutes WHERE until_ns > ?", (now_ns,)))


def _forget(connection: sqlite3.Connection, at_ns: int) -> None:
    connection.execute("DELETE FROM watch_series WHERE seen_at_ns < ?", (at_ns - _FORGET_SERIES_NS,))
    connection.execute("DELETE FROM watch_targets WHERE quarter_ns < ?", (at_ns - _FORGET_TARGETS_NS,))
    connection.execute("DELETE FROM alerts WHERE resolved_at_ns < ?", (at_ns - _FORGET_ALERTS_NS,))
    connection.execute("DELETE FROM alert_messages WHERE created_at_ns < ?", (at_ns - _FORGET_SERIES_NS,))


class Message(msgspec.Struct, frozen=True):
    id: str
    rule: str
    body: str
    created_at_ns: int
    tries: int


def add_messages(connection: sqlite3.Connection, messages: Iterable[tuple[str, str]], ids: Ids, at_ns: int) -> None:
    """Rule and body of each."""
    connection.executemany(
        "INSERT INTO alert_messages (id, rule, body, created_at_ns, due_at_ns) VALUES (?, ?, ?, ?, ?)",
        [(ids.new("msg"), rule, body, at_ns, at_ns) for rule, body in messages],
    )


def claim_message(connection: sqlite3.Connection, rules: Sequence[str], now_ns: int, lease_ns: int) -> Message | None:
    """The oldest that is due, which is this gateway's until the lease ends."""
    found = connection.execute(
        "UPDATE alert_messages SET due_at_ns = ?, tries = tries + 1 WHERE id = (SELECT id FROM alert_messages"
        " WHERE done_at_ns IS NULL AND due_at_ns <= ? AND rule IN (SELECT value FROM json_each(?))"
        " AND rule NOT IN (SELECT rule FROM watch_mutes WHERE until_ns > ?)"
        " ORDER BY created_at_ns, id LIMIT 1) RETURNING id, rule, body, created_at_ns, tries",
        (now_ns + lease_ns, now_ns, msgspec.json.encode(rules).decode(), now_ns),
    ).fetchall()
    return Message(*found[0]) if found else None


def finish_message(
    connection: sqlite3.Connection, message_id: str, error: str | None, *, again_at_ns: int | None, now_ns: int
) -> None:
    """It was delivered, or is to be tried again, or is given up."""
    connection.execute(
        "UPDATE alert_messages SET error = ?, due_at_ns = coalesce(?, due_at_ns), done_at_ns = ? WHERE id = ?",
        (error, again_at_ns, now_ns if again_at_ns is None else None, message_id),
    )


def undelivered(connection: sqlite3.Connection) -> list[tuple[str, str, int]]:
    """Rule, last error and when it was to be told, of what hasn't arrived: newest first."""
    rows = connection.execute(
        "SELECT rule, error, created_at_ns FROM alert_messages WHERE error IS NOT NULL"
        " ORDER BY created_at_ns DESC LIMIT 10"
    )
    return [(rule, error, created_ns) for rule, error, created_ns in rows]
