"""Wiring of the pages: each gets what it shows."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_origin, get_type_hints

import msgspec
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from millicent.config import (
    FILE_NAME,
    SECRET_NAME,
    WRITTEN_IN,
    Config,
    configured,
    economics_setting,
    line_of,
    load,
    plan_setup,
)
from millicent.control.budgets import standing
from millicent.control.keys import ApiKey
from millicent.control.keys import Scope as KeyScope
from millicent.core.budgets import Balance, Budget
from millicent.core.clock import NS_PER_HOUR, Clock
from millicent.core.errors import InvalidRequest
from millicent.dashboard.alerts import alerts_page
from millicent.dashboard.changed import changes_page
from millicent.dashboard.configuration import Setting, settings_page
from millicent.dashboard.earnings import margin_page
from millicent.dashboard.features import features_page
from millicent.dashboard.live import live_page
from millicent.dashboard.models import models_page
from millicent.dashboard.plan import Planning
from millicent.dashboard.plans import plan_pages
from millicent.dashboard.routes import dashboard_routes
from millicent.dashboard.site import Site
from millicent.dashboard.users import users_page
from millicent.economics.forecast import month_end
from millicent.economics.reports import Reports
from millicent.economics.scenarios import Scenarios
from millicent.ledger.queries import LedgerQueries
from millicent.meter.meter import Meter
from millicent.meter.placements import Placement, PlacementConfig
from millicent.pipeline.deployments import DeploymentReport
from millicent.pipeline.pipeline import Pipeline
from millicent.server.application import EngineReport, Health
from millicent.server.forms import visitor_of
from millicent.server.keys import KeyChanges
from millicent.watch.alerting import watched, webhooks_of
from millicent.watch.live import Live
from millicent.watch.watcher import Writes

if TYPE_CHECKING:
    from decimal import Decimal

    from millicent.app import ServeOptions

_TAGS = b"x-millicent-tags"
_OVERLAP_NS = 24 * NS_PER_HOUR


def page_routes(
    options: ServeOptions,
    *,
    queries: LedgerQueries,
    pipeline: Pipeline,
    meter: Meter,
    health: Health,
    keys: KeyChanges,
    chat_models: Callable[[], list[str]],
    clock: Clock,
    live: Live,
    ledger: Writes,
) -> list[BaseRoute]:
    """A page that needs more than the site is handed in here."""
    path, rules = options.home / FILE_NAME, options.config.alerts
    site = Site(
        queries,
        models=chat_models,
        clock=clock,
        refresh=pipeline.checkpoint,
        visitor=visitor_of,
        steps=meter.steps.around,
        forecast=lambda where: month_end(queries, where, clock.now_ns()),
        demo=options.demo is not None,
    )
    fleet = _Fleet(path, (options.placement, *options.providers), pipeline, health, clock)
    reports = Reports(queries, clock, economics_setting(options.config))
    return dashboard_routes(
        site,
        [
            *(partial(page, reports=reports) for page in (features_page, margin_page, changes_page)),
            partial(users_page, control=_Control(queries, keys, clock), reports=reports),
            partial(models_page, fleet=fleet),
            partial(
                alerts_page,
                ask=queries.ask,
                write=ledger.write,
                rules=watched(rules),
                told=list(webhooks_of(rules)),
            ),
            partial(live_page, live=live),
            partial(settings_page, path=path, settings=effective(options.config, path)),
            *plan_pages(_planning(options, queries, clock)),
        ],
    )


def marked_as_demo(app: ASGIApp) -> ASGIApp:
    """Every answer says in a header that nothing behind it is real, and every receipt in a tag."""

    async def marked(scope: Scope, receive: Receive, send: Send) -> None:
        async def tell(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (b"x-millicent-demo", b"true")]
            await send(message)

        if scope["type"] == "http":
            tags = b",".join([*(value for name, value in scope["headers"] if name == _TAGS), b"demo=true"])
            rest = [(name, value) for name, value in scope["headers"] if name != _TAGS]
            scope = {**scope, "headers": [*rest, (_TAGS, tags)]}
        await app(scope, receive, tell)

    return marked


def _planning(options: ServeOptions, queries: LedgerQueries, clock: Clock) -> Planning:
    config, scenarios = options.config, Scenarios(options.home)
    targets = {name: each.latency_target_ms for name, each in config.features.items()}
    return Planning(
        queries,
        clock,
        lambda: plan_setup(config, clock.now_ns()),
        scenarios,
        {name: target_ms for name, target_ms in targets.items() if target_ms is not None},
        lambda: configured(config, queries, scenarios),
        economics_setting(config).books,
        options.home,
    )


@dataclass(frozen=True)
class _Fleet:
    path: Path
    places: Sequence[Placement]
    pipeline: Pipeline
    health: Health
    clock: Clock

    def engines(self) -> Sequence[EngineReport]:
        return self.health.engines()

    def deployments(self) -> Sequence[DeploymentReport]:
        return self.pipeline.deployments()

    def placements(self) -> Sequence[Placement]:
        now_ns = self.clock.now_ns()
        return [place.at(now_ns) for place in self.places]

    def rate_of(self, name: str, settings: Mapping[str, str]) -> Decimal | None:
        try:
            config = msgspec.convert(settings, PlacementConfig)
        except msgspec.ValidationError as error:
            raise InvalidRequest(f"the rate can't be read: {error}") from None
        return config.placement(name).usd_per_hour

    def check(self, path: Path) -> object:
        return load(path)


@dataclass(frozen=True)
class _Control:
    queries: LedgerQueries
    changes: KeyChanges
    clock: Clock

    def keys(self) -> Sequence[ApiKey]:
        return self.changes.all()

    def budgets(self) -> Sequence[tuple[Budget, Sequence[Balance]]]:
        now_ns = self.clock.now_ns()
        return self.queries.ask(lambda connection: standing(connection, now_ns)) or []

    async def create(self, fields: Mapping[str, str | None]) -> str:
        named = {**fields, "scope": KeyScope(fields["scope"] or KeyScope.CLIENT)}
        _, token = await self.changes.create(**named)
        return token

    async def rotate(self, key_id: str) -> str:
        _, token = await self.changes.rotate(key_id, _OVERLAP_NS)
        return token

    async def revoke(self, key_id: str) -> None:
        await self.changes.revoke(key_id)


def effective(config: Config, path: Path) -> list[Setting]:
    """Every setting of one-of-a-kind sections, and of what is named those that somebody set."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    written = tomllib.loads(text)
    on_file = load(path)
    found: list[Setting] = []
    for section, hint in get_type_hints(Config).items():
        ours, theirs = getattr(config, section), getattr(on_file, section)
        told = WRITTEN_IN.get(section, section)
        if get_origin(hint) is not dict:
            found += _of(text, written, (told,), ours, theirs)
            continue
        for name, entry in ours.items():
            found += _of(text, written, (told, name), entry, theirs.get(name))
    order = list(get_type_hints(Config))
    return sorted(found, key=lambda setting: (order.index(setting.section.partition(".")[0]), setting.section))


def _of(text: str, written: Mapping[str, Any], where: tuple[str, ...], ours: Any, theirs: object) -> list[Setting]:
    table: Any = written
    for name in where:
        table = table.get(name, {}) if isinstance(table, dict) else {}
    found = []
    for name, value in msgspec.structs.asdict(ours).items():
        if name in table:
            origin = f"{FILE_NAME}:{line_of(text, (*where, name))}"
        elif theirs is None or getattr(theirs, name, None) != value:
            origin = "command line"
        elif len(where) == 1:
            origin = "default"
        else:
            continue
        found.append(Setting(".".join(where), name, _told(name, value), origin))
    return found


def _told(name: str, value: object) -> str:
    """As it is written in the file. What could be a secret is masked; of a secret's variable it says whether it is
    set."""
    if SECRET_NAME.fullmatch(name) and value is not None:
        return "(set, and not shown)"
    if value is None:
        return "unset"
    if isinstance(value, str):
        if name.endswith("_env"):
            return f"{value} ({'set' if os.environ.get(value) else 'not set'} in the environment)"
        return value
    return msgspec.json.encode(value).decode()
