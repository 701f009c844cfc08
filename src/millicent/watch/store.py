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


class Alert(msgspec.Struct, frozen=True):
    """One thing that was noticed. Open while `resolved_at_ns` is None."""

    id: str
    subject: Subject
    title: str
    facts: dict[str, str]
    causes: tuple[Cause, ...]
    since_ns: int
    opened_at_ns: int
    seen_at_ns: int
    resolved_at_ns: int | None


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
    """What an evaluation opened and ended, of what is told."""

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
    )


def commit(connection: sqlite3.Connection, found: Evaluation, ids: Ids) -> Changes | None:
    """Write what was found; None where another gateway was first, and nothing is written."""
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
    opened: list[Alert] = []
    resolved: list[Alert] = []
    for look in found.looks:
        opened += _open(connection, look, ids)
        resolved += _resolve(connection, look, found.rules)
    _forget(connection, found.at_ns)
    return Changes(tuple(opened), tuple(resolved))


def _open(connection: sqlite3.Connection, found: Look, ids: Ids) -> list[Alert]:
    """Those to be told."""
    opened = []
    for finding in found.findings:
        subject = msgspec.structs.astuple(finding.subject)
        seen = connection.execute(
            "UPDATE alerts SET seen_at_ns = ? WHERE (rule, kind, figure, dimension, member) = (?, ?, ?, ?, ?)"
            " AND resolved_at_ns IS NULL",
            (found.at_ns, *subject),
        )
        if seen.rowcount:
            continue
        alert = Alert(
            id=ids.new("alrt"),
            subject=finding.subject,
            title=finding.title,
            facts=finding.facts,
            causes=finding.causes,
            since_ns=finding.since_ns,
            opened_at_ns=found.at_ns,
            seen_at_ns=found.at_ns,
            resolved_at_ns=None,
        )
        connection.execute(
            "INSERT INTO alerts VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, NULL, ?)",
            (
                alert.id,
                *subject,
                alert.title,
                msgspec.json.encode(alert.facts).decode(),
                msgspec.json.encode(alert.causes).decode(),
                alert.since_ns,
                alert.opened_at_ns,
                alert.seen_at_ns,
                not found.late,
            ),
        )
        opened += [] if found.late else [alert]
    return opened


def _resolve(connection: sqlite3.Connection, found: Look, rules: frozenset[str]) -> list[Alert]:
    """Those to be told. An anomaly is over when its detector says so, what else was found when it has not been for a
    while, and what is no longer watched at once."""
    resolved = []
    present = {finding.subject for finding in found.findings}
    for alert in read_alerts(connection, only_open=True, limit=10_000):
        subject = alert.subject
        watched = subject.rule in rules
        if watched and (subject.kind not in found.kinds or subject in present):
            continue
        if watched and subject.kind != "anomaly" and found.at_ns - alert.seen_at_ns < _SETTLING_NS:
            continue
        ((told,),) = connection.execute(
            "UPDATE alerts SET resolved_at_ns = ? WHERE id = ? RETURNING told", (found.at_ns, alert.id)
        ).fetchall()
        resolved += [msgspec.structs.replace(alert, resolved_at_ns=found.at_ns)] if told else []
    return resolved


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
        " ORDER BY created_at_ns, id LIMIT 1) RETURNING id, rule, body, created_at_ns, tries",
        (now_ns + lease_ns, now_ns, msgspec.json.encode(rules).decode()),
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
