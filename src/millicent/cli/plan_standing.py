"""`plan standing`: published bands, a checklist, and what outcomes cost without a model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from millicent.cli.home import open_ledger
from millicent.cli.home import settings as read_settings
from millicent.cli.options import exact_json_option, utc_ns

if TYPE_CHECKING:
    from millicent.economics.standing import Stand, Standing


@click.command()
@click.option("--since", metavar="TIME", callback=utc_ns, help="From this time on; by default the last 30 days.")
@click.option("--until", metavar="TIME", callback=utc_ns, help="Only before this time.")
@exact_json_option
def standing(since: int | None, until: int | None, json_: bool) -> None:
    """Say where you stand: beside published bands, and on a checklist that evidence ticks, with the next step.

    And what the same outcome costs without a model, where [features.NAME.alternative] says it.
    """
    from millicent import config
    from millicent.cli import show
    from millicent.core.clock import SystemClock
    from millicent.dashboard.plan_json import standing_body
    from millicent.economics.scenarios import Scenarios
    from millicent.economics.standing import standing as stand
    from millicent.economics.traffic import lately
    from millicent.ledger.queries import ReceiptFilter

    settings, queries = read_settings(), open_ledger()
    what = config.configured(settings, queries, Scenarios(config.home()))
    chosen = lately(SystemClock(), ReceiptFilter(from_ns=since, to_ns=until))
    found = stand(queries, SystemClock(), chosen, what, config.economics_setting(settings).books)
    if json_:
        show.as_json(standing_body(found))
        return
    header = ("MEASURE", "INDUSTRY", "HERE", "STANDS", "BEHIND", "TYPICAL", "LEADING", "EVIDENCE")
    rows = [_stand(each) for each in found.stands]
    print(show.table(header, rows, right=frozenset({"HERE"})))
    print("\n" + _checklist(found))
    if found.without:
        print("\n" + _without(found))
    if found.next_step is not None:
        show.note(f"Next: {found.next_step.then}")


def _stand(stand: Stand) -> tuple[str, ...]:
    from millicent.economics.standing import band_words, told

    band = stand.band
    here = "unknown" if stand.value is None else told(band, stand.value)
    return (band.measure, band.industry, here, stand.where or "unknown", *band_words(band), stand.evidence)


def _checklist(found: Standing) -> str:
    from millicent.cli import show

    rows = [
        ("[x]" if each.done else "[ ]", each.stage, each.what, each.evidence, "" if each.done else each.then)
        for each in found.ticks
    ]
    return show.table(("", "STAGE", "WHAT", "EVIDENCE", "THEN"), rows)


def _without(found: Standing) -> str:
    from millicent.cli import show

    return show.table_of(
        found.without,
        ("FEATURE", lambda each: each.feature),
        ("WITHOUT A MODEL", lambda each: each.without.human()),
        ("WITH IT", lambda each: show.amount(each.with_model, "unknown")),
        ("OF", lambda each: each.of),
        ("SAVED EACH", lambda each: show.amount(each.saved, "unknown")),
        ("OUTCOMES", lambda each: f"{each.outcomes:,}"),
        ("HOW", lambda each: each.what or "-"),
        right=frozenset({"WITHOUT A MODEL", "WITH IT", "SAVED EACH", "OUTCOMES"}),
    )
