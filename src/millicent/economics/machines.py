"""`[machines.NAME]`: machines that aren't run here, to be compared with what is."""

from __future__ import annotations

from decimal import Decimal
from typing import Annotated

import msgspec

from millicent.core.errors import ConfigError, InvalidRequest
from millicent.meter.placements import Placement, PlacementConfig

_Milliseconds = Annotated[int, msgspec.Meta(ge=1)]


class MachineConfig(PlacementConfig, frozen=True, kw_only=True):
    """A machine that could be had, `rented`, `owned` or `provisioned`, for `millicent plan where`. What it costs is
    stated as for a placement, for each of its `accelerators`.

    What it can do is measured where it is `like` a placement of this ledger, or stated: `output_tokens_per_s`, or
    `requests_per_hour`, of the whole machine with traffic like this one's. `p50_ms` and `p95_ms` are quoted latencies.
    """

    like: str | None = None
    output_tokens_per_s: Decimal | None = None
    requests_per_hour: Decimal | None = None
    p50_ms: _Milliseconds | None = None
    p95_ms: _Milliseconds | None = None

    def machine(self, name: str) -> Placement:
        """Its rate, as a placement's. Raises ConfigError naming the setting."""
        at = f"[machines.{name}]"
        if self.kind in {"api", "edge"}:
            raise ConfigError(f'{at} kind = "{self.kind}": must be rented, owned or provisioned')
        if self.standard_utilization is not None:
            raise ConfigError(f"{at} standard_utilization: is for receipts, and nothing runs here: remove it")
        told = [what for what in _CAPACITY if getattr(self, what) is not None]
        if len(told) > 1:
            raise ConfigError(f"{at} {told[1]}: `{told[0]}` says what it can do already: keep one")
        for what in told:
            value = getattr(self, what)
            if what != "like" and not (value.is_finite() and value > 0):
                raise ConfigError(f"{at} {what} = {value}: must be above 0")
        shared = {field: getattr(self, field) for field in PlacementConfig.__struct_fields__}
        try:
            return PlacementConfig(**shared).placement(name)
        except ConfigError as error:
            raise ConfigError(error.message.replace(f"[placements.{name}]", at, 1)) from None


def machine_from(text: str) -> tuple[str, MachineConfig]:
    """`gpu,usd_per_hour=2.5,output_tokens_per_s=2500`: a name and settings; rented, unless `kind` says otherwise.

    Raises InvalidRequest for what is no setting, or no value of one.
    """
    name, *settings = (part.strip() for part in text.split(","))
    given = {"kind": "rented"} | dict(setting.partition("=")[::2] for setting in settings)
    try:
        machine = msgspec.convert(given, MachineConfig, strict=False)
        machine.machine(name)
    except (msgspec.ValidationError, ConfigError) as error:
        raise InvalidRequest(
            f"machine {text!r}: {error}; write NAME,usd_per_hour=2.5,output_tokens_per_s=2500", param="machine"
        ) from None
    return name, machine


_CAPACITY = ("like", "output_tokens_per_s", "requests_per_hour")
