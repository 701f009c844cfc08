"""Options that several commands have, and what is written in them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from millicent.core.clock import NS_PER_S, SystemClock, parse_time_ns

if TYPE_CHECKING:
    from millicent.ledger.queries import ReceiptFilter

_ATTRIBUTES = ("feature", "user", "team", "model", "key", "tier", "placement", "conversation", "run", "status")
_NS_PER_UNIT = {"s": NS_PER_S, "m": 60 * NS_PER_S, "h": 3600 * NS_PER_S, "d": 86400 * NS_PER_S, "w": 604800 * NS_PER_S}
# From now so far back or ahead, times fit the ledger's 64 bits.
_LONGEST_NS = 2**62

json_option = click.option("--json", "json_", is_flag=True, help="Print JSON.")
exact_json_option = click.option("--json", "json_", is_flag=True, help="Print JSON; amounts are exact decimal strings.")
url_option = click.option(
    "--url", envvar="MILLICENT_URL", default="http://127.0.0.1:8080", show_default=True, help="The running server."
)


def filters(command: Callable[..., None]) -> Callable[..., None]:
    """The same filters on every command that reads receipts; `where_of` takes them."""
    command = click.option("--until", metavar="TIME", callback=utc_ns, help="Only those created before this time.")(
        command
    )
    command = click.option(
        "--since",
        metavar="TIME",
        callback=utc_ns,
        help="Only those created from this time on: 2026-01-31, 2026-01-31T09:00, or 24h ago.",
    )(command)
    for name in reversed(_ATTRIBUTES):
        command = click.option(f"--{name}", help=f'Only those with this {name}; "" for none.')(command)
    return command


def where_of(given: dict[str, Any]) -> ReceiptFilter:
    from millicent.ledger.queries import ReceiptFilter

    return ReceiptFilter(from_ns=given.pop("since"), to_ns=given.pop("until"), **given)


def utc_ns(context: click.Context, parameter: click.Parameter, value: str | None) -> int | None:
    """A time as UTC nanoseconds: `2026-01-31`, `2026-01-31T09:00`, or how long ago: `90m`, `24h`, `7d`."""
    if value is None:
        return None
    if (ago_ns := _span_ns(value)) is not None:
        return SystemClock().now_ns() - ago_ns
    try:
        return parse_time_ns(value)
    except ValueError as error:
        what = f"{value!r} is no time: write 2026-01-31, 2026-01-31T09:00 (UTC) or 24h, 7d (ago)."
        raise click.BadParameter(what, ctx=context, param=parameter) from error


def duration_ns(context: click.Context, parameter: click.Parameter, value: str | None) -> int | None:
    if value is None:
        return None
    span_ns = _span_ns(value)
    if span_ns is None:
        raise click.BadParameter(f"{value!r} is no duration: write 30m, 24h, 90d or 4w.", context, parameter)
    return span_ns


def _span_ns(written: str) -> int | None:
    """`90m`, `24h`, `7d`; None where it is none, or one that no clock tells."""
    number, unit = written[:-1], written[-1:]
    if unit not in _NS_PER_UNIT or not number.isdecimal() or len(number) > 12:
        return None
    span_ns = int(number) * _NS_PER_UNIT[unit]
    return span_ns if span_ns < _LONGEST_NS else None
