"""What `millicent doctor` asks of a ledger: does everything add up?"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable

from millicent.core.clock import iso_utc
from millicent.ledger import arithmetic, rollups, tallies

# Each finds rows that must not be, and says of one row what is wrong.
_MUST_BE_EMPTY: dict[str, str] = {
    "device time of hour {1} in session {0} is {2} ns by receipt and {3} ns in the account": """
        SELECT session, hour_ns, coalesce(t.serving_ns, 0), h.serving_ns
        FROM device_hours AS h LEFT JOIN
            (SELECT session, hour_ns, sum(serving_ns) AS serving_ns FROM
                (SELECT session, hour_ns, serving_ns FROM device_time
                    UNION ALL SELECT session, hour_ns, serving_ns FROM device_time_archived)
             GROUP BY session, hour_ns) AS t
            USING (session, hour_ns)
        WHERE h.serving_ns != coalesce(t.serving_ns, 0)""",
    "session {0} has device time in hour {1} but was never written: checkpoint before the first request": """
        SELECT session, hour_ns FROM device_hours WHERE session NOT IN (SELECT id FROM device_sessions)""",
    "session {0} accounts for {2} ns more than there are in hour {1}": """
        SELECT session, hour_ns,
            h.serving_ns + overhead_ns + lost_ns + down_ns - wall_ns * accelerators AS excess_ns
        FROM device_hours AS h JOIN device_sessions AS s ON s.id = h.session
        WHERE closed AND excess_ns > 0""",
    "session {0} runs from {1} to {2} and its hours hold {3} ns": """
        SELECT id, started_at_ns, seen_at_ns, coalesce((SELECT sum(wall_ns) FROM device_hours WHERE session = id), 0)
            AS hours_ns
        FROM device_sessions WHERE hours_ns < seen_at_ns - started_at_ns""",
    "receipt {0} shows {1} ns of device time and its entries {2} ns": """
        SELECT id, serving_ns, coalesce((SELECT sum(serving_ns) FROM device_time WHERE receipt = id), 0) AS posted_ns
        FROM receipts WHERE status IS NOT NULL AND serving_ns != posted_ns""",
    "receipt {0} was split by the fit {1}, which was never saved": """
        SELECT id, step_time_version FROM receipts WHERE status IS NOT NULL AND step_time_version IS NOT NULL
            AND step_time_version NOT IN (SELECT version FROM step_time_fits)""",
    "receipt {0} is closed and its attempt {1} isn't": """
        SELECT receipt, ordinal FROM attempts JOIN receipts ON receipts.id = receipt
        WHERE receipts.status IS NOT NULL AND ended_at_ns IS NULL""",
    "receipt {0} was interrupted and costs {1} nano-dollars, more than its hold of {2}": """
        SELECT r.id, (SELECT sum(amount_nanousd) FROM lines AS l WHERE l.receipt = r.id
            AND posted_at_ns <= settled_at_ns) AS cost, hold_nanousd
        FROM receipts AS r WHERE status = 'interrupted' AND cost > hold_nanousd""",
    "budget {0} of {1!r} from {2} has {3} spent and {4} held, and its holds make {5} and {6}": """
        SELECT p.budget, p.subject, p.period_ns, p.spent_nanousd, p.held_nanousd,
            coalesce(sum(h.spent_nanousd), 0) AS spent, coalesce(sum(h.held_nanousd), 0) AS held
        FROM budget_periods AS p LEFT JOIN (
            SELECT budget, subject, period_ns, spent_nanousd, held_nanousd FROM holds
            UNION ALL SELECT budget, subject, period_ns, spent_nanousd, 0 FROM holds_archived
        ) AS h USING (budget, subject, period_ns)
        GROUP BY p.budget, p.subject, p.period_ns HAVING spent != p.spent_nanousd OR held != p.held_nanousd""",
    "receipt {0} cost {3} nano-dollars, and budget {1} counts {2} for it": """
        SELECT receipt, budget, spent_nanousd, (SELECT sum(amount_nanousd) FROM lines AS l WHERE l.receipt = h.receipt
                AND book = 'actual') AS cost
        FROM holds AS h WHERE settled AND cost != spent_nanousd AND NOT EXISTS (
            SELECT 1 FROM lines AS l WHERE l.receipt = h.receipt AND book = 'actual' AND amount_nanousd IS NULL)
            AND EXISTS (SELECT 1 FROM lines AS l JOIN receipts AS r ON r.id = l.receipt
                WHERE l.receipt = h.receipt AND book = 'actual' AND l.posted_at_ns <= r.settled_at_ns)""",
    "a permit to change what is settled was left behind ({0})": "SELECT reason FROM maintenance",
    "receipt {0} is closed and still holds {2} nano-dollars of budget {1}": """
        SELECT receipt, budget, held_nanousd FROM holds JOIN receipts ON receipts.id = receipt
        WHERE receipts.status IS NOT NULL AND NOT settled""",
    "receipt {0} is open and has a line already of attempt {1}, its last": """
        SELECT DISTINCT receipt, attempt FROM lines JOIN receipts AS r ON r.id = receipt
        WHERE r.status IS NULL AND attempt = (SELECT max(ordinal) FROM attempts AS a WHERE a.receipt = r.id)""",
}


def problems(connection: sqlite3.Connection, is_live: Callable[[str], bool]) -> list[str]:
    """One line per problem; `is_live` says whether a gateway's process runs."""
    found = [f"the file is damaged: {line}" for (line,) in connection.execute("PRAGMA integrity_check") if line != "ok"]
    found += [
        f"{table} row {rowid} belongs to no row of {parent}"
        for table, rowid, parent, _ in connection.execute("PRAGMA foreign_key_check")
    ]
    unsettled = connection.execute(
        "SELECT gateway, id, created_at_ns FROM receipts WHERE status IS NULL ORDER BY created_at_ns"
    ).fetchall()
    dead = {gateway for gateway in {gateway for gateway, _, _ in unsettled} if not is_live(gateway)}
    found += [
        f"receipt {receipt_id} of {iso_utc(created_at_ns)} is open and gateway {gateway} is gone: start a gateway"
        for gateway, receipt_id, created_at_ns in unsettled
        if gateway in dead
    ]
    for message, sql in _MUST_BE_EMPTY.items():
        found += [message.format(*row) for row in connection.execute(sql)]
    return found + arithmetic.problems(connection) + rollups.problems(connection) + tallies.problems(connection)
