"""Alerts as JSON: on the page's address with `.json`, and on the command line."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlencode

from millicent.core.clock import NS_PER_S, iso_utc
from millicent.watch.findings import Cause
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
        "opened_with": alert.opened_with or None,
        "peak": alert.peak or None,
        "causes": [
            {"dimension": cause.dimension, "member": cause.member, "percent": cause.percent} for cause in alert.causes
        ],
        "receipts": receipts_address(alert),
        "since": iso_utc(alert.since_ns),
        "opened_at": iso_utc(alert.opened_at_ns),
        "seen_at": iso_utc(alert.seen_at_ns),
        "resolved_at": None if alert.resolved_at_ns is None else iso_utc(alert.resolved_at_ns),
    }


def receipts_address(alert: Alert, cause: Cause | None = None) -> str:
    """The page of the receipts under an alert, or under one of its causes: since it began, until it was over."""
    # From the second before: addresses have no finer times.
    params = {"from": _second(alert.since_ns)}
    if alert.resolved_at_ns is not None:
        params["to"] = _second(alert.resolved_at_ns + NS_PER_S)
    filters = alert.receipts if cause is None else {**alert.receipts, cause.dimension: cause.member}
    for name, value in filters.items():
        # What has no name is `none=feature`; an address can say that of one thing only, the last.
        params |= {name: value} if value else {"none": name}
    return f"/receipts?{urlencode(params)}"


def standing(alert: Alert) -> dict[str, str]:
    """The figures of an alert as they are shown: as it stands, and what it was at first and at worst."""
    value = next(iter(alert.facts.values()), "")
    more = {"at first": alert.opened_with, "at worst": alert.peak}
    return {
        **{name.replace("_", " "): text for name, text in alert.facts.items()},
        **{name: text for name, text in more.items() if text not in {"", value}},
    }


def _second(ns: int) -> str:
    return iso_utc(ns - ns % NS_PER_S)[:19]
