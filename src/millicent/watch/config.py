"""`[alerts.NAME]`: what is watched, and who is told."""

from __future__ import annotations

import os
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

import msgspec

from millicent.core.clock import NS_PER_S
from millicent.core.errors import ConfigError, InvalidRequest
from millicent.core.zones import find_zone

Kind = Literal["anomaly", "budget", "latency", "drift", "coverage"]
KINDS: tuple[Kind, ...] = ("anomaly", "budget", "latency", "drift", "coverage")
Figure = Literal["cost", "latency", "errors", "tokens", "cache", "mix"]
FIGURES: tuple[Figure, ...] = ("cost", "latency", "errors", "tokens", "cache", "mix")
_Percent = Annotated[int, msgspec.Meta(ge=1, le=1000)]
_Hours = Annotated[str, msgspec.Meta(pattern=r"^([01]\d|2[0-3]):[0-5]\d-([01]\d|2[0-3]):[0-5]\d$")]


class AlertConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What is watched, and where it is told. Without any `[alerts.NAME]` everything is watched and shown on the Alerts
    page, and nobody is told.

    `watch` is which kinds: `anomaly` (a figure is unlike it was at this hour, by feature, key and model), `budget` (a
    budget runs out before its period does), `latency` (a feature's latency target is missed too often), `drift` (a
    request's tokens or cost have grown since the week before, or since the week from the day `baseline` on), `coverage`
    (requests have no price, or name no feature). `figures` narrows anomalies; `features`, `keys` and `budgets` narrow
    all to those. A higher `sensitivity` notices more, false alarms too. `latency_objective_percent` of answers should
    meet their target; `spent_percent` are the shares of a budget to tell of; a change of `drift_percent` is drift; of a
    day's requests, `unpriced_percent` without a price and `unattributed_percent` without a feature are told of.

    Alerts and recoveries are posted to the address in the environment variable `webhook_env` or the file
    `webhook_file`, as Slack takes them. An address of this machine or of a private network needs `private_targets`.
    Messages link to the pages at `pages_url`. Nothing is posted in `quiet_hours`, such as `22:00-07:00` by the clocks
    of `timezone`: what still goes on when they end is told then.
    """

    watch: tuple[Kind, ...] = KINDS
    figures: tuple[Figure, ...] = FIGURES
    features: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()
    budgets: tuple[str, ...] = ()
    sensitivity: Decimal = Decimal(1)
    drift_percent: _Percent = 25
    baseline: date | None = None
    latency_objective_percent: Annotated[int, msgspec.Meta(ge=50, le=99)] = 95
    spent_percent: tuple[_Percent, ...] = (80, 100)
    unpriced_percent: _Percent = 5
    unattributed_percent: _Percent = 20
    webhook_env: str | None = None
    webhook_file: str | None = None
    private_targets: bool = False
    pages_url: str | None = None
    quiet_hours: _Hours | None = None
    timezone: str = "UTC"

    def check(self, name: str) -> None:
        """Raises ConfigError naming the setting."""
        at = f"[alerts.{name}]"
        if not Decimal("0.25") <= self.sensitivity <= 4:
            raise ConfigError(f"{at} sensitivity = {self.sensitivity}: must be from 0.25 to 4")
        if self.webhook_env and self.webhook_file:
            raise ConfigError(f"{at} webhook_file: `webhook_env` is set too: keep one")
        if self.pages_url is not None:
            _address(self.pages_url, f"{at} pages_url")
        if self.quiet_hours is not None and self.quiet_hours[:5] == self.quiet_hours[6:]:
            raise ConfigError(f"{at} quiet_hours = {self.quiet_hours!r}: begins when it ends: write 22:00-07:00")
        try:
            find_zone(self.timezone)
        except InvalidRequest as error:
            raise ConfigError(f"{at} timezone: {error.message}") from None

    def is_quiet(self, now_ns: int) -> bool:
        """Whether nobody is to be told now."""
        if self.quiet_hours is None:
            return False
        start, end = self.quiet_hours.split("-")
        now = datetime.fromtimestamp(now_ns // NS_PER_S, find_zone(self.timezone)).strftime("%H:%M")
        return start <= now < end if start < end else now >= start or now < end

    def webhook(self, name: str) -> str | None:
        """The address; None where nobody is told. Raises ConfigError where it can't be had or is none."""
        at = f"[alerts.{name}]"
        if self.webhook_env:
            at = f"{at} webhook_env"
            url = os.environ.get(self.webhook_env)
            if url is None:
                raise ConfigError(
                    f"{at}: the environment variable {self.webhook_env} is not set: set it before starting"
                )
        elif self.webhook_file:
            at = f"{at} webhook_file"
            try:
                url = Path(self.webhook_file).expanduser().read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigError(f"{at}: {self.webhook_file} can't be read ({error})") from None
        else:
            return None
        return _address(url.strip(), at)

    def covers(self, dimension: str, member: str) -> bool:
        """Whether a series of this feature, key or other thing is watched."""
        if not self.features and not self.keys:
            return True
        return member in {"feature": self.features, "key": self.keys}.get(dimension, ())


def _address(url: str, at: str) -> str:
    """The value is a secret, and isn't told."""
    try:
        parts = urlsplit(url)
        good = parts.scheme in {"http", "https"} and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        good = False
    if not good:
        raise ConfigError(f"{at}: holds no address: put something like https://hooks.example.com/services/... there")
    return url


class TelemetryConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Traces and metrics to an OpenTelemetry collector, over OTLP/HTTP. Nothing is sent without an `endpoint`, the
    collector's address without `/v1/traces`; it needs the extra `otel`.

    `headers_env` adds headers whose values are in the environment. Of requests that bring no `traceparent`,
    `sample_percent` leave a trace; those that bring one do as it says.
    """

    endpoint: str | None = None
    headers_env: dict[str, str] = {}
    service_name: str = "millicent"
    sample_percent: Annotated[int, msgspec.Meta(ge=0, le=100)] = 100

    def check(self) -> None:
        """Raises ConfigError naming the setting."""
        if self.endpoint is not None:
            _address(self.endpoint, "[telemetry] endpoint")

    def headers(self) -> dict[str, str]:
        """Raises ConfigError for a variable that isn't set."""
        missing = [variable for variable in self.headers_env.values() if variable not in os.environ]
        if missing:
            raise ConfigError(
                f"[telemetry] headers_env: the environment variable {missing[0]} is not set: set it before starting"
            )
        return {name: os.environ[variable].strip() for name, variable in self.headers_env.items()}
