"""Who spends what: users, keys and what they may do, budgets and what is left of them."""

from __future__ import annotations

from collections.abc import Awaitable, Mapping, Sequence
from typing import Protocol

from starlette.requests import Request
from starlette.responses import Response

from millicent.core.budgets import Balance, Budget
from millicent.core.errors import InvalidRequest
from millicent.core.money import ZERO
from millicent.dashboard import tables
from millicent.dashboard.earnings import period_of
from millicent.dashboard.figures import Figure
from millicent.dashboard.selection import Selection
from millicent.dashboard.site import Page, Site
from millicent.dashboard.tables import Cell, Column, Table
from millicent.dashboard.zones import when, when_short
from millicent.economics.margin import MarginRow
from millicent.economics.reports import Reports
from millicent.ledger.queries import Totals

PINS = ("user", "team", "feature", "tier")
SCOPES = ("client", "viewer", "admin")
SHOWN = 20
_MAX_NAME = 256


class Key(Protocol):
    @property
    def id(self) -> str: ...

    @property
    def name(self) -> str | None: ...

    @property
    def scope(self) -> str: ...

    @property
    def created_at_ns(self) -> int: ...

    @property
    def models(self) -> tuple[str, ...] | None: ...

    def state(self, now_ns: int) -> str: ...


class Keys(Protocol):
    """Keys and budgets, as the control room has them. What is changed holds from then on."""

    def keys(self) -> Sequence[Key]: ...

    def budgets(self) -> Sequence[tuple[Budget, Sequence[Balance]]]: ...

    def create(self, fields: Mapping[str, str | None]) -> Awaitable[str]:
        """Returns its token, which is never told again."""
        ...

    def rotate(self, key_id: str) -> Awaitable[str]:
        """The token that replaces the old one, which is good for another day."""
        ...

    def revoke(self, key_id: str) -> Awaitable[None]: ...


def users_page(site: Site, control: Keys, reports: Reports) -> Page:
    users = _Users(site, control, reports)
    routes = [
        site.get("/users", users.show),
        site.post("/users/keys", users.create),
        site.post("/users/keys/rotate", users.rotate),
        site.post("/users/keys/revoke", users.revoke),
    ]
    return Page("Users & keys", "Users & keys", "/users", routes)


class _Users:
    def __init__(self, site: Site, control: Keys, reports: Reports) -> None:
        self._site = site
        self._control = control
        self._reports = reports

    async def show(self, request: Request) -> Response:
        return await self._answer(request)

    async def create(self, request: Request, form: Mapping[str, str]) -> Response:
        fields = {name: form.get(name, "").strip() or None for name in ("name", "scope", *PINS)}
        for name, value in fields.items():
            if value is not None and len(value) > _MAX_NAME:
                raise InvalidRequest(f"{name} is longer than {_MAX_NAME} characters: shorten it", param=name)
        if fields["scope"] not in SCOPES:
            raise InvalidRequest(f"scope={fields['scope']!r}: write one of {', '.join(SCOPES)}", param="scope")
        if fields["scope"] != "admin" and not await self._site.read(self._control.keys):
            raise InvalidRequest(
                "the first key must be an admin key: once there is a key, only admins can make others", param="scope"
            )
        return await self._answer(request, token=await self._control.create(fields))

    async def rotate(self, request: Request, form: Mapping[str, str]) -> Response:
        return await self._answer(request, token=await self._control.rotate(form.get("id", "")))

    async def revoke(self, request: Request, form: Mapping[str, str]) -> Response:
        del request
        await self._control.revoke(form.get("id", ""))
        return self._site.redirect("/users")

    async def _answer(self, request: Request, token: str | None = None) -> Response:
        selection = self._site.selection(request, default_range="30d")
        queries = self._site.queries
        by_user = await self._site.read(lambda: queries.totals("user", selection.where))
        by_key = await self._site.read(lambda: queries.totals("key", selection.where))
        keys = await self._site.read(self._control.keys)
        budgets = await self._site.read(self._control.budgets)
        dearest = sorted(by_user, key=lambda each: (-each.cost.nanousd, -each.requests))
        told = dearest if self._site.exporting(request) else dearest[:SHOWN]
        earned = await self._site.read(
            lambda: self._reports.users_margins(told, period_of(self._site, self._reports, selection))
        )
        shown = [
            _spenders(by_user, told, earned, selection),
            _keys(keys, by_key, selection, self._site.clock.now_ns()),
            _budgets(budgets, self._site.clock.now_ns()),
        ]
        response = self._site.answer(
            request,
            "users.html",
            shown=shown,
            selection=selection,
            token=token,
            keys=[key for key in keys if key.state(self._site.clock.now_ns()) == "active"],
            scopes=SCOPES,
            pins=PINS,
        )
        if token is not None:
            response.headers["Cache-Control"] = "no-store"
        return response


def _spenders(
    totals: Sequence[Totals], told: Sequence[Totals], earned: Mapping[str | None, MarginRow], selection: Selection
) -> Table:
    """The dearest, or all; with what is left of what they pay, where that is known of any."""
    whole = sum(each.cost.nanousd for each in totals)
    earning = any(row.revenue is not None for row in earned.values())
    rows = [
        (
            tables.text(
                each.group or "unattributed",
                "/receipts"
                + selection.query(**{"user" if each.group else "none": each.group or "user"}, range=selection.range),
            ),
            tables.count(each.requests),
            tables.count(each.input_tokens),
            tables.count(each.output_tokens),
            tables.money(each.known_cost),
            tables.share(each.cost.nanousd, whole),
            tables.count(each.unpriced),
            *((tables.known(earned[each.group].margin),) if earning else ()),
        )
        for each in told
    ]
    columns = (
        Column("User", "user", number=False),
        Column("Requests", "requests"),
        Column("Tokens in", "input_tokens", wide=True),
        Column("Tokens out", "output_tokens", wide=True),
        Column("Cost", "cost_usd"),
        Column("Of all", "share", wide=True),
        Column("Unpriced", "unpriced_requests", wide=True),
        *((Column("Margin", "margin_usd"),) if earning else ()),
    )
    return Table(
        name="users",
        title="Users",
        columns=columns,
        rows=tuple(rows),
        most=SHOWN,
        count=len(totals),
    )


def _keys(keys: Sequence[Key], totals: Sequence[Totals], selection: Selection, now_ns: int) -> Table:
    used = {each.group: each for each in totals}
    rows = []
    for key in keys:
        use = used.get(key.id)
        pinned = ", ".join(f"{name} {value}" for name in PINS if (value := getattr(key, name, None)))
        rows.append(
            (
                tables.text(key.name or key.id, f"/receipts{selection.query(key=key.id, range=selection.range)}"),
                tables.text(str(key.scope)),
                tables.text(key.state(now_ns)),
                tables.text(pinned or None),
                tables.text("all" if key.models is None else ", ".join(key.models) or "none"),
                Cell(Figure(when_short(key.created_at_ns, now_ns), "", when(key.created_at_ns)), key.created_at_ns),
                tables.count(0 if use is None else use.requests),
                tables.money(ZERO if use is None else use.known_cost),
            )
        )
    columns = (
        Column("Key", "key", number=False),
        Column("May", "scope", number=False),
        Column("State", "state", number=False),
        Column("Pinned", "pinned", number=False, wide=True),
        Column("Models", "models", number=False, wide=True),
        Column("Made", "created_at_ns", wide=True),
        Column("Requests", "requests"),
        Column("Cost", "cost_usd"),
    )
    empty = "There is no key: on this machine, everybody may call. Once there is one, every call needs one."
    return Table(name="keys", title="Keys", columns=columns, rows=tuple(rows), empty=empty)


def _budgets(budgets: Sequence[tuple[Budget, Sequence[Balance]]], now_ns: int) -> Table:
    rows = []
    for budget, balances in budgets:
        whose = "everyone" if budget.per is None else f"{budget.per} {budget.only}" if budget.only else None
        _, renews_ns = budget.every.period_ns(now_ns)
        renews = Figure("never", "", "") if renews_ns is None else Figure(when_short(renews_ns, now_ns), "", "")
        for balance in balances or [Balance("", 0, ZERO, ZERO)]:
            subject = whose or (f"{budget.per} {balance.subject}" if balance.subject else f"each {budget.per}")
            left = budget.limit - balance.spent - balance.held
            rows.append(
                (
                    tables.text(budget.name),
                    tables.text(subject if budget.tier is None else f"{subject} of tier {budget.tier}"),
                    tables.text("refuses" if budget.hard else "counts"),
                    tables.money(budget.limit),
                    tables.money(balance.spent),
                    tables.money(balance.held),
                    tables.money(left),
                    tables.share(balance.spent.nanousd + balance.held.nanousd, budget.limit.nanousd),
                    Cell(renews, renews_ns),
                )
            )
    columns = (
        Column("Budget", "budget", number=False),
        Column("Whose", "whose", number=False),
        Column("Beyond it", "beyond", number=False, wide=True),
        Column("Limit", "limit_usd"),
        Column("Spent", "spent_usd"),
        Column("Held", "held_usd", wide=True),
        Column("Left", "left_usd", wide=True),
        Column("Used", "used_share"),
        Column("Renews", "renews_at_ns", wide=True),
    )
    empty = "There is no budget. `millicent budgets create` makes one, and so does [budgets.NAME] in millicent.toml."
    note = "Held: reserved for what is running. Of the period that runs now, whatever is selected above."
    return Table(name="budgets", title="Budgets", columns=columns, rows=tuple(rows), empty=empty, note=note)
