"""`receipts` and `report`: read from the ledger's file, whether or not a server runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import click

from millicent.cli.home import open_ledger
from millicent.cli.options import exact_json_option, filters, where_of
from millicent.core.errors import NotFound

if TYPE_CHECKING:
    from millicent.core.receipts import Attempt, Receipt
    from millicent.ledger.queries import GroupBy, Totals
    from millicent.ledger.worth import RoleCosts, Usefulness

# What `report` can group by: `millicent.ledger.queries.GroupBy`, written out so that help needn't load it.
GROUPS = (
    *("feature", "user", "team", "model", "key", "tier", "placement", "conversation", "run"),
    *("month", "day", "hour", "status"),
)


@click.command()
@click.argument("receipt_id", metavar="[ID]", required=False)
@filters
@click.option("--limit", type=click.IntRange(1, 1000), default=20, show_default=True, help="How many to show.")
@click.option("--after", help="Go on after this point: the `next` of the page before.")
@exact_json_option
def receipts(receipt_id: str | None, limit: int, after: str | None, json_: bool, **given: Any) -> None:
    """Show the newest receipts, or the one with this ID."""
    from millicent.cli import show
    from millicent.wire.receipts import list_body, receipt_body

    queries = open_ledger()
    if receipt_id is not None:
        receipt = queries.receipt(receipt_id)
        if receipt is None:
            raise NotFound(f"no receipt {receipt_id} in this ledger: `millicent receipts` lists those there are.")
        if json_:
            show.as_json(receipt_body(receipt))
        else:
            print(card(receipt))
        return
    page = queries.receipts(where_of(given), limit=limit, after=after)
    if json_:
        show.as_json(list_body([receipt_body(receipt) for receipt in page.receipts], page.next))
        return
    header = ("CREATED (UTC)", "STATUS", "MODEL", "FEATURE", "USER", "IN", "OUT", "TIME", "COST", "RECEIPT")
    print(show.table(header, [_row(each) for each in page.receipts], right=frozenset({"IN", "OUT", "TIME", "COST"})))
    if page.next:
        show.note(f"More: --after {page.next}")


@click.command()
@click.option("--by", type=click.Choice(GROUPS), default="feature", show_default=True, help="One row for each.")
@click.option(
    "--predictivity", is_flag=True, help="Split the cost by what it was for: inference, retries, checks, retrieval..."
)
@click.option("--routing", is_flag=True, help="How much was routed by policies, and what that saved.")
@click.option("--cache", is_flag=True, help="How much the response cache answered, and what that saved.")
@click.option("--waste", is_flag=True, help="What was paid for that nobody had any use of.")
@click.option(
    "--units", is_flag=True, help="What one request and one useful output cost, how long they take, and gaps."
)
@click.option("--targets", is_flag=True, help="Each feature's cost and latency targets beside what it does.")
@click.option("--margin", is_flag=True, help="What is earned beside what is spent, by feature, tier or user.")
@click.option("--change", metavar="BEFORE..AFTER", help="Why the cost changed: 2026-10..2026-11, 2026-W46..2026-W47.")
@click.option("--drift", is_flag=True, help="This week beside the last one and beside each feature's baseline.")
@filters
@click.option("--timezone", default="UTC", show_default=True, help="Whose days and hours: Europe/Berlin, say.")
@click.option("--book", default="actual", show_default=True, help="Prices of this book: see `millicent reprice`.")
@exact_json_option
def report(
    by: str,
    predictivity: bool,
    routing: bool,
    cache: bool,
    waste: bool,
    change: str | None,
    timezone: str,
    book: str,
    json_: bool,
    **given: Any,
) -> None:
    """Sum up what was spent, by whatever it was spent on; and what a useful output costs, where any was rated."""
    from millicent.cli import economics, show, worth
    from millicent.ledger.queries import Totals

    asked = [name for name in economics.FLAGS if given.pop(name)] + (["change"] if change else [])
    if routing + cache + waste + predictivity + len(asked) > 1:
        raise click.UsageError("each of these options is a report of its own: ask for one")
    if asked and book != "actual":
        raise click.UsageError(f"--{asked[0]} is of what receipts say: leave out --book")
    ledger, where = open_ledger(), where_of(given)
    if asked:
        economics.show_report(asked[0], ledger, by, where, timezone, change, json_=json_)
        return
    if routing or waste or cache:
        from millicent.cli import levers

        shown = levers.show_coverage if routing else levers.show_waste if waste else levers.show_cache
        shown(ledger, where, json_=json_)
        return
    # Looking for books reads every line; the one that stands is always there.
    if book != "actual" and book not in (books := ledger.books()):
        raise NotFound(f"no book {book!r} in this ledger: there is {', '.join(books)}.")
    totals = ledger.totals(cast("GroupBy", by), where, book, zone=timezone)
    roles: dict[str | None, RoleCosts] = {}
    useful: dict[str | None, Usefulness] = {
        each.group: each for each in ledger.usefulness(cast("GroupBy", by), where, zone=timezone)
    }
    if predictivity or json_:
        roles = {each.group: each for each in ledger.role_costs(cast("GroupBy", by), where, zone=timezone)}
    aims = worth.aims_of(ledger, where, totals) if by == "feature" else {}
    if json_:
        groups = [
            _totals_body(each)
            | worth.roles_body(roles.get(each.group))
            | worth.useful_body(useful.get(each.group))
            | (aims[each.group].body() if each.group in aims else {})
            for each in totals
        ]
        show.as_json({"object": "list", "by": by, "book": book, "data": groups})
        return
    if predictivity:
        print(worth.roles_table(by, [roles[each.group] for each in totals if each.group in roles]))
        return
    header = (by.upper(), "REQUESTS", "IN", "OUT", "ACCELERATOR", "COST", "UNPRICED", "ASSUMED", "UNKNOWN USAGE")
    rows = [_totals_row(each) for each in totals]
    print(show.table(header, [*rows, _totals_row(Totals.together(totals, "total"))], right=frozenset(header[1:])))
    if rated := [useful[each.group] for each in totals if each.group in useful and useful[each.group].rated]:
        print("\n" + worth.useful_table(by, rated))
    if aims:
        print("\n" + worth.aims_table(aims))
    if any(each.unpriced for each in totals):
        show.note("Unpriced requests are not in COST: nobody knows what they cost.")
    if any(each.assumed for each in totals):
        show.note("Assumed costs rest on a rate that nobody has confirmed: set yours in [placements].")


def card(receipt: Receipt) -> str:
    """One receipt, as it is read: the amount, who and what, then the lines that add up to it."""
    from millicent.cli import show

    took, ran, policy = receipt.timing, receipt.accelerator, receipt.policy or {}
    cache_told = policy.get("response_cache_filled_by") or policy.get("response_cache_why")
    given = {name: value for name, value in _attribution(receipt).items() if value}
    facts = [
        ("Status", " ".join(filter(None, (receipt.status or "running", _in_brackets(receipt.finish_reason)))), None),
        ("Error", receipt.error, None),
        ("Created", f"{show.moment(receipt.created_at_ns)} UTC", None),
        ("Model", receipt.model, receipt.served_model if receipt.served_model != receipt.model else None),
        ("Routed", policy.get("chosen"), policy.get("why")),
        ("Response cache", policy.get("response_cache"), cache_told),
        ("Placement", receipt.placement or "none", receipt.backend),
        ("For", ", ".join(f"{name} {value}" for name, value in given.items()) or "unattributed", None),
        *((leaf.value, show.count(count.tokens), count.provenance) for leaf, count in receipt.usage.leaves.items()),
        ("First token", show.duration(took.ttft_ns), None),
        ("Total time", show.duration(took.total_ns), None),
        ("Accelerator", "unknown" if ran.provenance == "unknown" else show.duration(ran.serving_ns), ran.provenance),
        ("Provider says", None if receipt.reported is None else f"${receipt.reported}", _residual(receipt)),
        *((f"Attempt {each.ordinal}", *_attempt(each)) for each in receipt.attempts if len(receipt.attempts) > 1),
    ]
    if ran.drafted_tokens:
        guessed = f"{show.count(ran.accepted_tokens)} of {show.count(ran.drafted_tokens)} tokens"
        facts.append(("Guessed rightly", guessed, None))
    width = max(len(name) for name, _, _ in facts)
    lines = [f"{show.amount(receipt.total)}   {receipt.id}", ""]
    lines += [
        show.printable(f"{_title(name):<{width}}  {value}{_in_brackets(extra, ' ')}")
        for name, value, extra in facts
        if value
    ]
    return "\n".join([*lines, "", *_lines(receipt)])


def _residual(receipt: Receipt) -> str | None:
    if receipt.residual is None:
        return None
    return f"{'+' if receipt.residual.nanousd > 0 else ''}{receipt.residual} to ours"


def _attempt(attempt: Attempt) -> tuple[str, str | None]:
    from millicent.cli import show

    took = None if attempt.ended_at_ns is None else attempt.ended_at_ns - attempt.started_at_ns
    told = f"{attempt.role}, {attempt.status or 'running'} after {show.duration(took)}"
    return f"{attempt.placement}, {attempt.model} ({attempt.backend}): {told}", attempt.error


def _lines(receipt: Receipt) -> list[str]:
    from millicent.cli import show

    header = ("LINE", "ROLE", "QUANTITY", "UNIT", "UNIT PRICE", "AMOUNT", "KNOWN BY")
    rows = [
        (
            line.meter.value if line.book == "actual" else f"{line.meter} [{line.book}]",
            line.role.value,
            f"{line.quantity:f}",
            line.unit,
            "unpriced" if line.unit_price_usd is None else f"${line.unit_price_usd.normalize():f}",
            "unpriced" if line.amount is None else f"${line.amount}",
            line.provenance.value,
        )
        for line in receipt.lines
    ]
    total = ("total", "", "", "", "", "unpriced" if receipt.total is None else f"${receipt.total}", "")
    return [show.table(header, [*rows, total], right=frozenset({"QUANTITY", "UNIT PRICE", "AMOUNT"}))]


def _row(receipt: Receipt) -> tuple[str, ...]:
    from millicent.cli import show

    return (
        show.moment(receipt.created_at_ns),
        receipt.status or "running",
        receipt.model,
        receipt.attribution.feature or "-",
        receipt.attribution.user or "-",
        show.count(receipt.usage.input_tokens),
        show.count(receipt.usage.output_tokens),
        show.duration(receipt.timing.total_ns),
        show.amount(receipt.total) if receipt.status else "-",
        receipt.id,
    )


def _totals_row(totals: Totals) -> tuple[str, ...]:
    from millicent.cli import show

    figures = (totals.unpriced, totals.assumed, totals.unknown_usage)
    return (
        totals.group if totals.group is not None else "unattributed",
        f"{totals.requests:,}",
        show.count(totals.input_tokens),
        show.count(totals.output_tokens),
        show.duration(totals.serving_ns),
        show.amount(totals.known_cost),
        *(f"{figure:,}" for figure in figures),
    )


def _totals_body(totals: Totals) -> dict[str, Any]:
    from millicent.core.money import exact_usd

    return {
        "group": totals.group,
        "requests": totals.requests,
        "input_tokens": totals.input_tokens,
        "output_tokens": totals.output_tokens,
        "serving_ns": totals.serving_ns,
        "cost_usd": exact_usd(totals.known_cost),
        "unpriced": totals.unpriced,
        "assumed": totals.assumed,
        "unknown_usage": totals.unknown_usage,
    }


def _attribution(receipt: Receipt) -> dict[str, str | None]:
    given = receipt.attribution
    named = {name: getattr(given, name) for name in given.__struct_fields__ if name != "tags"}
    return named | {f"tag {name}": value for name, value in given.tags.items()}


def _in_brackets(text: str | None, before: str = "") -> str:
    return f"{before}({text})" if text else ""


def _title(name: str) -> str:
    """`input_cache_read` is `Input cache read`."""
    return name[:1].upper() + name[1:].replace("_", " ")
