"""`plan estimate` and `plan scenarios`: before it is built, and what came of it."""

from __future__ import annotations

from decimal import Decimal, InvalidOperation
from typing import TYPE_CHECKING, Any

import click

from millicent.cli.home import open_ledger, settings
from millicent.cli.options import exact_json_option

if TYPE_CHECKING:
    from collections.abc import Callable
    from fractions import Fraction

    from millicent.economics.estimate import Estimated, Scenario
    from millicent.economics.scenarios import Beside, Outcome

_percent = click.IntRange(0, 100)


def _number(least: int) -> Callable[[click.Context, click.Parameter, str], Decimal]:
    """Exact, as it was written."""

    def read(context: click.Context, parameter: click.Parameter, value: str) -> Decimal:
        try:
            number = Decimal(value)
        except InvalidOperation:
            number = Decimal("NaN")
        if not number.is_finite() or not least <= number <= 10**6:
            what = f"{value!r} must be a number from {least} to 1,000,000."
            raise click.BadParameter(what, ctx=context, param=parameter)
        return number

    return read


@click.command()
@click.option("--users", type=click.IntRange(min=1), required=True, help="How many use it in a month.")
@click.option(
    "--sessions", callback=_number(0), metavar="NUMBER", default="1", show_default=True, help="A month, of each user."
)
@click.option("--calls", callback=_number(0), metavar="NUMBER", default="1", show_default=True, help="In a session.")
@click.option("--in", "input_tokens", type=click.IntRange(min=0), help="Tokens that a call sends.")
@click.option("--out", "output_tokens", type=click.IntRange(min=0), help="Tokens that a call gets.")
@click.option("--spread", type=_percent, default=30, show_default=True, help="So many percent more or fewer tokens.")
@click.option("--cache", type=_percent, default=0, show_default=True, help="Percent of the input read from a cache.")
@click.option(
    "--batch", type=_percent, default=0, show_default=True, help="Percent of the calls that wait for a batch."
)
@click.option(
    "--peak", callback=_number(1), metavar="NUMBER", default="3", show_default=True, help="Busiest hour over average."
)
@click.option("--like", metavar="FEATURE", help="Tokens, cache share and peak as measured of this feature.")
@click.option("--model", "models", multiple=True, help="An API's model: gpt-5-mini, or groq/NAME. Repeat it.")
@click.option(
    "--machine", "stated", multiple=True, metavar="NAME,KEY=VALUE,...", help="A machine as in [machines.NAME]."
)
@click.option("--feature", help="What it will be called: then what happens can be put beside this.")
@click.option("--save", metavar="NAME", help="Keep it as a scenario; `millicent plan scenarios NAME` compares later.")
@exact_json_option
def estimate(save: str | None, like: str | None, stated: tuple[str, ...], json_: bool, **given: Any) -> None:
    """Say what something that isn't built would cost a month, model by model, with a range.

    Low: fewer tokens by the spread. High: more by it, and nothing read from a cache.
    """
    from millicent import config
    from millicent.cli import show
    from millicent.core.clock import SystemClock
    from millicent.dashboard.plan_json import estimate_body
    from millicent.economics.estimate import estimate as estimate_months
    from millicent.economics.machines import machine_from
    from millicent.economics.scenarios import Scenarios

    scenario = _scenario(like, **given)
    clock = SystemClock()
    setup = config.plan_setup(settings(), clock.now_ns(), dict(machine_from(text) for text in stated))
    found = estimate_months(scenario, setup, clock.now_ns())
    if save is not None:
        Scenarios(config.home()).save(save, scenario, found, clock)
    if json_:
        show.as_json(estimate_body(scenario, found))
        return
    print(
        f"{round(scenario.calls_per_month):,} calls a month of {scenario.input_tokens:,} tokens in and "
        f"{scenario.output_tokens:,} out, {scenario.spread_percent}% more or fewer; {scenario.cache_percent}% of the "
        f"input cached, {scenario.batch_percent}% of the calls in batches.\n"
    )
    header = ("MODEL", "A MONTH", "FROM", "TO", "A CALL", "A USER", "MACHINES", "PRICES FROM")
    print(show.table(header, [_row(each) for each in found], right=frozenset(header[1:-1])))
    for note in dict.fromkeys(note for each in found for note in each.notes):
        about = ", ".join(each.name for each in found if note in each.notes)
        show.note(show.printable(f"{about}: {note}"))
    if save is not None:
        show.note(f"Saved as {save}: `millicent plan scenarios {save}` puts what happened beside it.")


@click.command()
@click.argument("name", required=False)
@click.option("--remove", is_flag=True, help="Delete it.")
@exact_json_option
def scenarios(name: str | None, remove: bool, json_: bool) -> None:
    """List the scenarios that were saved; or put what happened since beside one, line by line."""
    from millicent import config
    from millicent.cli import show
    from millicent.core.clock import SystemClock
    from millicent.dashboard.plan_json import outcome_body, saved_body
    from millicent.economics.scenarios import Scenarios, outcome

    kept = Scenarios(config.home())
    if name is None:
        saved = [kept.load(each) for each in kept.names()]
        if json_:
            show.as_json({"object": "list", "data": [saved_body(each) for each in saved]})
            return
        rows = [
            (
                each.name,
                show.moment(each.saved_at_ns),
                each.scenario.feature or "-",
                f"{round(each.scenario.calls_per_month):,}",
            )
            for each in saved
        ]
        header = ("SCENARIO", "SAVED (UTC)", "FEATURE", "CALLS A MONTH")
        print(show.table(header, rows, right=frozenset(header[3:])))
        return
    if remove:
        kept.remove(name)
        print(f"{name} is gone.")
        return
    found = outcome(open_ledger(), SystemClock(), kept.load(name))
    if json_:
        show.as_json(outcome_body(found))
        return
    print(_outcome(found))


def _scenario(like: str | None, **given: Any) -> Scenario:
    """As stated; what is `like` a feature, as measured of it."""
    from millicent.core.clock import SystemClock
    from millicent.economics.estimate import Scenario
    from millicent.economics.estimate import like as measured_like
    from millicent.economics.traffic import lately, read_traffic
    from millicent.ledger.queries import ReceiptFilter

    tokens = given["input_tokens"], given["output_tokens"]
    if like is None and None in tokens:
        raise click.UsageError("say how long a call is with --in and --out, or --like a feature that there is")
    if like is not None and tokens != (None, None):
        raise click.UsageError("--like measures the tokens: leave out --in and --out")
    scenario = Scenario(
        users=given["users"],
        sessions=given["sessions"],
        calls=given["calls"],
        input_tokens=given["input_tokens"] or 0,
        output_tokens=given["output_tokens"] or 0,
        spread_percent=given["spread"],
        cache_percent=given["cache"],
        batch_percent=given["batch"],
        peak=given["peak"],
        models=given["models"],
        feature=given["feature"],
    )
    if like is None:
        return scenario
    return measured_like(scenario, read_traffic(open_ledger(), lately(SystemClock(), ReceiptFilter(feature=like))))


def _row(each: Estimated) -> tuple[str, ...]:
    from millicent.cli import show

    amounts = (each.expected, each.low, each.high, each.per_call, each.per_user)
    return (
        each.name,
        *(show.amount(amount, "unknown") for amount in amounts),
        "-" if each.machines is None else f"{each.machines:,}",
        each.source or "-",
    )


def _outcome(found: Outcome) -> str:
    from millicent.cli import show

    traffic, saved = found.traffic, found.saved
    seen = f"{traffic.requests:,} requests in {traffic.hours:,} hours" if traffic.requests else "no request yet"
    header = (saved.name.upper(), "EXPECTED", "HAPPENED", "CHANGE")
    rows = [
        (each.what, _figure(each, each.expected), _figure(each, each.happened), _change(each)) for each in found.beside
    ]
    table = show.table(header, rows, right=frozenset(header[1:]))
    return f"Feature {saved.scenario.feature} since {show.moment(saved.saved_at_ns)} UTC: {seen}.\n\n{table}"


def _figure(beside: Beside, value: Fraction | None) -> str:
    from millicent.core.money import Money

    if value is None:
        return "unknown"
    if beside.unit == "usd":
        return Money(round(value * 10**9)).human()
    text = f"{float(value):,.1f}".removesuffix(".0")
    return f"{text}%" if beside.unit == "percent" else text


def _change(beside: Beside) -> str:
    return "-" if beside.change is None else f"{float(beside.change):+.1%}"
