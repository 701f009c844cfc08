"""What the books don't hold: requests that nobody can price, and requests that name no feature."""

from __future__ import annotations

from decimal import Decimal

import msgspec

from millicent.core.clock import NS_PER_HOUR
from millicent.ledger.queries import ReceiptFilter
from millicent.watch.burn import Spending
from millicent.watch.config import AlertConfig
from millicent.watch.findings import Change, Finding, Measure, Subject
from millicent.watch.series import ALL

_WINDOW_NS = 24 * NS_PER_HOUR
_ENOUGH = 100
_UNPRICED = (
    "have no known price and are in no cost: price their models in [prices.NAME], or their machine in [placements.NAME]"
)
_UNATTRIBUTED = "name no feature: send X-Millicent-Feature, or pin it to the key"


def coverage_findings(rule: str, config: AlertConfig, sums: Spending, to_ns: int) -> list[Finding]:
    """Of the day that ends then. Who names features nowhere doesn't want them: that is no finding."""
    if not config.covers(ALL, ""):
        return []
    day = ReceiptFilter(from_ns=to_ns - _WINDOW_NS, to_ns=to_ns)
    features = sums.totals("feature", day)
    requests = sum(group.requests for group in features)
    unpriced = sum(group.unpriced for group in features)
    named = sum(group.requests for group in features if group.group)
    nameless = requests - named if named else 0
    gaps: list[tuple[Measure, str, int, int, str]] = [
        ("unpriced", ALL, unpriced, config.unpriced_percent, _UNPRICED),
        ("unattributed", "feature", nameless, config.unattributed_percent, _UNATTRIBUTED),
    ]
    found = []
    for measure, dimension, count, most, what in gaps:
        if requests < _ENOUGH or not count or 100 * count < most * requests:
            continue
        share = 100 * Decimal(count) / requests
        title = f"{count:,} of {requests:,} requests of the last 24 hours ({share:.0f}%) {what}."
        facts = {"share": f"{share:.1f}%", "requests": f"{count:,}", "told_from": f"{most}%"}
        change = Change(measure, day if dimension == ALL else msgspec.structs.replace(day, feature=""))
        subject = Subject(rule, "coverage", measure, dimension, "")
        found.append(Finding(subject, title, facts, to_ns - _WINDOW_NS, float(share), change))
    return found
