"""Latency targets: refused before anything is spent where the forecast misses them, told on the receipt else."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from millicent.backends.fake import FakeAnswer, FakeBackend
from millicent.core.chunks import Text
from millicent.core.clock import NS_PER_MS, NS_PER_S, ManualClock
from millicent.core.errors import RateLimited
from millicent.core.fits import StepTimeFit
from millicent.core.identifiers import SequentialIds
from millicent.core.receipts import Receipt
from millicent.core.request import Attribution, Limits, Request
from millicent.core.steps import DeviceState
from millicent.core.usage import Provenance, Usage
from millicent.ledger.memory import MemoryLedger
from millicent.meter.attribution import StepTimeShares
from millicent.meter.meter import Meter
from millicent.meter.placements import assumed_placement
from millicent.meter.waits import Beside, Waits
from millicent.pipeline.config import LimitsConfig
from millicent.pipeline.features import FeatureConfig, Features
from millicent.pipeline.latency import Trials, check_target
from millicent.pipeline.pipeline import Pipeline
from millicent.step_time import Coefficients

# A token of a prompt takes 1 ms, a step of any kind 10 ms more.
FIT = Coefficients(10 * NS_PER_MS, 0.0, NS_PER_MS, 0.0, 0.0, 0.0)
MINE = Beside(100, 20)


def forecast_ms(others: list[Beside], *, slots: int = 4, streamed: bool = True) -> int:
    wait = Waits(lambda model: FIT, slots).forecast("m", MINE, others, streamed=streamed)
    assert wait is not None
    return wait.forecast_ns // NS_PER_MS


def test_streamed_answers_are_due_by_their_first_token_and_others_whole() -> None:
    assert forecast_ms([]) == 110
    assert forecast_ms([], streamed=False) == 110 + 19 * 11


def test_prompts_that_came_before_are_computed_before() -> None:
    waiting = Beside(300, 20)
    running = Beside(300, 20, 5, begun=True)
    assert forecast_ms([waiting]) == 110 + 310 + 1  # and a row for it in the same step
    assert forecast_ms([running]) == 110 + 1


def test_with_all_places_taken_one_must_come_free() -> None:
    running = [Beside(10, 20, made, begun=True) for made in (18, 10)]
    assert forecast_ms(running, slots=3) == 112
    assert forecast_ms(running, slots=2) == 111 + 2 * 12
    assert forecast_ms([*running, Beside(10, 20, 15, begun=True)], slots=2) == 111 + 5 * 12


def test_a_request_of_several_choices_takes_several_places() -> None:
    assert forecast_ms([Beside(10, 20, 18, begun=True, sequences=2)], slots=2) == 111 + 2 * 12


def test_the_refusal_says_when_to_come_again() -> None:
    wait = Waits(lambda model: FIT, 4).forecast("m", MINE, [Beside(5000, 20)], streamed=True)
    assert wait is not None
    with pytest.raises(RateLimited, match="beside 1 others") as busy:
        check_target(1000, wait, 1)
    assert busy.value.retry_after_s == 5  # it would be some 4.2 s late
    with pytest.raises(RateLimited, match="even with the machine to itself") as hopeless:
        check_target(50, wait, 1)
    assert hopeless.value.retry_after_s == 60
    assert hopeless.value.code == "latency_target_unreachable"
    check_target(10_000, wait, 1)


def test_what_is_hopeless_is_tried_again_once_a_minute_for_each_model() -> None:
    trials = Trials()
    tried = [second for second in range(200) if trials.due("m", second * NS_PER_S)]
    assert tried == [60, 120, 180]
    assert [trials.due("other", second * NS_PER_S) for second in (200, 259, 260)] == [False, False, True]


def test_prompts_that_caches_hold_take_less_time() -> None:
    waits = Waits(lambda model: FIT, 4)
    usage = Usage.of(Provenance.MEASURED, input_fresh=10, input_cache_read=90, output_text=5)
    waits.learn(Receipt(id="r", created_at_ns=0, model="m", dialect="test", stream=True, usage=usage))
    cached, other = (waits.forecast(model, MINE, [], streamed=True) for model in ("m", "another"))
    assert cached is not None
    assert other is not None
    assert (cached.alone_ns, other.alone_ns) == (20 * NS_PER_MS, 110 * NS_PER_MS)


def test_nothing_is_forecast_of_a_model_whose_steps_nobody_knows() -> None:
    assert Waits(lambda model: None, 4).forecast("m", MINE, [], streamed=True) is None


class World:
    """A pipeline whose backend takes 100 ms for each of three pieces, with a fit that says what steps take."""

    def __init__(self) -> None:
        self.clock, self.ids, self.ledger = ManualClock(), SequentialIds(), MemoryLedger()
        placement = assumed_placement("here", 2)
        meter = Meter(self.clock, "gw", self.ids)
        meter.add_device("fake", placement)
        meter.device_state("fake", DeviceState.UP, self.clock.monotonic_ns())
        answer = FakeAnswer(tuple(Text(letter, 1) for letter in "abc"), delay_s=0.1, input_tokens=100)
        backend = FakeBackend(answer, placement="here", observer=meter, clock=self.clock, sleep=self._work)
        shares = StepTimeShares(self.clock, self.ids)
        known = msgspec.structs.asdict(FIT) | {"steps": 100, "error": 0.1, "fitted_at_ns": 0}
        shares.load([StepTimeFit("f1", "fake", "fake", "", **known)])
        self.pipeline = Pipeline(
            backends=[backend],
            ledger=self.ledger,
            meter=meter,
            placements={"here": placement},
            clock=self.clock,
            limits=LimitsConfig(),
            fits=shares,
            features=Features({"search": FeatureConfig(latency_target_ms=50)}),
            waits=Waits(shares.coefficients, 4),
        )

    async def _work(self, seconds: float) -> None:
        self.clock.advance(int(seconds * NS_PER_S))
        await asyncio.sleep(0)

    async def ask(self, target_ms: int | None, feature: str | None = None) -> Receipt:
        request = Request(
            id=self.ids.new("rcpt"),
            dialect="test",
            model="fake",
            prompt="hi",
            limits=Limits(max_tokens=3),
            attribution=Attribution(feature=feature),
            latency_target_ms=target_ms,
        )
        answer = await self.pipeline.admit(request)
        while await answer.take() is not None:
            pass
        assert answer.settled is not None
        return answer.settled


@pytest.mark.parametrize(("target_ms", "met"), [(1000, "true"), (200, "false")])
def test_the_receipt_says_whether_its_target_was_met(target_ms: int, met: str) -> None:
    receipt = asyncio.run(World().ask(target_ms))
    assert receipt.policy == {"latency_target_ms": str(target_ms), "latency_target_met": met}


def test_without_a_target_the_receipt_says_nothing_of_one() -> None:
    assert asyncio.run(World().ask(None)).policy is None


def test_what_cannot_be_met_is_refused_and_leaves_no_receipt() -> None:
    world = World()
    with pytest.raises(RateLimited):
        asyncio.run(world.ask(50))
    assert world.ledger.queries.recent(10) == []


def test_a_feature_has_a_target_for_requests_without_one() -> None:
    world = World()
    with pytest.raises(RateLimited):
        asyncio.run(world.ask(None, "search"))
    assert asyncio.run(world.ask(1000, "search")).policy == {
        "latency_target_ms": "1000",
        "latency_target_met": "true",
    }


def test_what_a_spoiled_fit_calls_hopeless_runs_again_after_a_minute() -> None:
    world = World()

    async def go() -> Receipt:
        with pytest.raises(RateLimited):
            await world.ask(50)
        world.clock.advance(61 * NS_PER_S)
        receipt = await world.ask(50)
        with pytest.raises(RateLimited):
            await world.ask(50)
        return receipt

    assert (asyncio.run(go()).policy or {})["latency_target_met"] == "false"
