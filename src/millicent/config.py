"""`millicent.toml`: each room's section, checked when it is read. What is wrong is told with its line and a way out."""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

import msgspec

from millicent.backends.config import ModelConfig, UpstreamConfig
from millicent.caching.config import CacheConfig
from millicent.control.config import BudgetConfig
from millicent.core.errors import ConfigError
from millicent.core.money import Money
from millicent.economics.alternatives import AlternativeConfig
from millicent.economics.config import CostConfig, EarningsConfig, PlanConfig
from millicent.economics.machines import MachineConfig
from millicent.economics.margin import Books
from millicent.economics.plans import plans_by_tier
from millicent.economics.reports import Setting
from millicent.economics.targets import Aim
from millicent.engine.config import EngineConfig
from millicent.ledger.config import LedgerConfig
from millicent.meter.placements import ASSUMED_PLACEMENT, PlacementConfig
from millicent.meter.prices import PriceBook, PriceConfig
from millicent.pipeline.config import LimitsConfig, ModelPolicy
from millicent.pipeline.features import FeatureConfig, Features
from millicent.pipeline.holdout import HoldoutConfig
from millicent.routing.checks import Checks
from millicent.routing.config import PolicyConfig
from millicent.server.config import ServerConfig
from millicent.watch.config import AlertConfig, TelemetryConfig

if TYPE_CHECKING:
    from millicent.economics.scenarios import Scenarios
    from millicent.economics.standing import Configured
    from millicent.economics.where import Setup
    from millicent.ledger.queries import LedgerQueries

FILE_NAME = "millicent.toml"

SECRET_NAME = re.compile(r"(?i)(.*_)?(api_?key|secret|secret_key|password|token)")


# Two rooms' halves of one section: the settings of the former are written in the latter's tables.
WRITTEN_IN = {"policies": "models", "upstreams": "placements", "earnings": "features", "alternatives": "features"}


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One field per section; a dict where the section is `[section.NAME]`. A new section is a new line here."""

    server: ServerConfig = ServerConfig()
    engine: EngineConfig = EngineConfig()
    models: dict[str, ModelConfig] = {}
    policies: dict[str, ModelPolicy] = {}
    placements: dict[str, PlacementConfig] = {}
    machines: dict[str, MachineConfig] = {}
    upstreams: dict[str, UpstreamConfig] = {}
    features: dict[str, FeatureConfig] = {}
    alternatives: dict[str, AlternativeConfig] = {}
    earnings: dict[str, EarningsConfig] = {}
    plans: dict[str, PlanConfig] = {}
    costs: dict[str, CostConfig] = {}
    routing: dict[str, PolicyConfig] = {}
    prices: dict[str, PriceConfig] = {}
    budgets: dict[str, BudgetConfig] = {}
    limits: LimitsConfig = LimitsConfig()
    alerts: dict[str, AlertConfig] = {}
    telemetry: TelemetryConfig = TelemetryConfig()
    ledger: LedgerConfig = LedgerConfig()
    cache: CacheConfig = CacheConfig()
    holdout: HoldoutConfig = HoldoutConfig()


def home() -> Path:
    """Where state lives: `MILLICENT_HOME`, or `~/.millicent`."""
    return Path(os.environ.get("MILLICENT_HOME") or "~/.millicent").expanduser()


def cache() -> Path:
    """Where models lie: `MILLICENT_CACHE`, or `~/.cache/millicent`."""
    return Path(os.environ.get("MILLICENT_CACHE") or "~/.cache/millicent").expanduser()


def load(path: Path) -> Config:
    """The configuration in the file at `path`; the defaults where there is none. Raises ConfigError."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return Config()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}): make it a readable UTF-8 file.") from error
    try:
        table = tomllib.loads(text, parse_float=Decimal)  # a price keeps the digits it was written with
    except tomllib.TOMLDecodeError as error:
        raise _syntax_error(path, text, error) from error
    _refuse_secrets(path, text, table, ())
    sections = [section for section in get_type_hints(Config) if section not in WRITTEN_IN]
    for section in [section for section in table if section not in sections]:
        what = f"[{section}] is not a section{_suggestion(section, sections)}"
        raise ConfigError(f"{path}:{line_of(text, (section,))}: {what}")
    table = _halved(table)
    for section, value in table.items():
        _check_section(path, text, section, value)
    config = msgspec.convert(table, Config)
    checks: list[tuple[tuple[str, ...], Callable[[], object]]] = [
        *((("placements", name), partial(each.placement, name)) for name, each in config.placements.items()),
        *((("placements", name), partial(each.check, name)) for name, each in config.upstreams.items()),
        *((("machines", name), partial(_check_machine, name, each, config)) for name, each in config.machines.items()),
        *((("models", name), partial(_check_model, name, each, config)) for name, each in config.models.items()),
        *((("models", name), partial(each.check, name)) for name, each in config.policies.items()),
        *((("prices", name), partial(each.check, name)) for name, each in config.prices.items()),
        *((("budgets", name), partial(each.budget, name)) for name, each in config.budgets.items()),
        *((("features", name), partial(Features, {name: each})) for name, each in config.features.items()),
        *((("features", name), partial(_check_feature, name, each, config)) for name, each in config.features.items()),
        *((("features", name), partial(each.check, name)) for name, each in config.earnings.items()),
        *((("plans", name), partial(each.check, name)) for name, each in config.plans.items()),
        *((("plans", name), partial(plans_by_tier, config.plans)) for name in config.plans),
        *((("costs", name), partial(each.check, name)) for name, each in config.costs.items()),
        *((("features", name), partial(each.check, name)) for name, each in config.alternatives.items()),
        *((("routing", name), partial(_check_policy, name, each)) for name, each in config.routing.items()),
        *((("alerts", name), partial(each.check, name)) for name, each in config.alerts.items()),
        (("holdout",), config.holdout.check),
        (("telemetry", "endpoint"), config.telemetry.check),
        (("limits", "usd_per_minute"), partial(config.limits.check, "[limits]")),
    ]
    for where, check in checks:
        try:
            check()
        except ConfigError as error:
            raise ConfigError(f"{path}:{line_of(text, where)}: {error.message}") from error
    return config


def economics_setting(config: Config) -> Setting:
    """What the economics' reports rest on."""
    return Setting(
        books=Books(config.plans, config.earnings, config.costs),
        aims={
            name: Aim(
                each.owner,
                None if each.cost_target_usd is None else Money.from_usd(each.cost_target_usd),
                each.latency_target_ms,
            )
            for name, each in config.features.items()
        },
        standard={
            name: each.standard_utilization
            for name, each in config.placements.items()
            if each.standard_utilization is not None
        },
        max_sequences=config.engine.max_sequences,
    )


def configured(config: Config, queries: LedgerQueries, scenarios: Scenarios) -> Configured:
    """What `millicent plan standing` asks of the configuration, and of what was set up beside it."""
    from millicent.economics.standing import Configured
    from millicent.ledger.budgets import read_budgets

    features = config.features.items()
    second = {name for name, model in config.models.items() if len(model.deployed) > 1}
    second |= {name for name, policy in config.policies.items() if policy.fallbacks}
    return Configured(
        alternatives={
            name: each.alternative for name, each in config.alternatives.items() if each.alternative is not None
        },
        cost_targets=tuple(name for name, each in features if each.cost_target_usd is not None),
        latency_targets=tuple(name for name, each in features if each.latency_target_ms is not None),
        budgets=tuple(budget.name for budget in queries.ask(read_budgets) or ()),
        alerts=tuple(name for name, each in config.alerts.items() if each.webhook_env or each.webhook_file),
        second_places=tuple(sorted(second)),
        scenarios=tuple(scenarios.names()),
    )


def plan_setup(config: Config, now_ns: int, machines: Mapping[str, MachineConfig] | None = None) -> Setup:
    """What `millicent plan` compares: what is configured, and more `machines`."""
    from millicent.economics.capacity import Slots
    from millicent.economics.places import ApiModel
    from millicent.economics.where import Setup
    from millicent.meter.published_prices import published_prices

    placements = {name: each.placement(name).at(now_ns) for name, each in config.placements.items()}
    called = {
        (each.placement, each.model or name): name for name, model in config.models.items() for each in model.deployed
    }
    called |= {
        (name, model): model
        for name, each in placements.items()
        for model in each.models
        if (name, model) not in called
    }
    apis = [
        ApiModel(model, place.provider, place.service, place.discount, place.name, asked)
        for (placement, model), asked in called.items()
        if (place := placements[placement]).kind == "api"
    ]
    return Setup(
        {name: each for name, each in placements.items() if each.kind != "api"},
        tuple(apis),
        {**config.machines, **(machines or {})},
        PriceBook(config.prices, published_prices),
        Slots(config.engine.max_sequences, config.engine.step_tokens),
    )


def _halved(table: dict[str, Any]) -> dict[str, Any]:
    """With the settings that two rooms share a section for under each room's own name."""
    halved = dict(table)
    for half, section in WRITTEN_IN.items():
        theirs = set(_settings_of(get_args(get_type_hints(Config)[half])[1]))
        entries = {name: each for name, each in _tables(halved.get(section)) if theirs & each.keys()}
        if entries:
            rest = {
                name: {key: value for key, value in each.items() if key not in theirs} for name, each in entries.items()
            }
            halved[section] = halved[section] | rest
            halved[half] = {
                name: {key: value for key, value in each.items() if key in theirs} for name, each in entries.items()
            }
    return halved


def _tables(section: Any) -> list[tuple[str, dict[str, Any]]]:
    return (
        [(name, each) for name, each in section.items() if isinstance(each, dict)] if isinstance(section, dict) else []
    )


def _check_machine(name: str, machine: MachineConfig, config: Config) -> None:
    machine.machine(name)
    known = [*config.placements, ASSUMED_PLACEMENT]
    if machine.like is not None and machine.like not in known:
        what = f"[machines.{name}] like: there is no placement `{machine.like}`"
        raise ConfigError(f"{what}{_suggestion(machine.like, known)}")


def _check_model(name: str, model: ModelConfig, config: Config) -> None:
    model.check(name)
    for deployment in model.deployed:
        if deployment.placement not in config.placements:
            known = _suggestion(deployment.placement, list(config.placements)) if config.placements else ""
            what = f"[models.{name}] there is no [placements.{deployment.placement}]"
            raise ConfigError(f"{what}{known or ': add it, with its kind.'}")


def _check_feature(name: str, feature: FeatureConfig, config: Config) -> None:
    known = [*config.placements, ASSUMED_PLACEMENT]
    for placement in feature.placements or ():
        if placement not in known:
            raise ConfigError(f"[features.{name}] placements: there is no `{placement}`{_suggestion(placement, known)}")


def _check_policy(name: str, policy: PolicyConfig) -> None:
    policy.check(name)
    if policy.verify is not None:
        Checks(policy.verify, f"[routing.{name}] verify")


def _check_section(path: Path, text: str, section: str, value: Any) -> None:
    hints = get_type_hints(Config)
    if get_origin(hints[section]) is not dict:
        _check(path, text, (section,), value, hints[section])
        return
    if not isinstance(value, dict):
        raise ConfigError(f"{path}:{line_of(text, (section,))}: `{section}` holds tables: write [{section}.NAME].")
    written = WRITTEN_IN.get(section, section)
    others = [get_args(hints[half])[1] for half, whole in WRITTEN_IN.items() if whole == section]
    for name, entry in value.items():
        _check(path, text, (written, name), entry, get_args(hints[section])[1], others)


def _check(path: Path, text: str, where: tuple[str, ...], value: Any, kind: Any, others: Sequence[Any] = ()) -> None:
    """One section against its room's class: unknown settings first, since they are the likeliest slip. `others` share
    the section."""
    known = [name for each in (kind, *others) for name in _settings_of(each)]
    for key in value if isinstance(value, dict) else ():
        if key not in known:
            what = f"[{'.'.join(where)}] has no setting `{key}`{_suggestion(key, known)}"
            raise ConfigError(f"{path}:{line_of(text, (*where, key))}: {what}")
    try:
        msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        problem, _, inner = str(error).partition(" - at `$")
        keys = re.findall(r"\w+", inner)
        what = " ".join((f"[{'.'.join(where)}]", *keys))
        raise ConfigError(f"{path}:{line_of(text, (*where, *keys[:1]))}: {what}: {problem}.") from error


def _settings_of(kind: Any) -> list[str]:
    """Names of the settings of a room's class, or of any of several that share a section by their tag."""
    names: list[str] = []
    for each in get_args(kind) or (kind,):
        tag = each.__struct_config__.tag_field
        names += [*each.__struct_encode_fields__, *([tag] if tag else [])]
    return names


def _suggestion(given: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(given, known, n=1)
    return f": did you mean `{close[0]}`?" if close else f"; there are {', '.join(sorted(known))}."


def _refuse_secrets(path: Path, text: str, table: dict[str, Any], where: tuple[str, ...]) -> None:
    for key, value in table.items():
        if isinstance(value, dict):
            _refuse_secrets(path, text, value, (*where, key))
        elif SECRET_NAME.fullmatch(key):
            line = line_of(text, (*where, key))
            raise ConfigError(
                f"{path}:{line}: `{key}` looks like a secret: keep it in an environment variable or a file, not here."
            )


def _syntax_error(path: Path, text: str, error: tomllib.TOMLDecodeError) -> ConfigError:
    problem, _, where = str(error).partition(" (at ")
    number = re.search(r"line (\d+)", where)
    line = number[1] if number else len(text.splitlines())
    return ConfigError(f"{path}:{line}: not TOML: {problem}.")


def line_of(text: str, keys: tuple[str, ...]) -> int:
    """The line on which `keys` gets its value.

    The parser gives no lines, so it is asked: the place is where the first beginning of the file that has these keys
    goes beyond the beginning before it. A beginning that ends inside a value doesn't parse, and doesn't count.
    """
    lines = text.splitlines(keepends=True)
    complete = 0
    for count in range(1, len(lines) + 1):
        try:
            table: Any = tomllib.loads("".join(lines[:count]))
        except tomllib.TOMLDecodeError:
            continue
        for key in keys:
            table = table.get(key) if isinstance(table, dict) else None
        if table is not None:
            return complete + 1
        complete = count
    return len(lines)
