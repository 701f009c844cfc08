"""`export`, `import` and `reconcile`: what leaves the ledger, what comes in, what an invoice says beside it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import click

from millicent.cli.home import open_ledger, write_ledger
from millicent.cli.options import exact_json_option, utc_ns, where_of
from millicent.cli.options import filters as receipt_filters
from millicent.core.errors import ConfigError
from millicent.core.files import whole_file

if TYPE_CHECKING:
    from millicent.core.money import Money
    from millicent.ledger.importing import Format
    from millicent.ledger.queries import LedgerQueries, ReceiptFilter, ReceiptPage

_PAGE = 500
# Rows imported in one transaction, so that a gateway that runs waits some tens of milliseconds at most.
_BATCH = 500


@click.command()
@click.option(
    "--format",
    "form",
    type=click.Choice(("csv", "json", "parquet", "focus")),
    default="csv",
    show_default=True,
    help="focus is FOCUS 1.2 as CSV, one row for each charge.",
)
@receipt_filters
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Write to this file instead of stdout.")
def export(form: str, out: Path | None, **filters: Any) -> None:
    """Write receipts, newest first, for a spreadsheet, a program or a cost tool.

    What is unpriced cannot be in FOCUS: it is written beside it, to OUT.unpriced.csv, and counted.
    """
    queries, where = open_ledger(), where_of(filters)
    if form == "parquet":
        _parquet(queries, where, out)
        return
    with _written(out) if out else nullcontext(sys.stdout) as target:
        if form == "focus":
            _focus(queries, where, target, out)
            return
        from millicent.dashboard.exports import as_csv, as_json

        for text in (as_csv if form == "csv" else as_json)(_pages(queries, where)):
            target.write(text)


@contextmanager
def _written(out: Path) -> Iterator[TextIO]:
    """A text file that is there once all of it is."""
    with whole_file(out) as path, path.open("w", encoding="utf-8", newline="") as file:
        yield file


def _pages(queries: LedgerQueries, where: ReceiptFilter) -> Iterator[ReceiptPage]:
    from millicent.dashboard.exports import pages

    return pages(
        lambda limit, after: queries.receipts(where, limit=limit, after=after), after=None, limit=None, size=_PAGE
    )


def _parquet(queries: LedgerQueries, where: ReceiptFilter, out: Path | None) -> None:
    from millicent.dashboard.exports import column_kinds, row

    if out is None:
        raise ConfigError("Parquet is no text: name a file with --out.")
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise ConfigError("Parquet needs pyarrow: pip install 'millicent[parquet]', or choose --format csv.") from None
    kinds = {"integer": pa.int64(), "real": pa.float64(), "boolean": pa.bool_(), "text": pa.string()}
    schema = pa.schema([(name, kinds[kind]) for name, kind in column_kinds().items()])
    with whole_file(out) as path, pq.ParquetWriter(path, schema) as writer:
        for page in _pages(queries, where):
            writer.write_table(pa.Table.from_pylist([row(receipt) for receipt in page.receipts], schema))


def _focus(queries: LedgerQueries, where: ReceiptFilter, target: Any, out: Path | None) -> None:
    import csv

    from millicent.cli import show
    from millicent.ledger import focus
    from millicent.ledger.queries import ReceiptFilter

    writer = csv.DictWriter(target, focus.COLUMNS)
    writer.writeheader()
    left: list[focus.Row] = []
    for receipt in chain.from_iterable(page.receipts for page in _pages(queries, where)):
        writer.writerows(focus.charges(receipt))
        left += focus.unpriced(receipt)
    # A machine's idle time is nobody's: it is exported only with everything.
    if where == ReceiptFilter(from_ns=where.from_ns, to_ns=where.to_ns):
        accounts = queries.accounts(-(2**62) if where.from_ns is None else where.from_ns, where.to_ns or 2**62)
        writer.writerows(focus.machine_charges(accounts))
        left += focus.unpriced_machines(accounts)
    if left and out is not None:
        side = out.with_name(f"{out.name}.unpriced.csv")
        with _written(side) as file:
            listing = csv.DictWriter(file, focus.UNPRICED_COLUMNS)
            listing.writeheader()
            listing.writerows(left)
        show.note(f"{len(left)} unpriced, in {side}: nobody knows what they cost, so they are no charge.")
    elif left:
        show.note(f"{len(left)} unpriced and left out: nobody knows what they cost. --out FILE lists them beside it.")


@click.command(name="import")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--format",
    "name",
    type=click.Choice(("openai", "anthropic", "litellm", "table", "revenue", "costs")),
    help="Else recognised.",
)
@click.option("--placement", help="Under which placement it is filed; else the format's name.")
@click.option("--dry-run", is_flag=True, help="Check every row and write nothing.")
@exact_json_option
def import_(
    file: Path, name: str | None, placement: str | None, dry_run: bool, json_: bool, **columns: str | None
) -> None:
    """Take in usage from elsewhere: OpenAI's or Anthropic's export, LiteLLM's spend logs, or any CSV.

    Every row becomes a receipt, so that reports are useful before the first request. Importing a row again adds
    nothing. For a CSV of your own, name its columns: --time, --model and what else there is.

    With --format revenue or costs: what came in, or was spent elsewhere, with columns period, amount_usd, and what of
    id, user, tier, feature and note there is.
    """
    from millicent.cli import show
    from millicent.ledger import importing

    rows = importing.read_table(_text(file))
    if name in {"revenue", "costs"}:
        from millicent.cli.economics import import_entries

        import_entries(rows, "revenue" if name == "revenue" else "cost", dry_run=dry_run, json_=json_)
        return
    form = _format(rows, name, {field: column for field, column in columns.items() if column})
    receipts = list(importing.receipts_of(rows, form, placement or form.name))
    added = 0
    for start in range(0, 0 if dry_run else len(receipts), _BATCH):
        batch = receipts[start : start + _BATCH]
        added += write_ledger(partial(importing.insert_new, receipts=batch))
    priced = [receipt for receipt in receipts if receipt.total is not None]
    if json_:
        cost = str(sum((receipt.total.usd for receipt in priced if receipt.total), start=0))
        body = {"format": form.name, "rows": len(receipts), "added": added, "unpriced": len(receipts) - len(priced)}
        show.as_json({**body, "cost_usd": cost, "dry_run": dry_run})
        return
    verb = "would be added or are there already" if dry_run else f"read ({form.name}), {added:,} of them new"
    print(f"{len(receipts):,} rows {verb}; {len(receipts) - len(priced):,} without a cost.")


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} is no UTF-8 text (byte {error.start}): save it as CSV in UTF-8.") from None


def _format(rows: list[dict[str, str]], name: str | None, columns: dict[str, str]) -> Format:
    import msgspec

    from millicent.ledger import importing

    if not rows:
        raise ConfigError("the file has no rows: export it with its header and data.")
    known = {each.name: each for each in importing.FORMATS}
    form = known.get(name or "") or (importing.detect(rows) if name is None and not columns else None)
    if form is None and not columns:
        there = ", ".join(list(rows[0])[:12])
        raise ConfigError(f"the file's format isn't known ({there}): name its columns, at least --time and --model.")
    have = {column for row in rows for column in row}
    if strange := [column for column in columns.values() if column not in have]:
        raise ConfigError(f"the file has no column {strange[0]!r}: it has {', '.join(sorted(have)[:12])}.")
    form = form or importing.Format("table", {}, frozenset())
    return msgspec.structs.replace(form, columns=form.columns | columns)


def _column_options(command: click.Command) -> click.Command:
    fields = {
        "time": "when it began",
        "end": "when it ended",
        "id": "an identifier of its own",
        "model": "the model",
        "input": "input tokens, cached ones included",
        "cached": "cached input tokens",
        "cache-write-5m": "tokens written to the cache for five minutes",
        "cache-write-1h": "tokens written to the cache for an hour",
        "output": "output tokens",
        "cost": "what it cost, in dollars",
        "requests": "how many requests the row is the sum of",
        "user": "the user",
        "team": "the team",
        "key": "the key",
        "feature": "the feature",
        "tier": "the tier",
        "status": "how it ended",
    }
    options: list[click.Parameter] = [
        click.Option([f"--{field}"], metavar="COLUMN", help=f"The column with {what}.")
        for field, what in fields.items()
    ]
    command.params[1:1] = options
    return command


import_ = _column_options(import_)


@click.command()
@click.argument("invoice", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--placement", help="Only receipts of this placement: the provider whose invoice it is.")
@click.option("--model", metavar="COLUMN", help="The column that says what was charged for; else recognised.")
@click.option("--amount", metavar="COLUMN", help="The column with the amount, in dollars; else recognised.")
@click.option("--time", metavar="COLUMN", help="The column with the date; else recognised.")
@click.option("--since", metavar="TIME", callback=utc_ns, help="From this time on; else from the invoice's first day.")
@click.option("--until", metavar="TIME", callback=utc_ns, help="Before this time; else to the invoice's last day.")
@exact_json_option
def reconcile(
    invoice: Path, placement: str | None, since: int | None, until: int | None, json_: bool, **columns: str | None
) -> None:
    """Lay an invoice beside the ledger and explain the difference, line by line."""
    from millicent.cli import show
    from millicent.core.money import Money
    from millicent.ledger import reconciling
    from millicent.ledger.importing import read_table

    given = {field: column for field, column in columns.items() if column}
    lines = reconciling.invoice_lines(read_table(_text(invoice)), given)
    if since is None or until is None:
        first, last = reconciling.period_of(lines)
        since, until = first if since is None else since, last if until is None else until
    items = reconciling.reconcile(open_ledger(), lines, since, until, placement)
    sums = [
        Money.total(getattr(item, name) for item in items)
        for name in ("invoice", "attributed", "unattributed", "residual")
    ]
    if json_:
        names = ("invoice_usd", "attributed_usd", "unattributed_usd", "residual_usd")
        data = [
            {
                "name": item.name,
                **dict(
                    zip(names, map(str, (item.invoice, item.attributed, item.unattributed, item.residual)), strict=True)
                ),
                "requests": item.requests,
                "unpriced": item.unpriced,
                "why": item.why,
            }
            for item in items
        ]
        show.as_json({"object": "list", "data": data, "total": dict(zip(names, map(str, sums), strict=True))})
        return
    header = ("INVOICE LINE", "INVOICE", "ATTRIBUTED", "UNATTRIBUTED", "RESIDUAL", "UNPRICED", "WHY")
    rows = [
        (
            item.name,
            *(_usd(amount) for amount in (item.invoice, item.attributed, item.unattributed, item.residual)),
            f"{item.unpriced:,} of {item.requests:,}",
            item.why,
        )
        for item in items
    ]
    rows.append(("total", *map(_usd, sums), "", reconciling.period_text(since, until)))
    print(show.table(header, rows, right=frozenset(header[1:6])))


def _usd(amount: Money) -> str:
    return f"-${-amount}" if amount.nanousd < 0 else f"${amount}"
