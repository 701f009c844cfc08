"""Alerts as JSON: on the page's address with `.json`, and on the command line."""

from __future__ import annotations

from typing import Any

from millicent.core.clock import iso_utc
from millicent.watch.store import Alert


def alert_body(alert: Alert) -> dict[str, Any]:
    return {
        "id": alert.id,
        "object": "alert",
        "state": "open" if alert.resolved_at_ns is None else "resolved",
        "rule": alert.subject.rule,
        "kind": alert.subject.kind,
        "figure": alert.subject.figure,
        "dimension": alert.subject.dimension,
        "member": alert.subject.member,
        "title": alert.title,
        "facts": alert.facts,
        "causes": [
            {"dimension": cause.dimension, "member": cause.member, "percent": cause.percent} for cause in alert.causes
        ],
        "since": iso_utc(alert.since_ns),
        "opened_at": iso_utc(alert.opened_at_ns),
        "resolved_at": None if alert.resolved_at_ns is None else iso_utc(alert.resolved_at_ns),
    }
