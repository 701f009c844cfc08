"""`quote` and `reprice`: what a request would cost, and what the past would have."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from millicent.cli.options import exact_json_option, url_option, utc_ns

if TYPE_CHECKING:
    from collections.abc import Sequence

    from millicent.config import Config
    from millicent.ledger.queries import LedgerQueries
    from millicent.meter.placements import Placement

_PAGE = 500


@click.command()
@click.argument("prompt")
@click.option("--model", "models", multiple=True, help="Quote this model; repeat it to compare. By default, the first.")
@click.option("--max-tokens", type=click.IntRange(min=1), help="The answer ends after so many tokens.")
@click.option("--feature", help="Which feature asks: answers are as long as its answers have been.")
@url_option
@exact_json_option
def quote(
    prompt: str, models: tuple[str, ...], max_tokens: int | None, feature: str | None, url: str, json_: bool
) -> None:
    """Say what answering PROMPT would cost and how long it would take, without running it. A PROMPT of - is stdin.

    Each figure is a range that holds the truth nine times out of ten, with what is expected in the middle.
    """
    from millicent.cli import show
    from millicent.cli.client import Client
    from millicent.core.errors import ModelNotFound

    client = Client(url)
    wanted = models or tuple(client.models()[:1])
    if not wanted:
        raise ModelNotFound(f"the server at {client.url} serves no model: start it with `millicent serve MODEL`.")
    text = sys.stdin.read() if prompt == "-" else prompt
    body: dict[str, Any] = {"models": list(wanted), "messages": [{"role": "user", "content": text}]}
    if max_tokens is not None:
        body["max_tokens"] = max_tokens
    if feature is not None:
        body["metadata"] = {"feature": feature}
    answer = client.quote(body)
    if json_:
        show.as_json(answer)
        return
    header = ("MODEL", "PLACEMENT", "IN", "OUT", "FIRST TOKEN", "TOTAL", "COST", "FROM", "TO", "KNOWN BY")
    rows = [_row(each) for each in answer["data"]]
    print(show.table(header, rows, right=frozenset({"IN", "OUT", "FIRST TOKEN", "TOTAL", "COST", "FROM", "TO"})))


@click.command()
@click.argument("book")
@click.option("--at", metavar="TIME", callback=utc_ns, help="Prices as they were at this time; by default, now.")
@click.option(
    "--prices",
    "file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Take [placements] and [prices] from this file instead of millicent.toml.",
)
@click.option("--since", metavar="TIME", callback=utc_ns, help="Only receipts created from this time on.")
@click.option("--until", metavar="TIME", callback=utc_ns, help="Only receipts created before this time.")
@exact_json_option
def reprice(book: str, at: int | None, file: Path | None, since: int | None, until: int | None, json_: bool) -> None:
    """Price closed receipts again, into a new BOOK beside the one that stands, which stays as it is.

    Read it with `millicent report --book BOOK`. A receipt that is in the book already is left alone, so that a run
    that was cut off can be repeated.
    """
    import asyncio

    from millicent import config
    from millicent.cli import show
    from millicent.cli.home import ledger_path, open_ledger
    from millicent.core.clock import SystemClock
    from millicent.core.errors import InvalidRequest
    from millicent.core.receipts import REPORTED_BOOK
    from millicent.ledger.queries import ReceiptFilter
    from millicent.meter.repricing import ACTUAL

    if book in {ACTUAL, REPORTED_BOOK} or not book.isprintable() or not book.strip():
        raise InvalidRequest(f"{book!r} can't be a new book: give it a name of its own.", param="book")
    settings = config.load(file or config.home() / config.FILE_NAME)
    now_ns = SystemClock().now_ns()
    where = ReceiptFilter(from_ns=since, to_ns=until if until is not None else now_ns)
    added, unpriced = asyncio.run(
        _reprice(open_ledger(), ledger_path(), settings, where, now_ns if at is None else at, book)
    )
    if json_:
        show.as_json({"book": book, "receipts": added, "unpriced": unpriced})
        return
    print(
        f"{added:,} receipts in book {book}, {unpriced:,} of them unpriced. `millicent report --book {book}` sums up."
    )


async def _reprice(
    queries: LedgerQueries, path: Path, settings: Config, where: Any, at_ns: int, book: str
) -> tuple[int, int]:
    """How many receipts the book gained, and how many of those have no total."""
    from millicent.core.clock import SystemClock
    from millicent.core.identifiers import SystemIds
    from millicent.ledger.sqlite import SqliteLedger
    from millicent.meter.prices import PriceBook
    from millicent.meter.pricing import total
    from millicent.meter.published_prices import published_prices
    from millicent.meter.repricing import repriced

    clock = SystemClock()
    placements = _placements(settings)
    prices = PriceBook(settings.prices, published_prices)
    ledger = SqliteLedger(path, settings.ledger, clock, SystemIds(clock).new("gw"))
    await ledger.start()
    try:
        added = unpriced = 0
        after: str | None = None
        while True:
            page = queries.receipts(where, limit=_PAGE, after=after)
            entries = {
                receipt.id: repriced(receipt, placements, prices, at_ns, clock.now_ns(), book)
                for receipt in page.receipts
                if receipt.status is not None and not any(line.book == book for line in receipt.lines)
            }
            await ledger.add_lines({receipt_id: lines for receipt_id, lines in entries.items() if lines})
            added += sum(bool(lines) for lines in entries.values())
            unpriced += sum(bool(lines) and total(lines) is None for lines in entries.values())
            after = page.next
            if after is None:
                return added, unpriced
    finally:
        await ledger.stop()


def _placements(settings: Config) -> dict[str, Placement]:
    from millicent.cli.serving import placement_of

    here = placement_of(settings)
    return {here.name: here} | {name: each.placement(name) for name, each in settings.placements.items()}


def _row(body: dict[str, Any]) -> Sequence[str]:
    from millicent.cli import show
    from millicent.core.money import Money

    cost, tokens = body["cost_usd"], body["output_tokens"]
    prices = [None] * 3 if cost is None else [Money.from_usd(cost[name]) for name in ("expected", "low", "high")]
    return (
        body["model"],
        body["placement"],
        show.count(body["input_tokens"]),
        f"{tokens['low']:,}-{tokens['high']:,}",
        _expected(body["ttft_ms"]),
        _expected(body["total_ms"]),
        *(show.amount(price) for price in prices),
        body["provenance"],
    )


def _expected(interval: dict[str, Any] | None) -> str:
    from millicent.cli import show

    return show.duration(None if interval is None else int(interval["expected"] * 1_000_000))
