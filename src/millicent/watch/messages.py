"""What is posted to a webhook: JSON as Slack's incoming webhooks take it, which others take too."""

from __future__ import annotations

from typing import Any

import msgspec

from millicent.core.clock import NS_PER_S, iso_utc
from millicent.watch.listing import receipts_address, standing
from millicent.watch.store import Alert, Changes

_MOST = 10


def message_body(rule: str, changes: Changes, pages_url: str | None = None) -> str | None:
    """One message for all that is to be told of this rule; None where there is nothing. Each links to its receipts
    where it is known under what address people reach the pages."""
    opened = [alert for alert in changes.opened if alert.subject.rule == rule]
    resolved = [alert for alert in changes.resolved if alert.subject.rule == rule]
    if not opened and not resolved:
        return None
    lines = [f":rotating_light: {alert.title}" for alert in opened[:_MOST]]
    lines += [f":white_check_mark: Over: {alert.title}" for alert in resolved[:_MOST]]
    if (left := max(0, len(opened) - _MOST) + max(0, len(resolved) - _MOST)) > 0:
        lines.append(f"and {left} more on the Alerts page")
    attachments = [_attachment(alert, pages_url) for alert in (*opened[:_MOST], *resolved[:_MOST])]
    return msgspec.json.encode({"text": _escaped("\n".join(lines)), "attachments": attachments}).decode()


def _attachment(alert: Alert, pages_url: str | None) -> dict[str, Any]:
    over_ns = alert.resolved_at_ns
    fields = {**standing(alert), "since": _minute(alert.since_ns)}
    fields |= {} if over_ns is None else {"over at": _minute(over_ns)}
    if alert.causes:
        fields["most of it"] = ", ".join(
            f"{cause.dimension} {cause.member or '(none)'} {cause.percent}%" for cause in alert.causes
        )
    link = {} if pages_url is None else {"title_link": pages_url.rstrip("/") + receipts_address(alert)}
    return {
        "color": "danger" if over_ns is None else "good",
        "fallback": _escaped(alert.title),
        "title": _escaped(f"{alert.subject.kind}, rule {alert.subject.rule}" + ("" if over_ns is None else ": over")),
        **link,
        "fields": [
            {"title": _escaped(name), "value": _escaped(value), "short": True} for name, value in fields.items()
        ],
        "footer": alert.id,
        "ts": (alert.opened_at_ns if over_ns is None else over_ns) // NS_PER_S,
    }


def _minute(ns: int) -> str:
    return f"{iso_utc(ns)[:16].replace('T', ' ')} UTC"


def _escaped(text: str) -> str:
    """Callers name features and users: a name must not become a mention, nor a link, which Slack also makes of plain
    addresses."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("://", ":\u200b//")
