"""`[holdout]`: the part of requests that goes without a lever, so that what the lever saves can be measured."""

from __future__ import annotations

from decimal import Decimal

import msgspec

from millicent.core.errors import ConfigError
from millicent.core.holdouts import HELD, Arm, Held, drawn
from millicent.core.request import Request

_MOST = Decimal("0.5")


class HoldoutConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`share` (at most 0.5) of the requests that one of `levers` is for go without it, drawn for each lever apart; in
    `features` another share, by their names. Drawn by the conversation where a request has one, else by the run, else
    by the request: the same again for the same. Receipts say which side each is on, and `millicent plan cheaper`
    compares the two.
    """

    share: Decimal = Decimal(0)
    levers: tuple[Held, ...] = HELD
    features: dict[str, Decimal] = {}

    def check(self) -> None:
        """Raises ConfigError naming the setting."""
        shares = {"share": self.share} | {f"features.{name}": share for name, share in self.features.items()}
        for setting, share in shares.items():
            if not (share.is_finite() and 0 <= share <= _MOST):
                raise ConfigError(f"[holdout] {setting} = {share}: must be from 0 to {_MOST}")


class Holdout:
    """Draws. Where nothing is held out, nobody is on any side."""

    def __init__(self, config: HoldoutConfig) -> None:
        self._config = config

    def arm(self, lever: Held, request: Request) -> Arm | None:
        """The side that this request is on, should the lever be for it."""
        given = request.attribution
        share = self._config.features.get(given.feature or "", self._config.share)
        if not share or lever not in self._config.levers:
            return None
        # One key's conversation isn't another's of the same name.
        together = given.conversation or given.run
        return drawn(lever, share, request.id if together is None else f"{given.key or ''}\0{together}")
