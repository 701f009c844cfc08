"""What is posted to a webhook: JSON as Slack's incoming webhooks take it, which others take too."""

from __future__ import annotations

from typing import Any

import msgspec

from millicent.core.clock import NS_PER_S, iso_utc
from millicent.watch.store import Alert, Changes

_MOST = 10


def message_body(rule: str, changes: Changes) -> str | None:
    """One message for all that one look found; None where it found nothing of this rule."""
    opened = [alert for alert in changes.opened if alert.subject.rule == rule]
    resolved = [alert for alert in changes.resolved if alert.subject.rule == rule]
    if not opened and not resolved:
        return None
    lines = [f":rotating_light: {alert.title}" for alert in opened[:_MOST]]
    lines += [f":white_check_mark: Over: {alert.title}" for alert in resolved[:_MOST]]
    if (left := max(0, len(opened) - _MOST) + max(0, len(resolved) - _MOST)) > 0:
        lines.append(f"and {left} more on the Alerts page")
    attachments = [_attachment(alert) for alert in (*opened[:_MOST], *resolved[:_MOST])]
    return msgspec.json.encode({"text": _escaped("\n".join(lines)), "attachments": attachments}).decode()


def _attachment(alert: Alert) -> dict[str, Any]:
    fields = [{"title": name.replace("_", " "), "value": value} for name, value in alert.facts.items()]
    fields.append({"title": "since", "value": f"{iso_utc(alert.since_ns)[:16].replace('T', ' ')} UTC"})
    if alert.causes:
        who = ", ".join(f"{cause.dimension} {cause.member or '(none)'} {cause.percent}%" for cause in alert.causes)
        fields.append({"title": "most of it", "value": who})
    over = alert.resolved_at_ns is not None
    return {
        "color": "good" if over else "danger",
        "fallback": _escaped(alert.title),
        "title": _escaped(f"{alert.subject.kind}, rule {alert.subject.rule}" + (": over" if over else "")),
        "fields": [
            {"title": _escaped(each["title"]), "value": _escaped(each["value"]), "short": True} for each in fields
        ],
        "footer": alert.id,
        "ts": (alert.opened_at_ns if alert.resolved_at_ns is None else alert.resolved_at_ns) // NS_PER_S,
    }


def _escaped(text: str) -> str:
    """Callers name features and users: a name must not become a mention or a link."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
