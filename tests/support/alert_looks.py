"""What a watcher found, made up: dear features, looked at once."""

from __future__ import annotations

from millicent.core.clock import ManualClock
from millicent.ledger.queries import ReceiptFilter
from millicent.watch import store
from millicent.watch.findings import Cause, Change, Finding, Subject

NOW_NS = ManualClock().now_ns()


def evaluation(*members: str, at_ns: int = NOW_NS, before_ns: int | None = None, size: float = 4) -> store.Evaluation:
    """Of rule `ops`: each of these features costs so many dollars an hour, and the others are as usual. Its first look
    but for a later time, and then its second where `before_ns` doesn't say of when the one before was."""
    findings = [
        Finding(
            Subject("ops", "anomaly", "cost", "feature", member),
            f'The cost of feature "{member}" rose to ${size:.2f} an hour; at this time it is usually $1.00.',
            {"value": f"${size:.2f}", "usual": "$1.00"},
            NOW_NS,
            size,
            Change("cost", ReceiptFilter(feature=member)),
            (Cause("user", "mallory", 92), Cause("key", "", 40)),
        )
        for member in members
    ]
    return store.Evaluation(
        what="quarter",
        before_ns=before_ns if before_ns is not None else NOW_NS if at_ns > NOW_NS else -1,
        through_ns=at_ns,
        at_ns=at_ns,
        rules=frozenset({"ops"}),
        looks=[store.Look(at_ns, frozenset({"anomaly"}), findings)],
    )
