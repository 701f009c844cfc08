"""A gateway that stands still, for what shows it."""

from __future__ import annotations

import asyncio
from decimal import Decimal

import msgspec

from millicent.core.accounts import Account
from millicent.core.clock import NS_PER_HOUR
from millicent.core.money import Money
from millicent.core.usage import Provenance
from millicent.server.application import EngineReport

ACCOUNT = Account(
    "cpu", "this-machine", 0, 1, NS_PER_HOUR, 1_000_000_000, 2_000_000_000, 3_000_000_000, NS_PER_HOUR - 10_000_000_000,
    4_000_000_000, Decimal(1), Provenance.MEASURED, Money(1),
)  # fmt: skip


class Deployed(msgspec.Struct):
    model: str
    placement: str
    state: str


class StandInGateway:
    """Two of its requests have begun, one waits; one of its deployments takes no calls."""

    def models(self) -> tuple[str, ...]:
        return ("tiny",)

    def load(self) -> list[tuple[str, bool]]:
        return [("tiny", True), ("tiny", True), ("tiny", False)]

    def deployments(self) -> list[Deployed]:
        return [Deployed("tiny", "this-machine", "closed"), Deployed("tiny", "far", "open")]

    async def checkpoint(self) -> None:
        await asyncio.sleep(0)


class Engines:
    """A health that is good."""

    def engines(self) -> list[EngineReport]:
        return [EngineReport("cpu", 1, {"tiny": "ready"}, "ready")]

    def trouble(self) -> str | None:
        return None
