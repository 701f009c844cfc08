"""`[placements.NAME]`: where a model runs, and what an hour of it costs.

Every figure of a placement is for one accelerator; a placement with four costs four times its rate.
"""

from __future__ import annotations

from decimal import Decimal
from typing import Literal

import msgspec

from millicent.core.errors import ConfigError
from millicent.core.receipts import RATE_KEY, PriceSource
from millicent.core.usage import Provenance

# On-demand general-purpose machines of the large clouds cost about $0.04 to $0.05 per virtual CPU and hour.
ASSUMED_USD_PER_CORE_HOUR = Decimal("0.05")

_HOURS_PER_YEAR = 365 * 24
_RATE_STEP = Decimal("1e-12")


class PlacementConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`rented` has a price while it is up; `owned` is paid for over its life, with its power and yearly costs.

    `standard_utilization` prices receipts at rate / utilization, so that they carry a fair part of the idle time.
    """

    kind: Literal["rented", "owned"]
    accelerators: int = 1
    standard_utilization: Decimal | None = None
    usd_per_hour: Decimal | None = None
    capital_usd: Decimal | None = None
    life_years: Decimal | None = None
    residual_usd: Decimal | None = None
    watts: Decimal | None = None
    pue: Decimal | None = None
    usd_per_kwh: Decimal | None = None
    annual_usd: Decimal | None = None

    def placement(self, name: str) -> Placement:
        """Checked and computed. Raises ConfigError naming the field."""
        at = f"[placements.{name}]"
        for field, value in msgspec.structs.asdict(self).items():
            if isinstance(value, Decimal) and (not value.is_finite() or value < 0):
                raise ConfigError(f"{at} {field} = {value}: must be a number of 0 or more")
        if self.accelerators < 1:
            raise ConfigError(f"{at} accelerators = {self.accelerators}: must be at least 1")
        utilization = self.standard_utilization
        if utilization is not None and not 0 < utilization <= 1:
            raise ConfigError(f"{at} standard_utilization = {utilization}: must be above 0 and at most 1")
        usd_per_hour = self._rented(at) if self.kind == "rented" else self._owned(at)
        return Placement(name, self.accelerators, usd_per_hour, Provenance.MEASURED, utilization, self._inputs())

    def _rented(self, at: str) -> Decimal:
        for field in _OWNED:
            if getattr(self, field) is not None:
                raise ConfigError(f'{at} {field}: belongs to kind = "owned", and this one is rented: remove it')
        if self.usd_per_hour is None:
            raise ConfigError(f'{at} usd_per_hour: missing; kind = "rented" needs it')
        return self.usd_per_hour

    def _owned(self, at: str) -> Decimal:
        """(capital - residual) / life + yearly costs, by the hour, plus kW x PUE x tariff; to 1e-12 dollars."""
        if self.usd_per_hour is not None:
            raise ConfigError(f'{at} usd_per_hour: belongs to kind = "rented", and this one is owned: remove it')
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
        written = {"kind": self.kind, **{field: getattr(self, field) for field in ("usd_per_hour", *_OWNED)}}
        return {
            field: format(value, "f") if isinstance(value, Decimal) else value
            for field, value in written.items()
            if value is not None
        }


_OWNED = ("capital_usd", "life_years", "residual_usd", "watts", "pue", "usd_per_kwh", "annual_usd")


class Placement(msgspec.Struct, frozen=True):
    """A placement with its rate. `usd_per_hour` is for one accelerator; `rate_provenance` says how it is known:
    measured stands for what the operator configured. `inputs` are the values behind the rate."""

    name: str
    accelerators: int
    usd_per_hour: Decimal | None
    rate_provenance: Provenance
    standard_utilization: Decimal | None = None
    inputs: dict[str, str] = {}

    @property
    def basis(self) -> str:
        """The receipt's basis: `standard` where a utilization is set, else `busy`."""
        return "busy" if self.standard_utilization is None else "standard"

    @property
    def receipt_usd_per_hour(self) -> Decimal | None:
        """What receipts are priced at: the rate, or rate / standard utilization to 1e-12 dollars."""
        if self.usd_per_hour is None or self.standard_utilization is None:
            return self.usd_per_hour
        return (self.usd_per_hour / self.standard_utilization).quantize(_RATE_STEP).normalize()

    @property
    def prices(self) -> PriceSource:
        """For the receipt, from its opening on: recovery prices an interrupted one from it."""
        rate = self.receipt_usd_per_hour
        if rate is None:
            return PriceSource()
        source = "assumption" if self.rate_provenance is Provenance.ASSUMED else f"placements.{self.name}"
        snapshot = {RATE_KEY: format(rate, "f"), "rate_provenance": str(self.rate_provenance), **self.inputs}
        if self.usd_per_hour is not None:
            snapshot["usd_per_hour"] = format(self.usd_per_hour, "f")
        if self.standard_utilization is not None:
            snapshot["standard_utilization"] = format(self.standard_utilization, "f")
        return PriceSource(source, snapshot)


def assumed_placement(name: str, cores: int) -> Placement:
    """A CPU machine that nobody priced: one accelerator at the assumed rate per core."""
    inputs = {
        "kind": "assumed",
        "cores": str(cores),
        "usd_per_core_hour": format(ASSUMED_USD_PER_CORE_HOUR, "f"),
    }
    return Placement(name, 1, ASSUMED_USD_PER_CORE_HOUR * cores, Provenance.ASSUMED, None, inputs)
