"""The parts of `report` about levers: what routing and the response cache did, and what was wasted."""

from __future__ import annotations

from typing import TYPE_CHECKING

from millicent.cli import show
from millicent.core.clock import iso_utc

if TYPE_CHECKING:
    from millicent.ledger.queries import LedgerQueries, ReceiptFilter
    from millicent.ledger.waste import Waste


def show_coverage(ledger: LedgerQueries, where: ReceiptFilter, *, json_: bool) -> None:
    found = ledger.coverage(where)
    if json_:
        rows = [
            {
                "policy": each.policy,
                "routed": each.routed,
                "cheaper": each.cheaper,
                "escalated": each.escalated,
                "saved_usd": str(each.saved),
                "saved_counted": each.counted,
                "saved_provenance": "estimated",
                "requests": each.requests,
            }
            for each in found
        ]
        show.as_json({"object": "list", "data": rows})
        return
    print(
        show.table_of(
            found,
            ("POLICY", lambda each: each.policy),
            ("ROUTED", lambda each: f"{each.routed:,}"),
            ("OF ALL", lambda each: f"{each.routed / each.requests:.1%}"),
            ("TO A CHEAPER MODEL", lambda each: f"{each.cheaper / each.routed:.1%}"),
            ("ESCALATED", lambda each: f"{each.escalated / each.routed:.1%}"),
            ("SAVED (ESTIMATED)", lambda each: each.saved.human()),
            ("COUNTED", lambda each: f"{each.counted:,}"),
        )
    )


def show_cache(ledger: LedgerQueries, where: ReceiptFilter, *, json_: bool) -> None:
    found = ledger.cache_use(where)
    if json_:
        rows = [
            {
                "model": each.model,
                "requests": each.requests,
                "hits": each.hits,
                "misses": each.misses,
                "bypassed": each.bypassed,
                "output_tokens": each.tokens,
                "saved_usd": str(each.saved),
                "saved_counted": each.counted,
                "saved_provenance": "estimated",
            }
            for each in found
        ]
        show.as_json({"object": "list", "data": rows})
        return
    print(
        show.table_of(
            found,
            ("MODEL", lambda each: each.model),
            ("REQUESTS", lambda each: f"{each.requests:,}"),
            ("HITS", lambda each: f"{each.hits:,}"),
            ("OF ALL", lambda each: f"{each.hits / each.requests:.1%}"),
            ("MISSES", lambda each: f"{each.misses:,}"),
            ("BYPASSED", lambda each: f"{each.bypassed:,}"),
            ("TOKENS GIVEN", lambda each: f"{each.tokens:,}"),
            ("SAVED (ESTIMATED)", lambda each: each.saved.human()),
            ("COUNTED", lambda each: f"{each.counted:,}"),
        )
    )


def show_waste(ledger: LedgerQueries, where: ReceiptFilter, *, json_: bool) -> None:
    from millicent.ledger.waste import ADVICE

    report = ledger.waste(where)
    if json_:
        show.as_json(
            {
                "object": "list",
                "data": [_waste_row(each) for each in report.found],
                "read": report.read,
                "of": report.of,
                "from": None if report.from_ns is None else iso_utc(report.from_ns),
            }
        )
        return
    print(
        show.table_of(
            report.found,
            ("WASTE", lambda each: each.kind),
            ("FEATURE", lambda each: each.feature if each.feature is not None else "unattributed"),
            ("REQUESTS", lambda each: f"{each.requests:,}"),
            ("TOKENS", lambda each: f"{each.tokens:,}"),
            ("COST", lambda each: each.cost.human()),
            ("UNPRICED", lambda each: f"{each.unpriced:,}"),
            ("EXAMPLE", lambda each: each.example),
            ("WHAT", _told),
            right=frozenset({"REQUESTS", "TOKENS", "COST", "UNPRICED"}),
        )
    )
    for kind in dict.fromkeys(each.kind for each in report.found):
        advice = ADVICE[kind]
        lines = "" if advice.config is None else f" ({advice.config.replace(chr(10), ' ')})"
        show.note(f"{kind}: {advice.do}{lines}.")
    show.note("A request may be wasted in several ways. All but `cut` and `unread` are estimates, at most.")
    if report.read < report.of and report.from_ns is not None:
        show.note(
            f"The latest {report.read:,} of {report.of:,} receipts were read, from {show.moment(report.from_ns)} UTC;"
            " `growing` is of all. --since and --until choose others."
        )


def _told(waste: Waste) -> str:
    """With the figures that only its kind has."""
    from millicent.ledger.waste import ADVICE

    what = ADVICE[waste.kind].what
    if waste.per_hour is not None:
        return f"{waste.model}: {waste.prefix_tokens:,} tokens {what}, {waste.per_hour:,} an hour"
    if waste.share is not None:
        return f"{what}: {waste.share:.0%}, {waste.prefix_tokens:,} tokens each"
    if waste.before_tokens is None:
        return what
    grown = f"{what}: {waste.before_tokens:,} -> {waste.after_tokens:,} tokens"
    if waste.tokens_per_turn is not None:
        return f"{grown}, {waste.tokens_per_turn:,} more each turn"
    return grown if waste.tokens_per_week is None else f"{grown}, {waste.tokens_per_week:,} more each week"


def _waste_row(waste: Waste) -> dict[str, object]:
    from millicent.ledger.waste import ADVICE

    advice = ADVICE[waste.kind]
    return {
        "kind": waste.kind,
        "feature": waste.feature,
        "model": waste.model,
        "requests": waste.requests,
        "tokens": waste.tokens,
        "cost_usd": str(waste.cost),
        "unpriced": waste.unpriced,
        "provenance": waste.provenance.value,
        "example": waste.example,
        "prefix_tokens": waste.prefix_tokens,
        "per_hour": waste.per_hour,
        "share_of_input_cost": waste.share,
        "before_tokens": waste.before_tokens,
        "after_tokens": waste.after_tokens,
        "tokens_per_week": waste.tokens_per_week,
        "tokens_per_turn": waste.tokens_per_turn,
        "advice": advice.do,
        "config": advice.config,
    }
