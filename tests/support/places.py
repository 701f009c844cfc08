"""A pipeline over several fake deployments, in virtual time: `main` on two providers, `spare` on a machine of ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from decimal import Decimal
from pathlib import Path
from random import Random
from typing import Any

import msgspec

from millicent.backends.fake import FakeAnswer, FakeBackend, FakeCall, FakeRun
from millicent.core.budgets import Balance, Budget, Every
from millicent.core.chunks import Text
from millicent.core.errors import MillicentError
from millicent.core.identifiers import SequentialIds
from millicent.core.money import Money
from millicent.core.protocols import Backend
from millicent.core.receipts import Receipt
from millicent.core.request import Limits, Message, Request
from millicent.core.steps import DeviceState
from millicent.core.usage import Provenance
from millicent.ledger.budgets import put_budget, read_balances
from millicent.ledger.memory import MemoryLedger
from millicent.meter.meter import Meter
from millicent.meter.placements import Placement, PlacementConfig
from millicent.meter.prices import PriceBook, PriceConfig
from millicent.meter.quotes import Quoter
from millicent.pipeline.answer import Answer
from millicent.pipeline.config import LimitsConfig, ModelPolicy
from millicent.pipeline.deployments import Place
from millicent.pipeline.estimates import Estimates
from millicent.pipeline.features import FeatureConfig, Features
from millicent.pipeline.holdout import Holdout, HoldoutConfig
from millicent.pipeline.pipeline import Pipeline
from millicent.pipeline.prompts import Prompts
from millicent.routing.config import PolicyConfig
from millicent.routing.policies import Policies
from support.virtual_time import LoopClock

Script = FakeAnswer | Callable[[Request], FakeAnswer]

# One millicent for each token read, four for each written.
PRICE = PriceConfig(input=Decimal(10), output=Decimal(40))
SECRET = b"s" * 32
# A cent a second.
MACHINE = Placement("here", 1, Decimal(36), Provenance.MEASURED)


def api(name: str) -> Placement:
    return msgspec.convert({"kind": "api"}, PlacementConfig).placement(name)


def letters(count: int, *, text: str = "x", **changes: Any) -> FakeAnswer:
    return FakeAnswer(tuple(Text(text, 1) for _ in range(count)), **{"input_tokens": 100, "delay_s": 0.5, **changes})


class WatchedBackend(FakeBackend):
    """Insists that the attempt is durable before it is called, and counts its calls."""

    ledger: MemoryLedger
    calls = 0

    async def prepare(self, request: Request) -> FakeCall:
        call = await super().prepare(request)
        backend, start = self, call.start

        def watched() -> FakeRun:
            backend.calls += 1
            receipt = backend.ledger.queries.receipt(request.id)
            assert receipt is not None
            attempt = receipt.attempts[-1]
            assert (attempt.backend, attempt.ended_at_ns, receipt.status) == (backend.name, None, None)
            assert all(earlier.ended_at_ns is not None for earlier in receipt.attempts[:-1])
            return start()

        call.start = watched  # type: ignore[method-assign]
        return call


class World:
    """`one` and `two` are providers that have `main`, `here` a machine of ours that has `spare`; all have prices."""

    def __init__(
        self,
        one: Script,
        two: Script | None = None,
        here: Script | None = None,
        *,
        policy: ModelPolicy | None = None,
        features: Mapping[str, FeatureConfig] | None = None,
        weights: tuple[int, int] = (1, 1),
        max_connections: int | None = None,
        seed: int = 0,
        concurrent: int = 256,
        routing: Mapping[str, PolicyConfig] | None = None,
        marked_at: tuple[str, ...] = (),
        prices: PriceConfig = PRICE,
        holdout: HoldoutConfig | None = None,
    ) -> None:
        self.clock = LoopClock()
        self.ids = SequentialIds()
        self.ledger = MemoryLedger()
        self.meter = Meter(self.clock, "gw", self.ids)
        self.meter.add_device("cpu", MACHINE)
        self.meter.device_state("cpu", DeviceState.UP, self.clock.monotonic_ns())
        self.one = self._backend("one", one, "main")
        self.two = self._backend("two", two, "main") if two is not None else None
        self.here = self._backend("here", here, "spare", observed=True) if here is not None else None
        places = [Place(self.one, "one", weights[0], max_connections)]
        places += [Place(self.two, "two", weights[1], max_connections)] if self.two is not None else []
        backends: list[Backend] = [each for each in (self.one, self.two, self.here) if each is not None]
        self.pipeline = Pipeline(
            backends=backends,
            ledger=self.ledger,
            meter=self.meter,
            placements={"one": api("one"), "two": api("two"), "here": MACHINE},
            clock=self.clock,
            limits=LimitsConfig(max_concurrent=concurrent),
            features=Features(features or {}),
            estimates=Estimates(Quoter(lambda *_: None), PriceBook({"main": prices, "spare": PRICE})),
            places={"main": places},
            policies={} if policy is None else {"main": policy},
            random=Random(seed),
            routing=Policies(routing or {}, Path()),
            prompts=Prompts(SECRET, self.clock, marked_at, marked_at),
            holdout=Holdout(holdout or HoldoutConfig()),
        )
        self.budget: Budget | None = None

    def _backend(self, name: str, script: Script, model: str, *, observed: bool = False) -> WatchedBackend:
        observer = self.meter if observed else None
        backend = WatchedBackend(
            script, models=(model,), name=name, placement=name, device="cpu", observer=observer, clock=self.clock
        )
        backend.ledger = self.ledger
        return backend

    async def limit(self, usd: str) -> None:
        """A hard budget over everything."""
        budget = self.budget = Budget(name="b", limit=Money.from_usd(usd), every=Every.ONCE)
        await self.ledger.write(lambda connection: put_budget(connection, budget))

    async def balance(self) -> Balance:
        budget = self.budget
        assert budget is not None
        found = await self.ledger.write(lambda connection: read_balances(connection, budget, self.clock.now_ns()))
        return found[0] if found else Balance("", 0, Money(0), Money(0))

    def request(self, **changes: Any) -> Request:
        given = {"model": "main", "messages": (Message("user", "hi"),), "limits": Limits(max_tokens=10), **changes}
        return Request(id=self.ids.new("rcpt"), dialect="test", **given)

    async def ask(self, **changes: Any) -> tuple[Receipt, str, MillicentError | None]:
        """The receipt, what text came, and the error after it."""
        answer = await self.pipeline.admit(self.request(**changes))
        text, error = await read(answer)
        return self.receipt(answer), text, error

    def receipt(self, answer: Answer) -> Receipt:
        found = self.ledger.queries.receipt(answer.receipt_id)
        assert found is not None
        return found

    async def close(self) -> None:
        """Everything is over: nothing is held, nothing runs, and the books agree."""
        await self.pipeline.drain(0)
        await self.pipeline.close()
        assert self.ledger.queries.verify() == []
        assert self.ledger.queries.count_open() == 0
        assert all(report.running == 0 for report in self.pipeline.deployments())
        assert all(report.retry_after_s is not None or report.state != "open" for report in self.pipeline.deployments())


async def read(answer: Answer) -> tuple[str, MillicentError | None]:
    text = ""
    try:
        while (pieces := await answer.take()) is not None:
            text += "".join(piece.text for piece in pieces)
    except MillicentError as error:
        return text, error
    return text, None
