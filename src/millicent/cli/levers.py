"""The parts of `report` about levers: what routing and the response cache did, and what was wasted."""

from __future__ import annotations

from typing import TYPE_CHECKING

from millicent.cli import show

if TYPE_CHECKING:
    from millicent.ledger.queries import LedgerQueries, ReceiptFilter

_WHAT = {
    "cut": "the limit ended the output",
    "unread": "its caller had left",
    "repeated": "the turn before, again, not from a cache",
    "growing": "prompts longer than in the earlier half",
}


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
    header = ("POLICY", "ROUTED", "OF ALL", "TO A CHEAPER MODEL", "ESCALATED", "SAVED (ESTIMATED)", "COUNTED")
    cells = [
        (
            each.policy,
            f"{each.routed:,}",
            f"{each.routed / each.requests:.1%}",
            f"{each.cheaper / each.routed:.1%}",
            f"{each.escalated / each.routed:.1%}",
            each.saved.human(),
            f"{each.counted:,}",
        )
        for each in found
    ]
    print(show.table(header, cells, right=frozenset(header[1:])))


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
    header = (
        "MODEL",
        "REQUESTS",
        "HITS",
        "OF ALL",
        "MISSES",
        "BYPASSED",
        "TOKENS GIVEN",
        "SAVED (ESTIMATED)",
        "COUNTED",
    )
    cells = [
        (
            each.model,
            f"{each.requests:,}",
            f"{each.hits:,}",
            f"{each.hits / each.requests:.1%}",
            f"{each.misses:,}",
            f"{each.bypassed:,}",
            f"{each.tokens:,}",
            each.saved.human(),
            f"{each.counted:,}",
        )
        for each in found
    ]
    print(show.table(header, cells, right=frozenset(header[1:])))


def show_waste(ledger: LedgerQueries, where: ReceiptFilter, *, json_: bool) -> None:
    found = ledger.waste(where)
    if json_:
        rows = [
            {
                "kind": each.kind,
                "feature": each.feature,
                "requests": each.requests,
                "tokens": each.tokens,
                "cost_usd": str(each.cost),
                "unpriced": each.unpriced,
                "provenance": "estimated" if each.kind in {"repeated", "growing"} else "measured",
            }
            for each in found
        ]
        show.as_json({"object": "list", "data": rows})
        return
    header = ("WASTE", "FEATURE", "REQUESTS", "TOKENS", "COST", "UNPRICED", "WHAT")
    cells = [
        (
            each.kind,
            each.feature if each.feature is not None else "unattributed",
            f"{each.requests:,}",
            f"{each.tokens:,}",
            each.cost.human(),
            f"{each.unpriced:,}",
            _WHAT[each.kind],
        )
        for each in found
    ]
    print(show.table(header, cells, right=frozenset({"REQUESTS", "TOKENS", "COST", "UNPRICED"})))
    show.note("A request may be wasted in several ways. `repeated` and `growing` are estimates, at most.")
    show.note("What system prompts cost isn't known: the ledger keeps no parts of prompts.")
