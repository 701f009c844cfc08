"""The reports of this room, over one ledger and one configuration: asked for by the command line, over HTTP, and by the
pages alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from decimal import Decimal
from typing import Any, cast, get_args

import msgspec

from millicent.core.clock import Clock, parse_time_ns
from millicent.core.errors import InvalidRequest
from millicent.core.periods import Period, month_of, parse_period
from millicent.economics.bodies import body_of
from millicent.economics.changes import ChangeReport, Drift, changes, drifts
from millicent.economics.margin import Books, By, MarginReport, MarginRow, margins, of_users
from millicent.economics.targets import Aim, Target, targets
from millicent.economics.unit import UnitReport, units
from millicent.ledger.queries import GroupBy, LedgerQueries, ReceiptFilter, Totals

_FILTERS = tuple(name for name in ReceiptFilter.__struct_fields__ if name not in {"from_ns", "to_ns"})


class Setting(msgspec.Struct, frozen=True):
    """What the configuration says that reports rest on: see `units` and `targets`."""

    books: Books = Books()
    aims: dict[str, Aim] = {}
    standard: dict[str, Decimal] = {}
    max_sequences: int | None = None


class Reports:
    def __init__(self, ledger: LedgerQueries, clock: Clock, setting: Setting) -> None:
        self.ledger = ledger
        self.setting = setting
        self._clock = clock

    def units(self, by: GroupBy, where: ReceiptFilter, zone: str = "UTC") -> UnitReport:
        setting = self.setting
        return units(
            self.ledger,
            by,
            where,
            self._clock.now_ns(),
            zone=zone,
            standard=setting.standard,
            max_sequences=setting.max_sequences,
        )

    def targets(self, where: ReceiptFilter) -> list[Target]:
        return targets(self.ledger, self.setting.aims, where)

    def margins(self, by: By, period: Period | None = None) -> MarginReport:
        """Of the running month so far where no period is given; never beyond now, since costs aren't known there."""
        now_ns = self._clock.now_ns()
        period = period or month_of(now_ns)
        return margins(
            self.ledger, by, Period(period.from_ns, max(period.from_ns, min(period.to_ns, now_ns))), self.setting.books
        )

    def users_margins(self, spent: Sequence[Totals], period: Period) -> dict[str | None, MarginRow]:
        return of_users(self.ledger, spent, period, self.setting.books)

    def changes(self, before: Period, after: Period, where: ReceiptFilter | None = None) -> ChangeReport:
        return changes(self.ledger, before, after, where)

    def drifts(self, where: ReceiptFilter | None = None) -> list[Drift]:
        return drifts(self.ledger, self._clock.now_ns(), self.setting.books.features, where)

    def answer(self, name: str, query: Mapping[str, str]) -> dict[str, Any]:
        """One of `ANSWERS` as JSON. Raises InvalidRequest naming the parameter."""
        return ANSWERS[name](self, query)


def _usage(reports: Reports, query: Mapping[str, str]) -> dict[str, Any]:
    _refuse_unknown(query, {"by", "from", "to", "timezone", *_FILTERS})
    by = _one_of(query, "by", get_args(GroupBy), "feature")
    report = reports.units(cast("GroupBy", by), _where(query), query.get("timezone", "UTC"))
    return {"object": "usage", **body_of(report)}


def _targets(reports: Reports, query: Mapping[str, str]) -> dict[str, Any]:
    _refuse_unknown(query, {"from", "to", *_FILTERS})
    return _list(reports.targets(_where(query)))


def _margin(reports: Reports, query: Mapping[str, str]) -> dict[str, Any]:
    _refuse_unknown(query, {"by", "period", "from", "to"})
    by = _one_of(query, "by", get_args(By), "feature")
    period = parse_period(query["period"]) if "period" in query else None
    if "from" in query or "to" in query:
        where = _where(query)
        if period is not None or where.from_ns is None or where.to_ns is None or where.from_ns >= where.to_ns:
            raise InvalidRequest("Send `from` and a later `to`, or `period`, such as 2026-11.", param="period")
        period = Period(where.from_ns, where.to_ns)
    return {"object": "margin", **body_of(reports.margins(cast("By", by), period))}


def _changes(reports: Reports, query: Mapping[str, str]) -> dict[str, Any]:
    _refuse_unknown(query, {"before", "after", *_FILTERS})
    for name in ("before", "after"):
        if name not in query:
            raise InvalidRequest(f"`{name}` is missing: send a period, such as 2026-11-03.", param=name)
    report = reports.changes(parse_period(query["before"]), parse_period(query["after"]), _where(query))
    return {"object": "changes", **body_of(report)}


def _drift(reports: Reports, query: Mapping[str, str]) -> dict[str, Any]:
    _refuse_unknown(query, set(_FILTERS))
    return _list(reports.drifts(_where(query)))


# What is answered at /v1/NAME.
ANSWERS: dict[str, Callable[[Reports, Mapping[str, str]], dict[str, Any]]] = {
    "usage": _usage,
    "targets": _targets,
    "margin": _margin,
    "changes": _changes,
    "drift": _drift,
}


def _list(found: Iterable[msgspec.Struct]) -> dict[str, Any]:
    return {"object": "list", "data": [body_of(each) for each in found], "has_more": False, "next": None}


def _where(query: Mapping[str, str]) -> ReceiptFilter:
    given: dict[str, Any] = {name: query[name] for name in _FILTERS if name in query}
    for name in ("from", "to"):
        if name in query:
            try:
                given[f"{name}_ns"] = parse_time_ns(query[name])
            except ValueError:
                raise InvalidRequest(
                    f"Invalid `{name}`: `{query[name][:40]}`; send a time such as 2026-01-31T12:00:00Z or a date.",
                    param=name,
                ) from None
    return ReceiptFilter(**given)


def _one_of(query: Mapping[str, str], name: str, allowed: Iterable[str], default: str) -> str:
    value = query.get(name, default)
    if value not in (known := list(allowed)):
        raise InvalidRequest(f"Invalid `{name}`: `{value[:40]}`; send one of {', '.join(known)}.", param=name)
    return value


def _refuse_unknown(query: Mapping[str, str], known: set[str]) -> None:
    for name in query:
        if name not in known:
            raise InvalidRequest(
                f"Unknown parameter `{name[:40]}`: this address takes {', '.join(sorted(known))}.",
                param=name,
                code="unknown_parameter",
            )
