"""`keys` and `budgets`: they work on the ledger's file, whether or not a server runs; one that does knows at once."""

from __future__ import annotations

from decimal import Decimal, InvalidOperation
from typing import TYPE_CHECKING, Any

import click

from millicent.cli.home import write_ledger
from millicent.cli.options import duration_ns, json_option

if TYPE_CHECKING:
    from millicent.control.keys import ApiKey
    from millicent.core.budgets import Budget


def _dollars(context: click.Context, parameter: click.Parameter, value: str | None) -> Decimal | None:
    if value is None:
        return None
    try:
        return Decimal(value.removeprefix("$"))
    except InvalidOperation as error:
        raise click.BadParameter(
            f"{value!r} is no amount: write dollars, such as 12.50.", context, parameter
        ) from error


@click.group()
def keys() -> None:
    """Make, list, rotate and revoke API keys. Once there is one, every call needs one."""


@keys.command("create")
@click.argument("name", required=False)
@click.option(
    "--scope",
    type=click.Choice(["admin", "viewer", "client"]),
    default="client",
    show_default=True,
    help="admin does everything; viewer reads everything; client runs models and reads its own receipts.",
)
@click.option("--expires", "expires_ns", metavar="DURATION", callback=duration_ns, help="Good for so long: 24h, 90d.")
@click.option("--user", help="Pin: every request of the key is this user's.")
@click.option("--team", help="Pin the team.")
@click.option("--feature", help="Pin the feature.")
@click.option("--tier", help="Pin the tier.")
@click.option("--model", "models", multiple=True, help="Only this model; may be given several times.")
@click.option("--requests-per-minute", type=click.IntRange(min=1), help="Its own limit instead of that in [limits].")
@click.option("--tokens-per-minute", type=click.IntRange(min=1), help="Its own limit instead of that in [limits].")
@click.option("--usd-per-minute", callback=_dollars, help="Its own limit instead of that in [limits].")
@click.option("--concurrent", type=click.IntRange(min=1), help="Its own limit instead of that in [limits].")
@click.option("--priority", type=int, help="The best (lowest) priority that its requests may have; 0 if not given.")
@json_option
def create_key(
    name: str | None, scope: str, expires_ns: int | None, models: tuple[str, ...], json_: bool, **rest: Any
) -> None:
    """Make a key and print it, once: only a hash of it is kept."""
    from millicent.cli import show
    from millicent.control.config import Rates
    from millicent.control.keys import Scope, insert_key, new_key
    from millicent.control.showing import key_body
    from millicent.core.clock import SystemClock
    from millicent.core.identifiers import SystemIds

    clock = SystemClock()
    rates = Rates(**{field: rest.pop(field) for field in Rates.__struct_fields__})
    rates.check("key:")
    key, token = new_key(
        SystemIds(clock),
        clock,
        name=name,
        scope=Scope(scope),
        expires_at_ns=None if expires_ns is None else clock.now_ns() + expires_ns,
        models=models or None,
        rates=rates,
        **rest,
    )
    write_ledger(lambda connection: insert_key(connection, key))
    if json_:
        show.as_json(key_body(key, clock.now_ns()) | {"token": token})
        return
    print(token)
    show.note(
        f"Key {key.id} ({key.scope}). It is shown only now: put it into MILLICENT_API_KEY, or wherever it is used."
    )


@keys.command("list")
@json_option
def list_keys(json_: bool) -> None:
    """List all keys, those that are revoked or have expired too."""
    from millicent.cli import show
    from millicent.control.keys import read_keys
    from millicent.control.showing import key_body
    from millicent.core.clock import SystemClock

    now_ns = SystemClock().now_ns()
    found = write_ledger(read_keys)
    if json_:
        show.as_json({"object": "list", "data": [key_body(key, now_ns) for key in found]})
        return
    header = ("KEY", "NAME", "SCOPE", "STATE", "CREATED (UTC)", "EXPIRES (UTC)", "PINNED", "MODELS")
    print(show.table(header, [_key_row(key, now_ns) for key in found]))


@keys.command("rotate")
@click.argument("key_id", metavar="ID")
@click.option(
    "--overlap",
    "overlap_ns",
    metavar="DURATION",
    default="24h",
    show_default=True,
    callback=duration_ns,
    help="How long the old secret stays good.",
)
@json_option
def rotate(key_id: str, overlap_ns: int, json_: bool) -> None:
    """Give the key a new secret and print it; everything else about it stays."""
    from millicent.cli import show
    from millicent.control.keys import rotate_key
    from millicent.core.clock import SystemClock

    now_ns = SystemClock().now_ns()
    token = write_ledger(lambda connection: rotate_key(connection, key_id, now_ns, overlap_ns))
    if json_:
        show.as_json({"id": key_id, "object": "key", "token": token})
        return
    print(token)
    show.note("It is shown only now.")


@keys.command("revoke")
@click.argument("key_id", metavar="ID")
def revoke(key_id: str) -> None:
    """Refuse the key from now on. What it runs just now ends as usual."""
    from millicent.control.keys import revoke_key
    from millicent.core.clock import SystemClock

    now_ns = SystemClock().now_ns()
    write_ledger(lambda connection: revoke_key(connection, key_id, now_ns))
    print(f"{key_id} is revoked.")


@click.group()
def budgets() -> None:
    """Set, list and remove budgets. Those in millicent.toml are changed there."""


@budgets.command("create")
@click.argument("name")
@click.option("--limit", "limit_usd", required=True, metavar="USD", callback=_dollars, help="At most this much.")
@click.option(
    "--every",
    type=click.Choice(["hour", "day", "week", "month", "once"]),
    default="month",
    show_default=True,
    help="When it renews.",
)
@click.option(
    "--per",
    type=click.Choice(["key", "user", "team", "feature", "tier", "run"]),
    help="Each of these has its own; without it, all spend from one.",
)
@click.option("--only", metavar="VALUE", help="Only this one of --per.")
@click.option("--tier", metavar="TIER", help="Only requests of this tier.")
@click.option("--soft", is_flag=True, help="Count, and refuse nothing.")
def create_budget(
    name: str, limit_usd: Decimal, every: str, per: Any, only: str | None, tier: str | None, soft: bool
) -> None:
    """Set a budget, or change it: a new limit holds from the next request on."""
    from millicent.control.budgets import set_budget
    from millicent.control.config import BudgetConfig
    from millicent.core.budgets import Every

    config = BudgetConfig(limit_usd=limit_usd, every=Every(every), per=per, only=only, tier=tier, hard=not soft)
    budget = config.budget(name, "api")
    write_ledger(lambda connection: set_budget(connection, budget))
    print(f"{name}: ${budget.limit}, {'soft' if soft else 'hard'}, {_when(every)}{_whose(budget)}.")


@budgets.command("list")
@json_option
def list_budgets(json_: bool) -> None:
    """List budgets and where they stand."""
    from millicent.cli import show
    from millicent.control.budgets import standing
    from millicent.core.clock import SystemClock
    from millicent.core.money import ZERO
    from millicent.wire.control import budget_body

    now_ns = SystemClock().now_ns()
    found = write_ledger(lambda connection: standing(connection, now_ns))
    if json_:
        show.as_json({"object": "list", "data": [budget_body(budget, balances, now_ns) for budget, balances in found]})
        return
    header = ("BUDGET", "KIND", "RENEWS", "FOR", "LIMIT", "SPENT", "HELD", "LEFT")
    rows = []
    for budget, balances in found:
        kind = "hard" if budget.hard else "soft"
        for subject, spent, held in [(each.subject, each.spent, each.held) for each in balances] or [("", ZERO, ZERO)]:
            whose = "everything" if budget.per is None else f"{budget.per} {subject or budget.only or '(none)'}"
            whose += "" if budget.tier is None else f" of tier {budget.tier}"
            left = budget.limit - spent - held
            amounts = (budget.limit.human(), spent.human(), held.human(), left.human())
            rows.append((budget.name, kind, _when(budget.every), whose, *amounts))
    print(show.table(header, rows, right=frozenset(header[4:])))


@budgets.command("remove")
@click.argument("name")
def remove_budget(name: str) -> None:
    """Remove a budget and what was counted in it; receipts stay."""
    from millicent.control.budgets import drop_budget

    write_ledger(lambda connection: drop_budget(connection, name))
    print(f"{name} is removed.")


def _key_row(key: ApiKey, now_ns: int) -> tuple[str, ...]:
    from millicent.cli import show
    from millicent.control.keys import PINNABLE

    pinned = [f"{field} {value}" for field in PINNABLE if (value := getattr(key, field))]
    return (
        key.id,
        key.name or "-",
        key.scope,
        key.state(now_ns),
        show.moment(key.created_at_ns),
        "never" if key.expires_at_ns is None else show.moment(key.expires_at_ns),
        ", ".join(pinned) or "-",
        "all" if key.models is None else ", ".join(key.models),
    )


def _when(every: str) -> str:
    return "once" if every == "once" else f"every {every}"


def _whose(budget: Budget) -> str:
    if budget.per is None:
        return ", for everything together"
    tier = "" if budget.tier is None else f" of tier {budget.tier}"
    return f", for each {budget.per}{tier}" if budget.only is None else f", for {budget.per} {budget.only}{tier}"
