"""Scenarios that were saved, one file each, and what happened beside what was expected."""

from __future__ import annotations

import re
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Literal

import msgspec

from millicent.core.clock import Clock
from millicent.core.errors import ConfigError, InvalidRequest, NotFound
from millicent.core.files import private_folder, whole_file
from millicent.economics.estimate import Estimated, Scenario
from millicent.economics.traffic import Traffic, read_traffic
from millicent.ledger.queries import LedgerQueries, ReceiptFilter

FOLDER = "scenarios"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class Saved(msgspec.Struct, frozen=True):
    """A scenario under a name, with what it was expected to cost when it was saved. Amounts are exact dollars."""

    name: str
    saved_at_ns: int
    scenario: Scenario
    expected_usd: dict[str, Decimal] = {}


class Scenarios:
    """The files in `MILLICENT_HOME/scenarios`: people's own, to keep, to copy and to put under version control."""

    def __init__(self, home: Path) -> None:
        self._folder = home / FOLDER

    def save(self, name: str, scenario: Scenario, lines: list[Estimated], clock: Clock) -> Saved:
        """One of the same name is replaced, whole. Raises InvalidRequest for a name that is no file's."""
        path = self._path(name)
        expected = {each.name: each.expected.usd for each in lines if each.expected is not None}
        saved = Saved(name, clock.now_ns(), scenario, expected)
        private_folder(self._folder)
        with whole_file(path) as file:
            file.write_bytes(msgspec.json.format(msgspec.json.encode(saved), indent=2) + b"\n")
        return saved

    def load(self, name: str) -> Saved:
        """Raises NotFound, or ConfigError where the file isn't one of ours."""
        path = self._path(name)
        try:
            return msgspec.json.decode(path.read_bytes(), type=Saved)
        except FileNotFoundError:
            known = ", ".join(self.names()) or "none yet"
            raise NotFound(f"no scenario {name!r} is saved: there is {known}.") from None
        except (msgspec.DecodeError, OSError) as error:
            raise ConfigError(f"{path}: is no saved scenario ({error}): mend it, or delete it.") from error

    def remove(self, name: str) -> None:
        """Raises NotFound."""
        self.load(name)
        self._path(name).unlink(missing_ok=True)

    def names(self) -> list[str]:
        return sorted(path.stem for path in self._folder.glob("*.json"))

    def _path(self, name: str) -> Path:
        if not _NAME.fullmatch(name):
            raise InvalidRequest(
                f"{name!r} can't name a scenario: use up to 64 letters, digits, points, dashes and underscores",
                param="name",
            )
        return self._folder / f"{name}.json"


class Beside(msgspec.Struct, frozen=True):
    """One figure as it was expected and as it was; `change` is by how much more, as a part of what was expected."""

    what: str
    unit: Literal["count", "percent", "usd"]
    expected: Fraction | None
    happened: Fraction | None

    @property
    def change(self) -> Fraction | None:
        if self.expected is None or self.happened is None or not self.expected:
            return None
        return self.happened / self.expected - 1


class Outcome(msgspec.Struct, frozen=True):
    """A saved scenario beside its feature's traffic since it was saved, 30 days at most, scaled to a month."""

    saved: Saved
    traffic: Traffic
    beside: tuple[Beside, ...]


def outcome(queries: LedgerQueries, clock: Clock, saved: Saved) -> Outcome:
    """Raises InvalidRequest for a scenario without a feature: then nobody knows what to compare it with."""
    if saved.scenario.feature is None:
        raise InvalidRequest(
            f"scenario {saved.name!r} names no feature: save it again with one, as requests will call it",
            param="feature",
        )
    month_ns = 30 * 24 * 3600 * 10**9
    where = ReceiptFilter(feature=saved.scenario.feature, from_ns=max(saved.saved_at_ns, clock.now_ns() - month_ns))
    traffic = read_traffic(queries, where)
    users = sum(each.group is not None for each in queries.totals("user", where))
    return Outcome(saved, traffic, tuple(_beside(saved, traffic, users)))


def _beside(saved: Saved, traffic: Traffic, users: int) -> list[Beside]:
    scenario, happened = saved.scenario, bool(traffic.requests)
    calls = scenario.calls_per_month
    month = traffic.monthly
    priced = traffic.requests - traffic.unpriced
    per_call = Fraction(traffic.cost_nanousd, priced * 10**9) if priced else None
    mean_in = traffic.input_tokens.mean if traffic.input_tokens else None
    mean_out = traffic.output_tokens.mean if traffic.output_tokens else None
    found = [
        Beside("calls a month", "count", calls, Fraction(month) if happened else None),
        Beside("users", "count", Fraction(scenario.users), Fraction(users) if happened else None),
        Beside(
            "calls a month and user",
            "count",
            calls / scenario.users if scenario.users else None,
            Fraction(month, users) if users else None,
        ),
        Beside("tokens in a call", "count", Fraction(scenario.input_tokens), mean_in),
        Beside("tokens out a call", "count", Fraction(scenario.output_tokens), mean_out),
        Beside(
            "input from a cache",
            "percent",
            Fraction(scenario.cache_percent),
            None if traffic.cached is None else 100 * traffic.cached,
        ),
        Beside("busiest hour over the average", "count", Fraction(scenario.peak), traffic.peak),
    ]
    for name, usd in saved.expected_usd.items():
        expected = Fraction(usd)
        found.append(Beside(f"a call, as at {name}", "usd", expected / calls if calls else None, per_call))
        found.append(Beside(f"a month, as at {name}", "usd", expected, None if per_call is None else per_call * month))
    return found
