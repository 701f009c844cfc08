"""`[placements.NAME]`: where a model runs, and what an hour of it costs.

Every figure of a placement is for one accelerator; a placement with four costs four times its rate.
"""

from __future__ import annotations

from datetime import date
from decimal import Decimal
from typing import Literal

import msgspec

from millicent.core.errors import ConfigError
from millicent.core.receipts import RATE_KEY, PriceSource
from millicent.core.usage import Provenance
from millicent.meter.prices import Service, day_start_ns

Kind = Literal["rented", "owned", "provisioned", "edge", "api"]

# On-demand general-purpose machines of the large clouds cost about $0.04 to $0.05 per virtual CPU and hour.
ASSUMED_USD_PER_CORE_HOUR = Decimal("0.05")

# What this machine is called where no placement is configured for it.
ASSUMED_PLACEMENT = "local"

_HOURS_PER_YEAR = 365 * 24
_RATE_STEP = Decimal("1e-12")
# Of dollars, years or watts.
_MOST = 10**9


class PlacementTerms(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What changes on a day, from its start in UTC: the fields given here; the others stay as they were."""

    effective_from: date
    usd_per_hour: Decimal | None = None
    discount: Decimal | None = None
    usd_per_kwh: Decimal | None = None
    annual_usd: Decimal | None = None
    standard_utilization: Decimal | None = None


class PlacementConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`rented` has a price while it is up; `owned` is paid for over its life, with its power and yearly costs;
    `provisioned` is committed capacity, paid for used or not; `edge` is the client's own device; `api` is a provider
    that charges per token, at `service` prices, for the `models` named.

    `standard_utilization` prices receipts at rate / utilization, so that they carry a fair part of the idle time.
    `discount` is the part of the list price that the contract takes off. `dated` holds what changes, and when.
    """

    kind: Kind
    accelerators: int = 1
    standard_utilization: Decimal | None = None
    usd_per_hour: Decimal | None = None
    discount: Decimal | None = None
    capital_usd: Decimal | None = None
    life_years: Decimal | None = None
    residual_usd: Decimal | None = None
    watts: Decimal | None = None
    pue: Decimal | None = None
    usd_per_kwh: Decimal | None = None
    annual_usd: Decimal | None = None
    provider: str | None = None
    service: Service | None = None
    models: tuple[str, ...] = ()
    dated: tuple[PlacementTerms, ...] = ()

    def placement(self, name: str) -> Placement:
        """Checked and computed, with what it becomes later. Raises ConfigError naming the field."""
        later = []
        config = self
        for terms in sorted(self.dated, key=lambda terms: terms.effective_from):
            given = {field: value for field, value in msgspec.structs.asdict(terms).items() if value is not None}
            effective_from = given.pop("effective_from")
            config = msgspec.structs.replace(config, **given)
            later.append((day_start_ns(effective_from), config._undated(name)))  # noqa: SLF001 - one of its own
        return msgspec.structs.replace(self._undated(name), later=tuple(later))

    def _undated(self, name: str) -> Placement:
        at = f"[placements.{name}]"
        for field, value in msgspec.structs.asdict(self).items():
            if isinstance(value, Decimal) and not (value.is_finite() and 0 <= value <= _MOST):
                raise ConfigError(f"{at} {field} = {value}: must be a number from 0 to a billion")
            if value is not None and value != () and field not in (*_COMMON, *_FIELDS[self.kind]):
                raise ConfigError(f'{at} {field}: doesn\'t go with kind = "{self.kind}": remove it')
        if self.accelerators < 1:
            raise ConfigError(f"{at} accelerators = {self.accelerators}: must be at least 1")
        utilization = self.standard_utilization
        if utilization is not None and not 0 < utilization <= 1:
            raise ConfigError(f"{at} standard_utilization = {utilization}: must be above 0 and at most 1")
        discount = self.discount or Decimal(0)
        if discount > 1:
            raise ConfigError(f"{at} discount = {discount}: must be a fraction from 0 to 1")
        list_rate, provenance = self._rate(at)
        return Placement(
            name,
            self.accelerators,
            (list_rate * (1 - discount)).quantize(_RATE_STEP).normalize() if list_rate and discount else list_rate,
            provenance,
            utilization,
            self._inputs(),
            kind=self.kind,
            list_usd_per_hour=list_rate,
            discount=discount,
            provider=self.provider,
            service=self.service or "standard",
            models=self.models,
        )

    def _rate(self, at: str) -> tuple[Decimal | None, Provenance]:
        """Dollars per accelerator-hour before any discount, and how they are known."""
        if self.kind == "api":
            return None, Provenance.UNKNOWN
        if self.kind == "edge" and self.usd_per_hour is None:
            return Decimal(0), Provenance.ASSUMED  # the device is the client's, and so is its bill
        return (self._owned(at) if self.kind == "owned" else self._hourly(at)), Provenance.MEASURED

    def _hourly(self, at: str) -> Decimal:
        if self.usd_per_hour is None:
            raise ConfigError(f'{at} usd_per_hour: missing; kind = "{self.kind}" needs it')
        return self.usd_per_hour

    def _owned(self, at: str) -> Decimal:
        """(capital - residual) / life + yearly costs, by the hour, plus kW x PUE x tariff; to 1e-12 dollars."""
        if self.capital_usd is None or self.life_years is None:
            missing = "capital_usd" if self.capital_usd is None else "life_years"
            raise ConfigError(f'{at} {missing}: missing; kind = "owned" needs it')
        residual_usd = self.residual_usd or Decimal(0)
        if residual_usd > self.capital_usd:
            raise ConfigError(f"{at} residual_usd = {residual_usd}: must not exceed capital_usd = {self.capital_usd}")
        if self.life_years == 0:
            raise ConfigError(f"{at} life_years = 0: must be above 0")
        if (self.watts is None) != (self.usd_per_kwh is None):
            missing = "watts" if self.watts is None else "usd_per_kwh"
            raise ConfigError(f"{at} {missing}: missing; watts and usd_per_kwh go together")
        pue = Decimal(1) if self.pue is None else self.pue
        if pue < 1:
            raise ConfigError(f"{at} pue = {pue}: must be at least 1")
        yearly_usd = (self.capital_usd - residual_usd) / self.life_years + (self.annual_usd or 0)
        power_usd = (self.watts or Decimal(0)) / 1000 * pue * (self.usd_per_kwh or Decimal(0))
        return (yearly_usd / _HOURS_PER_YEAR + power_usd).quantize(_RATE_STEP).normalize()

    def _inputs(self) -> dict[str, str]:
        """What the operator wrote, for the receipt."""
        fields = ("usd_per_hour", "discount", *_OWNED)
        written = {"kind": self.kind, **{field: getattr(self, field) for field in fields}}
        return {
            field: format(value, "f") if isinstance(value, Decimal) else value
            for field, value in written.items()
            if value is not None
        }


_OWNED = ("capital_usd", "life_years", "residual_usd", "watts", "pue", "usd_per_kwh", "annual_usd")
# What each kind may be given, besides what all may.
_COMMON = ("kind", "discount", "dated")
_DEVICE = ("accelerators", "standard_utilization")
_FIELDS: dict[Kind, tuple[str, ...]] = {
    "rented": (*_DEVICE, "usd_per_hour"),
    "provisioned": (*_DEVICE, "usd_per_hour"),
    "edge": (*_DEVICE, "usd_per_hour"),
    "owned": (*_DEVICE, *_OWNED),
    "api": ("accelerators", "provider", "service", "models"),
}


class Placement(msgspec.Struct, frozen=True):
    """A placement with its rate. `usd_per_hour` is for one accelerator, the contract's discount taken off;
    `rate_provenance` says how it is known: measured stands for what the operator configured. `inputs` are the values
    behind the rate; `later` what it becomes, by UTC nanoseconds, in order."""

    name: str
    accelerators: int
    usd_per_hour: Decimal | None
    rate_provenance: Provenance
    standard_utilization: Decimal | None = None
    inputs: dict[str, str] = {}
    kind: Kind = "rented"
    list_usd_per_hour: Decimal | None = None
    discount: Decimal = Decimal(0)
    provider: str | None = None
    service: Service = "standard"
    models: tuple[str, ...] = ()
    later: tuple[tuple[int, Placement], ...] = ()

    def at(self, at_ns: int) -> Placement:
        """What it is at that UTC instant."""
        if not self.later:
            return self
        due = [terms for start_ns, terms in self.later if start_ns <= at_ns]
        return due[-1] if due else self

    @property
    def basis(self) -> str:
        """The receipt's basis: `standard` where a utilization is set, else `busy`."""
        return "busy" if self.standard_utilization is None else "standard"

    @property
    def receipt_usd_per_hour(self) -> Decimal | None:
        """What receipts are priced at: the rate, or rate / standard utilization to 1e-12 dollars."""
        return self._on_basis(self.usd_per_hour)

    @property
    def receipt_list_usd_per_hour(self) -> Decimal | None:
        """The same before the contract's discount."""
        return self._on_basis(self.list_usd_per_hour if self.discount else self.usd_per_hour)

    def _on_basis(self, rate: Decimal | None) -> Decimal | None:
        if rate is None or self.standard_utilization is None:
            return rate
        return (rate / self.standard_utilization).quantize(_RATE_STEP).normalize()

    @property
    def prices(self) -> PriceSource:
        """For the receipt, from its opening on: recovery prices an interrupted one from it."""
        rate = self.receipt_usd_per_hour
        if rate is None:
            return PriceSource()  # an api placement's are on each receipt
        source = "assumption" if self.rate_provenance is Provenance.ASSUMED else f"placements.{self.name}"
        snapshot = {RATE_KEY: format(rate, "f"), "rate_provenance": str(self.rate_provenance), **self.inputs}
        if self.usd_per_hour is not None:
            snapshot["usd_per_hour"] = format(self.usd_per_hour, "f")
        if self.discount and self.list_usd_per_hour is not None:
            snapshot["list_usd_per_hour"] = format(self.list_usd_per_hour, "f")
        if self.standard_utilization is not None:
            snapshot["standard_utilization"] = format(self.standard_utilization, "f")
        return PriceSource(source, snapshot)


def stated_watts(placement: Placement) -> Decimal | None:
    """What the operator says that one accelerator draws."""
    watts = placement.inputs.get("watts")
    return None if watts is None else Decimal(watts)


def assumed_placement(name: str, cores: int) -> Placement:
    """A CPU machine that nobody priced: one accelerator at the assumed rate per core."""
    inputs = {
        "kind": "assumed",
        "cores": str(cores),
        "usd_per_core_hour": format(ASSUMED_USD_PER_CORE_HOUR, "f"),
    }
    return Placement(name, 1, ASSUMED_USD_PER_CORE_HOUR * cores, Provenance.ASSUMED, None, inputs)
