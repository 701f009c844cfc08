"""What an address asks for. Every table's filters, time range and page live in its URL, so that it can be linked,
reloaded and exported by changing the suffix."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, tzinfo
from typing import cast, get_args
from urllib.parse import quote, urlencode

import msgspec

from millicent.core.clock import NS_PER_HOUR, NS_PER_S, parse_time_ns
from millicent.core.errors import InvalidRequest
from millicent.core.receipts import Status
from millicent.core.zones import find_zone
from millicent.dashboard import zones
from millicent.ledger.queries import RUNNING, GroupBy, ReceiptFilter

FIELDS = ("feature", "model", "user", "team", "key", "tier", "placement", "status", "conversation", "run")
GROUPS: tuple[GroupBy, ...] = ("feature", "model", "user", "team", "key", "tier", "status")
RANGES: dict[str, tuple[str, int | None]] = {
    "1h": ("last hour", NS_PER_HOUR),
    "24h": ("last 24 hours", 24 * NS_PER_HOUR),
    "7d": ("last 7 days", 7 * 24 * NS_PER_HOUR),
    "30d": ("last 30 days", 30 * 24 * NS_PER_HOUR),
    "all": ("all time", None),
}
MAX_LIMIT = 500

TIMES = frozenset({"range", "from", "to", "zone"})
FILTERS = TIMES | frozenset(FIELDS) | {"none"}
# `none=feature` selects what names no feature: an empty value would be what forms send for no filter.
NAMELESS = ("feature", "user", "team", "key", "tier", "placement")
PAGED = FILTERS | {"after", "limit"}
GROUPED = PAGED | {"by"}


class Selection(msgspec.Struct, frozen=True, kw_only=True):
    """A parsed address. `params` are the ones that were set, as written; links are built from them."""

    params: dict[str, str]
    where: ReceiptFilter
    range: str | None
    by: GroupBy
    after: str | None
    limit: int | None
    zone: str = "UTC"

    @property
    def fields(self) -> dict[str, str]:
        """The attribution, model and status filters that are set."""
        return {name: self.params[name] for name in (*FIELDS, "none") if name in self.params}

    @property
    def period(self) -> str:
        if self.range is not None:
            return RANGES[self.range][0]
        start, end = self.params.get("from"), self.params.get("to")
        return " ".join([f"from {start}"] * bool(start) + [f"to {end}"] * bool(end))

    def query(self, **changes: str | None) -> str:
        """The query string of this selection with `changes` made (None removes). Going elsewhere starts at the first
        page; a range and explicit times replace each other, and so do a name and none of its kind."""
        gone = {"after", *changes, changes.get("none")}
        if self.params.get("none") in changes:
            gone.add("none")
        params = {name: value for name, value in self.params.items() if name not in gone}
        if changes.get("range"):
            params = {name: value for name, value in params.items() if name not in {"from", "to"}}
        params |= {name: value for name, value in changes.items() if value is not None}
        return f"?{urlencode(params)}" if params else ""


def feature_address(name: str, query: str = "") -> str:
    """Of a feature's page. Browsers take a path's dots for the folder above: there are only the receipts of these."""
    if name in {".", ".."}:
        return f"/receipts?{urlencode({'feature': name})}"
    return f"/features/{quote(name, safe='')}{query}"


def parse(items: Iterable[tuple[str, str]], known: frozenset[str], *, now_ns: int, default_range: str) -> Selection:
    """Read a query string's pairs, of which `known` mean something here; another is refused by name. Empty values, as
    forms send them, count as absent. Raises InvalidRequest."""
    params: dict[str, str] = {}
    for name, value in items:
        if name not in known:
            raise InvalidRequest(
                f"unknown parameter {name!r} in the address; use one of {', '.join(sorted(known))}", param=name
            )
        if name in params:
            raise InvalidRequest(f"parameter {name!r} stands twice in the address; give it once", param=name)
        if value.strip():
            params[name] = value.strip()
    zone = params.get("zone", "UTC")
    clocks = find_zone(zone, "zone")
    if "from" in params or "to" in params:
        params.pop("range", None)
        range_name = None
        from_ns, to_ns = (_utc_ns(params[name], name, clocks) if name in params else None for name in ("from", "to"))
    else:
        range_name = _choice(params.get("range", default_range), "range", tuple(RANGES))
        span_ns = RANGES[range_name][1]
        from_ns, to_ns = (None if span_ns is None else _begins(now_ns - span_ns, span_ns, clocks)), None
    if "status" in params:
        _choice(params["status"], "status", (*Status, RUNNING))
    by = _choice(params.get("by", "feature"), "by", get_args(GroupBy))
    filters = {name: params[name] for name in FIELDS if name in params}
    if "none" in params:
        name = _choice(params["none"], "none", NAMELESS)
        if name in filters:
            raise InvalidRequest(f"none={name} and {name}={filters[name]!r} exclude each other; drop one", param="none")
        filters[name] = ""
    return Selection(
        params=params,
        where=ReceiptFilter(**filters, from_ns=from_ns, to_ns=to_ns),
        range=range_name,
        by=cast("GroupBy", by),
        after=params.get("after"),
        limit=_limit(params["limit"]) if "limit" in params else None,
        zone=zone,
    )


def _begins(start_ns: int, span_ns: int, clocks: tzinfo) -> int:
    """A week or more begins with a day, so that its first bar is a whole one; a day with a quarter-hour, since sums are
    kept by those, and no receipt need be read for a part of one."""
    if span_ns > 24 * NS_PER_HOUR:
        start = datetime.fromtimestamp(start_ns // NS_PER_S, clocks)
        return zones.utc_ns(start.replace(hour=0, minute=0, second=0, fold=0))
    return start_ns - start_ns % (NS_PER_HOUR // 4) if span_ns == 24 * NS_PER_HOUR else start_ns


def _choice(value: str, name: str, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise InvalidRequest(f"{name}={value!r} is not known; use one of {', '.join(choices)}", param=name)
    return value


def _limit(value: str) -> int:
    if not (value.isascii() and value.isdigit() and len(value) < 10 and 1 <= int(value) <= MAX_LIMIT):
        raise InvalidRequest(f"limit={value!r} must be a whole number from 1 to {MAX_LIMIT}", param="limit")
    return int(value)


def _utc_ns(value: str, name: str, clocks: tzinfo) -> int:
    """UTC nanoseconds of an ISO 8601 date or time; one that names no zone is by the clocks of the page's."""
    try:
        return parse_time_ns(value.replace(" ", "+"), clocks)  # a bare + in a query string arrives as a space
    except ValueError:
        raise InvalidRequest(
            f"{name}={value!r} is not a time; write it as 2026-01-31 or 2026-01-31T18:30", param=name
        ) from None
