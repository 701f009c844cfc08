"""Plan: before it is built. A form that is an address, what it would cost, and saved scenarios beside what happened."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from typing import Any, NamedTuple
from urllib.parse import urlencode

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from millicent.core.errors import InvalidRequest
from millicent.core.money import Money
from millicent.dashboard import figures
from millicent.dashboard.figures import Figure
from millicent.dashboard.plan import Planning, estimated, listed, machines_told, told_as_json
from millicent.dashboard.plan_json import estimate_body, outcome_body, saved_body
from millicent.dashboard.selection import TIMES
from millicent.dashboard.site import Page, Site
from millicent.dashboard.tables import Cell, Column, Table, count, money, part, table_of, text
from millicent.dashboard.zones import when
from millicent.economics.estimate import Estimated, Scenario, estimate, like
from millicent.economics.scenarios import Beside, Outcome, Saved, outcome
from millicent.economics.traffic import lately, read_traffic
from millicent.ledger.queries import ReceiptFilter

PATH = "/plan/estimate"


class Field(NamedTuple):
    """One of the form's, as it is asked for and shown. `default` is what it is taken for where it is left out."""

    name: str
    label: str
    default: str = ""
    placeholder: str = ""


FIELDS = (
    Field("users", "Users a month", placeholder="1000"),
    Field("sessions", "Sessions a month, of each", "1"),
    Field("calls", "Calls a session", "1"),
    Field("input_tokens", "Tokens in, a call", placeholder="1500"),
    Field("output_tokens", "Tokens out, a call", placeholder="300"),
    Field("like", "or lengths like feature", placeholder="search"),
    Field("spread_percent", "Spread of tokens, %", "30"),
    Field("cache_percent", "Input from a cache, %", "0"),
    Field("batch_percent", "Calls in batches, %", "0"),
    Field("peak", "Busiest hour over average", "3"),
    Field("models", "Models, commas between", placeholder="gpt-5-mini, claude-haiku-4-5"),
    Field("feature", "It will be called", placeholder="pilot"),
)
_NAMES = frozenset(field.name for field in FIELDS)
_WHOLE = ("users", "input_tokens", "output_tokens", "spread_percent", "cache_percent", "batch_percent")


def estimate_page(planning: Planning, site: Site) -> Page:
    async def show(request: Request) -> Response:
        params = _given(site, request, frozenset({"scenario"}))
        name = params.get("scenario")
        kept = await site.read(lambda: _kept(planning))
        beside = None if name is None else await site.read(lambda: _outcome(planning, name))
        found = None if beside is not None else await site.read(lambda: _computed(planning, params))
        shown = [_saved(kept)]
        notes: dict[str, list[str]] = {}
        if found is not None:
            shown.append(_estimates(found[1]))
            for each in found[1]:
                for note in each.notes:
                    notes.setdefault(note, []).append(each.name)
        if beside is not None:
            shown.append(_beside(beside))
        return site.answer(
            request,
            "plan_estimate.html",
            shown=shown,
            fields=FIELDS,
            params=params,
            scenario=None if found is None else found[0],
            estimates=() if found is None else found[1],
            happened=beside,
            kept=kept,
            notes=notes,
        )

    async def save(_: Request, form: Mapping[str, str]) -> Response:
        params = {name: value.strip() for name, value in form.items() if name in _NAMES and value.strip()}
        found = await site.read(lambda: _computed(planning, params))
        if found is None:
            raise InvalidRequest("the scenario is empty: say how many users and how long a call is")
        await site.read(lambda: planning.scenarios.save(form.get("name", ""), *found, planning.clock))
        return site.redirect(f"{PATH}?{urlencode({'scenario': form['name']})}")

    async def remove(_: Request, form: Mapping[str, str]) -> Response:
        await site.read(lambda: planning.scenarios.remove(form.get("name", "")))
        return site.redirect(PATH)

    routes = [site.get(PATH, show), site.post(PATH, save), site.post(f"{PATH}/remove", remove)]
    return Page("Plan", "Before it is built", PATH, [*routes, *_json_routes(planning, site)], period=False)


def _json_routes(planning: Planning, site: Site) -> list[Route]:
    async def one(request: Request) -> Response:
        params = _given(site, request)
        found = await site.read(lambda: _computed(planning, params))
        if found is None:
            raise InvalidRequest("users: say how many, and how long a call is: input_tokens and output_tokens")
        return told_as_json(estimate_body(*found))

    async def scenarios(request: Request) -> Response:
        site.selection(request, frozenset())
        kept = await site.read(lambda: _kept(planning))
        return told_as_json({"object": "list", "data": [saved_body(each) for each in kept]})

    async def scenario(request: Request) -> Response:
        name = request.path_params["name"]
        return told_as_json(outcome_body(await site.read(lambda: _outcome(planning, name))))

    return [
        Route("/v1/plan/estimate", one, methods=["GET"]),
        Route("/v1/plan/scenarios", scenarios, methods=["GET"]),
        Route("/v1/plan/scenarios/{name}", scenario, methods=["GET"]),
    ]


def _given(site: Site, request: Request, also: frozenset[str] = frozenset()) -> dict[str, str]:
    return site.selection(request, _NAMES | TIMES | also, default_range="30d").params


def _computed(planning: Planning, params: Mapping[str, str]) -> tuple[Scenario, list[Estimated]] | None:
    """None while the form is empty."""
    if not _NAMES & params.keys():
        return None
    scenario = scenario_from(planning, params)
    return scenario, estimate(scenario, planning.setup(), planning.clock.now_ns())


def _kept(planning: Planning) -> list[Saved]:
    return [planning.scenarios.load(each) for each in planning.scenarios.names()]


def scenario_from(planning: Planning, params: Mapping[str, str]) -> Scenario:
    """Raises InvalidRequest naming the field."""
    values: dict[str, Any] = {name: value for name, value in params.items() if name in _NAMES - {"models", "like"}}
    for name in _WHOLE:
        if name in values and not (values[name].isascii() and values[name].isdigit()):
            raise InvalidRequest(f"{name}={values[name]!r} must be a whole number", param=name)
    for name in ("sessions", "calls", "peak"):
        try:
            values |= {name: Decimal(values[name])} if name in values else {}
        except InvalidOperation:
            raise InvalidRequest(f"{name}={values[name]!r} must be a number", param=name) from None
    wanted = params.get("like")
    needed = ("users", *(() if wanted else ("input_tokens", "output_tokens")))
    for name in needed:
        if name not in values:
            raise InvalidRequest(f"{name}: missing; an estimate needs {', '.join(needed)}", param=name)
    models = tuple(listed(params.get("models", ""), ","))
    lengths = {"input_tokens": 0, "output_tokens": 0} if wanted else {}
    try:
        scenario = msgspec.convert({**lengths, **values, "models": models}, Scenario, strict=False)
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"the scenario: {error}") from None
    if not wanted:
        return scenario
    return like(scenario, read_traffic(planning.queries, lately(planning.clock, ReceiptFilter(feature=wanted))))


def _outcome(planning: Planning, name: str) -> Outcome:
    return outcome(planning.queries, planning.clock, planning.scenarios.load(name))


def _estimates(found: Sequence[Estimated]) -> Table:
    return table_of(
        found,
        (Column("Model", "model", number=False), lambda each: text(each.name)),
        (Column("A month", "expected_usd"), lambda each: estimated(each.expected, each.provenance)),
        (Column("From", "low_usd", wide=True), lambda each: estimated(each.low, each.provenance)),
        (Column("To", "high_usd", wide=True), lambda each: estimated(each.high, each.provenance)),
        (Column("A call", "per_call_usd", wide=True), lambda each: estimated(each.per_call, each.provenance)),
        (Column("A user", "per_user_usd"), lambda each: estimated(each.per_user, each.provenance)),
        (Column("Machines", "machines", wide=True), lambda each: machines_told(each.machines)),
        name="estimates",
        title="A month, model by model",
    )


def _saved(kept: Sequence[Saved]) -> Table:
    def link(saved: Saved) -> str | None:
        return f"{PATH}?{urlencode({'scenario': saved.name})}" if saved.scenario.feature else None

    return table_of(
        kept,
        (Column("Scenario", "scenario", number=False), lambda each: text(each.name, link(each))),
        (Column("Feature", "feature", number=False), lambda each: text(each.scenario.feature)),
        (Column("Saved", "saved_at", number=False, wide=True), lambda each: text(when(each.saved_at_ns))),
        (Column("Calls a month", "calls_per_month"), lambda each: count(round(each.scenario.calls_per_month))),
        name="scenarios",
        title="Saved scenarios",
        empty="None yet.",
        note="Those that name a feature can be put beside what it did.",
    )


def _beside(found: Outcome) -> Table:
    return table_of(
        found.beside,
        (Column("What", "what", number=False), lambda each: text(each.what)),
        (Column("Expected", "expected"), lambda each: _figure(each, each.expected)),
        (Column("Happened", "happened"), lambda each: _figure(each, each.happened)),
        (Column("Change", "change"), _change),
        name="beside",
        title=f"{found.saved.name}: expected, and what happened",
    )


def _figure(beside: Beside, value: Fraction | None) -> Cell:
    if value is None:
        return Cell(Figure("unknown", "", "nothing was seen of it yet; it is not zero"), None)
    if beside.unit == "usd":
        return money(Money(round(value * 10**9)))
    number = round(float(value), 6)
    return Cell(figures.number(number, "%" if beside.unit == "percent" else ""), number)


def _change(beside: Beside) -> Cell:
    if beside.change is None:
        return Cell(Figure("—", "", "one of the two is not known"), None)
    told = part(beside.change)
    return told._replace(figure=told.figure._replace(text=f"+{told.figure.text}")) if beside.change > 0 else told
