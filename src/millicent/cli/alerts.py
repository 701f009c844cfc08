"""`alerts`: what is unusual, read from the ledger with or without a server."""

from __future__ import annotations

from functools import partial

import click

from millicent.cli.options import json_option
from millicent.core.clock import iso_utc


@click.command()
@click.option("--all", "all_", is_flag=True, help="Also those that are over.")
@click.option("--limit", type=click.IntRange(1, 1000), default=50, show_default=True, help="How many to show.")
@json_option
def alerts(all_: bool, limit: int, json_: bool) -> None:
    """Show what is unusual now: what changed, who caused it and since when. A server that runs looks every minute."""
    from millicent.cli import show
    from millicent.cli.home import open_ledger
    from millicent.watch.listing import alert_body
    from millicent.watch.store import Alert, read_alerts

    found: list[Alert] = open_ledger().ask(partial(read_alerts, only_open=not all_, limit=limit)) or []
    if json_:
        show.as_json({"object": "list", "data": [alert_body(alert) for alert in found]})
        return
    if not found:
        show.note("Nothing is unusual now." if not all_ else "Nothing was unusual so far.")
        return
    for alert in found:
        over = "" if alert.resolved_at_ns is None else f", over at {_minute(alert.resolved_at_ns)}"
        peak = f" At worst: {alert.peak}." if alert.peak not in {"", *alert.facts.values()} else ""
        print(show.printable(f"{alert.title}{peak}"))
        print(show.printable(f"  since {_minute(alert.since_ns)} UTC{over}; {alert.subject.kind}; {alert.id}"))
        if alert.causes:
            who = ", ".join(f"{each.dimension} {each.member or '(none)'} {each.percent}%" for each in alert.causes)
            print(show.printable(f"  most of it: {who}"))


def _minute(ns: int) -> str:
    return iso_utc(ns)[:16].replace("T", " ")
