"""What a request is quoted, what is held for it, and how it keeps within its caller's maximum cost."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from decimal import Decimal

import msgspec
import pytest

from millicent.backends.fake import FakeAnswer, FakeBackend
from millicent.core.chunks import Text
from millicent.core.clock import NS_PER_S, ManualClock
from millicent.core.errors import ModelNotFound, PaymentRequired
from millicent.core.identifiers import SequentialIds
from millicent.core.money import Money
from millicent.core.quotes import Quote
from millicent.core.receipts import Receipt, Status
from millicent.core.request import Embedding, Limits, Message, Request
from millicent.core.steps import DeviceState
from millicent.core.usage import Provenance
from millicent.ledger.memory import MemoryLedger
from millicent.meter.meter import Meter
from millicent.meter.placements import Placement, PlacementConfig
from millicent.meter.prices import PriceBook, PriceConfig
from millicent.meter.quotes import Quoter
from millicent.pipeline.config import LimitsConfig
from millicent.pipeline.estimates import Estimates
from millicent.pipeline.pipeline import Pipeline

# A cent a second: each of the fake's steps of half a second costs half a cent.
CENT_A_SECOND = Placement("here", 1, Decimal(36), Provenance.MEASURED)
API = msgspec.convert({"kind": "api", "models": ["fake", "far"]}, PlacementConfig).placement("provider")
# One millicent for each token read, four for each written.
PRICES = PriceConfig(input=Decimal(10), output=Decimal(40))


def letters(count: int) -> FakeAnswer:
    return FakeAnswer(tuple(Text("x", 1) for _ in range(count)), delay_s=0.5, input_tokens=100)


class World:
    def __init__(self, answer: FakeAnswer, placement: Placement = CENT_A_SECOND, *, shows_steps: bool = True) -> None:
        self.clock = ManualClock()
        self.ids = SequentialIds()
        self.ledger = MemoryLedger()
        self.meter = Meter(self.clock, "gw", self.ids)
        self.meter.add_device("fake", CENT_A_SECOND)
        self.meter.device_state("fake", DeviceState.UP, self.clock.monotonic_ns())
        self.backend = FakeBackend(
            answer,
            placement=placement.name,
            observer=self.meter if shows_steps else None,
            clock=self.clock,
            sleep=self._work,
        )
        self.opened_before_running: list[Receipt | None] = []
        self.estimates = Estimates(Quoter(lambda *_: None), PriceBook({"fake": PRICES, "far": PRICES}))
        self.pipeline = Pipeline(
            backends=[self.backend],
            ledger=self.ledger,
            meter=self.meter,
            placements={placement.name: placement, API.name: API},
            clock=self.clock,
            limits=LimitsConfig(),
            estimates=self.estimates,
        )

    async def _work(self, seconds: float) -> None:
        if not self.opened_before_running:
            self.opened_before_running.append(self.ledger.queries.receipt(self.backend.requests[-1].id))
        self.clock.advance(int(seconds * NS_PER_S))
        await asyncio.sleep(0)

    def request(self, max_cost: str | None = None, max_tokens: int | None = None) -> Request:
        return Request(
            id=self.ids.new("rcpt"),
            dialect="test",
            model="fake",
            messages=(Message("user", "hi"),),
            limits=Limits(max_tokens=max_tokens),
            max_cost=None if max_cost is None else Money.from_usd(max_cost),
        )

    async def run(self, request: Request) -> tuple[str, Receipt]:
        answer = await self.pipeline.admit(request)
        text = ""
        while (piece := await answer.take()) is not None:
            text += "".join(part.text for part in piece)
        receipt = self.ledger.queries.receipt(request.id)
        assert receipt is not None
        return text, receipt

    async def quote(self, *models: str, max_tokens: int | None = None) -> list[Quote]:
        return await self.pipeline.quotes(self.request(max_tokens=max_tokens), models)


def run(story: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(story(), 60))


def test_the_quotes_upper_bound_is_held_before_anything_runs() -> None:
    async def story() -> None:
        world = World(letters(3))
        (quote,) = [each for each in await world.quote("fake") if each.placement == "here"]
        assert quote.cost is not None
        await world.run(world.request())
        (opened,) = world.opened_before_running
        assert opened is not None
        assert (opened.status, opened.hold) == (None, quote.cost.high)

    run(story)


def test_quotes_learn_from_what_was_answered() -> None:
    async def story() -> None:
        world = World(letters(3))
        before = (await world.quote("fake"))[0]
        for _ in range(40):
            await world.run(world.request())
        after = (await world.quote("fake"))[0]
        assert before.cost is not None
        assert after.cost is not None
        assert (before.provenance, after.provenance) == (Provenance.ASSUMED, Provenance.ESTIMATED)
        # Three steps of half a second, each half a cent.
        assert after.output_tokens.expected == 3
        assert after.cost.low <= Money.from_usd("0.015") <= after.cost.high
        assert after.cost.high < before.cost.high
        assert after.ttft is not None
        assert after.ttft.low <= NS_PER_S // 2 <= after.ttft.high

    run(story)


def test_a_maximum_stops_the_output_in_time_with_length() -> None:
    async def story() -> None:
        world = World(letters(50))
        text, receipt = await world.run(world.request("0.05"))
        # Ten steps are five cents. When the ninth is told of, an engine runs the tenth, and would begin an eleventh.
        assert (text, receipt.finish_reason, receipt.status) == ("x" * 9, "length", Status.SUCCEEDED)
        assert receipt.total == Money.from_usd("0.045")
        assert receipt.hold is not None
        assert receipt.hold <= Money.from_usd("0.05")

    run(story)


@pytest.mark.parametrize("maximum", ["0.03", "0.031", "0.0349", "0.04999", "0.11"])
def test_the_cost_never_goes_beyond_the_maximum(maximum: str) -> None:
    async def story() -> None:
        world = World(letters(500))
        _, receipt = await world.run(world.request(maximum))
        assert receipt.total is not None
        assert Money.from_usd(maximum) - Money.from_usd("0.01") < receipt.total <= Money.from_usd(maximum)

    run(story)


def test_a_maximum_that_is_not_reached_changes_nothing() -> None:
    async def story() -> None:
        world = World(letters(3))
        text, receipt = await world.run(world.request("1"))
        assert (text, receipt.finish_reason) == ("xxx", "stop")

    run(story)


def test_what_must_cost_more_is_refused_with_the_quote_and_nothing_is_spent() -> None:
    async def story() -> None:
        world = World(letters(3))
        with pytest.raises(PaymentRequired) as caught:
            await world.run(world.request("0.000001"))
        assert caught.value.quote is not None
        assert caught.value.quote.cost is not None
        assert caught.value.quote.cost.low > Money.from_usd("0.000001")
        assert world.backend.running == 0
        assert world.ledger.queries.count_open() == 0
        # Refusing gives the place back.
        await world.run(world.request())

    run(story)


def test_a_model_without_a_price_is_refused_where_a_maximum_is_asked_for() -> None:
    async def story() -> None:
        world = World(letters(3), shows_steps=False)
        with pytest.raises(PaymentRequired, match="no price"):
            await world.run(world.request("1"))
        _, receipt = await world.run(world.request())
        assert (receipt.hold, receipt.total) == (None, None)

    run(story)


def test_where_tokens_have_prices_the_output_is_limited_beforehand() -> None:
    async def story() -> None:
        world = World(letters(50), API, shows_steps=False)
        # 100 tokens read are 100 millicents; 30 millicents more pay for 7 tokens written, not for 8.
        text, receipt = await world.run(world.request("0.0013"))
        assert (text, receipt.finish_reason) == ("x" * 7, "length")
        assert receipt.total == Money.from_usd("0.00128")
        assert [line.meter.value for line in receipt.lines] == ["input", "output"]
        assert receipt.prices.source == "prices.fake"
        with pytest.raises(PaymentRequired, match=r"at least|pay for"):
            await world.run(world.request("0.001"))

    run(story)


def test_a_maximum_is_shared_by_all_answers() -> None:
    async def story() -> None:
        world = World(letters(50), API, shows_steps=False)
        # As above: 7 tokens can be paid for, which is 3 for each of two answers, and none for each of eight.
        two = msgspec.structs.replace(world.request("0.0013"), choices=2)
        await world.run(two)
        assert world.backend.requests[-1].limits.max_tokens == 3
        of_prompts = {"messages": None, "prompt": "a", "further_prompts": ("b", "c", "d"), "choices": 2}
        with pytest.raises(PaymentRequired, match="each of 8 answers"):
            await world.run(msgspec.structs.replace(world.request("0.0013"), **of_prompts))

    run(story)


def test_what_nobody_has_counted_is_held_for_by_the_length_of_all_its_texts() -> None:
    async def story() -> None:
        world = World(FakeAnswer(), API, shows_steps=False)
        text = "x" * 399
        for wanted in (
            {"messages": None, "prompt": text, "further_prompts": ((1,) * 100,)},
            {"messages": None, "embedding": Embedding((text, (1,) * 100))},
        ):
            request = msgspec.structs.replace(world.request(max_tokens=10), **wanted)
            call = await world.backend.prepare(request)
            call.input_tokens = None
            asked = world.estimates.asked(request, call, API, 1, 0)
            assert (asked.input_tokens, asked.input_provenance) == (200, Provenance.ASSUMED)

    run(story)


def test_a_quote_of_tokens_is_their_price_up_to_the_limit() -> None:
    async def story() -> None:
        world = World(letters(5), API, shows_steps=False)
        (quote,) = await world.quote("fake", max_tokens=10)
        assert quote.cost is not None
        assert quote.cost.high == Money.from_usd("0.0014")  # 100 read, 10 written
        assert quote.output_tokens.high == 10
        assert (quote.ttft, quote.total) == (None, None)  # nothing is known of the provider's speed yet

    run(story)


def test_models_and_placements_stand_side_by_side() -> None:
    async def story() -> None:
        world = World(letters(5))
        quotes = await world.quote("fake", "far")
        assert [(each.model, each.placement) for each in quotes] == [
            ("fake", "here"),
            ("fake", "provider"),
            ("far", "provider"),
        ]
        assert {each.input_tokens for each in quotes} == {100}
        with pytest.raises(ModelNotFound):
            await world.quote("fake", "nowhere")

    run(story)
