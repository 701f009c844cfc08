"""`eval`: the same prompts to several models, through a server, so that comparing them is metered too."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from millicent.cli.options import exact_json_option, url_option

if TYPE_CHECKING:
    from millicent.cli.client import Client
    from millicent.ledger.worth import Usefulness
    from millicent.routing.graded_sets import Graded, Item

# So many refusals in a row, and the server isn't in a state to compare models.
_MOST_FAILURES = 5


@click.command(name="eval")
@click.argument("prompts", metavar="SET", type=click.Path(path_type=Path, dir_okay=False))
@click.option(
    "--model", "models", multiple=True, required=True, help="Compare this one; several times, smallest first."
)
@click.option("--judge", help="The model that answers the set's `judge` questions.")
@click.option(
    "--floor", type=click.FloatRange(0, 1), help="The quality that is needed, from 0 to 1: who surely has it for least?"
)
@click.option(
    "--results", type=click.Path(path_type=Path, dir_okay=False), help="Kept here. [default: SET.results.jsonl]"
)
@click.option("--parallel", type=click.IntRange(1, 64), default=4, show_default=True, help="Requests at a time.")
@url_option
@exact_json_option
def evaluate(
    prompts: Path,
    models: tuple[str, ...],
    judge: str | None,
    floor: float | None,
    results: Path | None,
    parallel: int,
    url: str,
    json_: bool,
) -> None:
    """Compare models on prompts with known good answers: quality, cost, latency, and what a useful answer costs.

    SET is a JSON Lines file: in each line `prompt` or `messages`, and one or more of `expect` (the exact answer),
    `pattern` (a regular expression), `json_schema`, `judge` (a question about the answer, for the model --judge). What
    was graded is kept beside it, without the answers, so that the command goes on where it stopped; a line that is
    changed is asked again.

    Every receipt has the run `eval` and the tag `eval=SET`. Exit status 3: no model surely meets --floor.
    """
    import msgspec

    from millicent.cli import show
    from millicent.cli.client import Client
    from millicent.routing.graded_sets import read_graded, read_set

    items = read_set(prompts, judge)
    kept = results or prompts.with_suffix(".results.jsonl")
    graded = read_graded(kept)
    wanted = [(item, model) for model in dict.fromkeys(models) for item in items if (item.id, model) not in graded]
    failures: list[str] = []
    if wanted:
        headers = {"X-Millicent-Run": "eval", "X-Millicent-Tags": f"eval={_tag(prompts)}"}
        with kept.open("ab") as file:
            for found in _asked(Client(url), wanted, headers, parallel, failures):
                graded[found.item, found.model] = found
                file.write(msgspec.json.encode(found) + b"\n")
                file.flush()
    rows = {model: [graded[item.id, model] for item in items if (item.id, model) in graded] for model in models}
    chosen = _chosen(rows, floor, len(items))
    if json_:
        show.as_json(_body(rows, floor, chosen, failures))
    else:
        print(_table(rows))
        _remarks(rows, floor, chosen, failures, len(items))
    if failures or (floor is not None and chosen is None):
        click.get_current_context().exit(3 if not failures else 1)


def _asked(
    client: Client,
    wanted: Sequence[tuple[Item, str]],
    headers: dict[str, str],
    parallel: int,
    failures: list[str],
) -> Iterator[Graded]:
    """As they are graded. What fails is told in `failures`, and asked again the next time."""
    from concurrent.futures import ThreadPoolExecutor, as_completed

    from rich.console import Console
    from rich.progress import Progress

    from millicent.core.errors import MillicentError

    in_a_row = 0
    with (
        Progress(console=Console(stderr=True), transient=True) as progress,
        ThreadPoolExecutor(parallel) as pool,
        contextlib.ExitStack() as ending,
    ):
        task = progress.add_task(f"{len(wanted)} answers", total=len(wanted))
        asked = [pool.submit(_grade, client, item, model, headers) for item, model in wanted]
        ending.callback(pool.shutdown, wait=False, cancel_futures=True)
        for done in as_completed(asked):
            try:
                graded = done.result()
            except MillicentError as error:
                failures.append(error.message)
                in_a_row += 1
                if in_a_row >= _MOST_FAILURES:
                    return
            else:
                in_a_row = 0
                yield graded
            progress.advance(task)


def _grade(client: Client, item: Item, model: str, headers: dict[str, str]) -> Graded:
    from millicent.core.clock import NS_PER_MS, SystemClock
    from millicent.routing.checks import approves
    from millicent.routing.graded_sets import Graded

    clock = SystemClock()
    began_ns = clock.monotonic_ns()
    text, answered = client.answer({"model": model, **item.body}, headers)
    latency_ms = (clock.monotonic_ns() - began_ns) // NS_PER_MS
    passed, judged = item.passes(text), None
    if passed and item.judged_by is not None:
        verdict, judged = client.answer(item.asked_of_judge(text), headers)
        passed = bool(approves(verdict))
    return Graded(
        item.id, model, passed, _cost(answered.usage), None if judged is None else _cost(judged.usage), latency_ms,
        answered.receipt,
    )  # fmt: skip


def _cost(usage: dict[str, Any]) -> str | None:
    cost = usage.get("cost")
    return None if cost is None else format(cost, "f")


def _worth(model: str, rows: Sequence[Graded]) -> Usefulness:
    """Quality is the rate of answers that passed; the judge isn't part of what a model costs."""
    from millicent.core.money import Money
    from millicent.ledger.worth import Usefulness

    priced = [Money.from_usd(each.cost_usd) for each in rows if each.cost_usd is not None]
    return Usefulness(model, len(rows), len(priced), Money.total(priced), len(rows), sum(each.passed for each in rows))


def _chosen(rows: dict[str, list[Graded]], floor: float | None, items: int) -> str | None:
    """The cheapest of those whose interval's lower end reaches the floor; unpriced ones last, then as they were named.
    Who hasn't answered everything isn't judged."""
    if floor is None:
        return None
    able = []
    for order, (model, graded) in enumerate(rows.items()):
        worth = _worth(model, graded)
        interval = worth.rate_interval
        if len(graded) == items and interval is not None and interval[0] >= floor:
            known = worth.priced == len(graded)
            able.append((not known, worth.cost.nanousd if known else 0, order, model))
    return min(able)[-1] if able else None


def _quantile_ms(rows: Sequence[Graded], percent: int) -> int | None:
    from millicent.core.tallies import nearest_rank

    return nearest_rank(sorted(each.latency_ms for each in rows), percent) if rows else None


def _body(
    rows: dict[str, list[Graded]], floor: float | None, chosen: str | None, failures: list[str]
) -> dict[str, Any]:
    from millicent.core.money import exact_usd

    data = []
    for model, graded in rows.items():
        worth = _worth(model, graded)
        ends = worth.cost_per_useful_interval
        data.append(
            {
                "model": model,
                "answers": len(graded),
                "passed": worth.useful,
                "quality": None if worth.rate is None else round(worth.rate, 6),
                "quality_interval": None if worth.rate_interval is None else [round(e, 6) for e in worth.rate_interval],
                "cost_usd": str(worth.cost),
                "unpriced": len(graded) - worth.priced,
                "cost_per_useful_usd": exact_usd(worth.cost_per_useful),
                "cost_per_useful_interval_usd": [exact_usd(end) for end in ends],
                "latency_ms": {"p50": _quantile_ms(graded, 50), "p95": _quantile_ms(graded, 95)},
            }
        )
    return {
        "object": "evaluation",
        "data": data,
        "floor": floor,
        "chosen": chosen,
        "spent_usd": str(_spent(rows)),
        "failures": failures,
    }


def _spent(rows: dict[str, list[Graded]]) -> Any:
    """On all answers kept, the judge's words included; what is unpriced isn't in it."""
    from millicent.core.money import Money

    every = [each for graded in rows.values() for each in graded]
    costs = [cost for each in every for cost in (each.cost_usd, each.judge_cost_usd) if cost is not None]
    return Money.total(Money.from_usd(cost) for cost in costs)


def _table(rows: dict[str, list[Graded]]) -> str:
    from millicent.cli import show
    from millicent.core.money import Money

    header = ("MODEL", "ANSWERS", "QUALITY", "95%", "MEAN COST", "PER USEFUL", "P50", "P95")
    cells = []
    for model, graded in rows.items():
        worth = _worth(model, graded)
        rate, interval = worth.rate, worth.rate_interval
        mean = Money(worth.cost.nanousd // worth.priced) if worth.priced else None
        cells.append(
            (
                model,
                f"{len(graded):,}",
                show.percent(rate),
                "-" if interval is None else f"{interval[0]:.1%} to {interval[1]:.1%}",
                show.amount(mean),
                show.amount(worth.cost_per_useful, "-"),
                *(f"{ms:,} ms" if (ms := _quantile_ms(graded, each)) is not None else "-" for each in (50, 95)),
            )
        )
    return show.table(header, cells, right=frozenset(header[1:]))


def _remarks(
    rows: dict[str, list[Graded]], floor: float | None, chosen: str | None, failures: list[str], items: int
) -> None:
    from millicent.cli import show

    show.note(
        f"Spent on these answers, and on judging them: {_spent(rows).human()}. Their receipts have the run `eval`."
    )
    if failures:
        left = sum(items - len(graded) for graded in rows.values())
        show.note(f"{left} answers are missing, {failures[-1]} Run this again to go on.")
    if chosen is not None:
        print(f"\n{chosen} is the cheapest whose quality is surely at least {floor:.0%}.")
    elif floor is not None:
        print(f"\nNone is surely at least {floor:.0%} good: give more prompts, or a lower floor.")


def _tag(path: Path) -> str:
    """The set's name as a tag's value."""
    return "".join(each if each.isalnum() or each in "-_." else "_" for each in path.stem)[:64]
