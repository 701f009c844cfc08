"""The demo's traffic through the real pipeline, meter and ledger, in a home of its own."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random
from typing import cast

import msgspec

from millicent.app import ServeOptions, step_configuration
from millicent.backends.fake import FakeAnswer, FakeBackend
from millicent.cli.demo_engine import DemoBackend, DemoEngine
from millicent.cli.demo_story import CONFIG, FEATURES, MODELS, STEPS, Event, Story, answer, improvised
from millicent.cli.demo_time import LoopClock, SkippingLoop, Working
from millicent.config import FILE_NAME, Config, load
from millicent.control.budgets import follow_config
from millicent.core.clock import NS_PER_HOUR, NS_PER_S, Clock, hour_start_ns
from millicent.core.errors import ConfigError, MillicentError
from millicent.core.files import private_folder
from millicent.core.identifiers import SystemIds
from millicent.core.protocols import Backend, Ledger
from millicent.core.receipts import Feedback, Receipt
from millicent.core.request import Request
from millicent.core.steps import DeviceState
from millicent.engine.config import EngineConfig
from millicent.ledger.queries import LedgerQueries
from millicent.ledger.sqlite import SqliteLedger
from millicent.meter.attribution import StepTimeShares
from millicent.meter.energy import StatedPower
from millicent.meter.meter import Meter
from millicent.meter.placements import Placement, stated_watts
from millicent.meter.prices import PriceBook
from millicent.meter.quotes import Quoter
from millicent.pipeline.deployments import Place
from millicent.pipeline.estimates import Estimates
from millicent.pipeline.features import Features
from millicent.pipeline.pipeline import Pipeline
from millicent.watch.watcher import Watcher

MARK = "demo"  # a home with this file holds a demo, and nothing else
# Hours are looked at once their last answers have had time to end.
_LOOK_AFTER_NS = 180 * NS_PER_S
_CHECKPOINTS_NS = 6 * NS_PER_HOUR


class Planned:
    """What the stand-ins answer: what was planned for a request, in turn; else what its feature's requests get; else,
    in the chat, something short."""

    def __init__(self, random: Random) -> None:
        self.answers: dict[str, list[FakeAnswer]] = {}
        self._random = random

    def __call__(self, request: Request) -> FakeAnswer:
        left = self.answers.get(request.id)
        feature = next((each for each in FEATURES if each.name == request.attribution.feature), None)
        if left is None and feature is not None and feature.name is not None:
            return improvised(self._random, feature, request.model)
        if left is None:
            words = "This is the demo: no model runs here, and nobody wrote this."
            return answer(MODELS[request.model][0], 40, 0, 24, words)
        return left.pop(0) if len(left) > 1 else left[0]


def stand_ins(
    planned: Planned, meter: Meter, places: dict[str, Placement], clock: Clock
) -> tuple[list[Backend], dict[str, list[Place]]]:
    """A backend for each placement, and where each model runs. Devices of placements that are paid for by the hour
    show their steps to the meter."""
    backends: dict[str, Backend] = {}
    numbers = itertools.count(1)
    for name, place in places.items():
        models = [model for model, where in MODELS.items() if name in where]
        if name in STEPS:
            watts = stated_watts(place)
            meter.add_device(name, place, energy=None if watts is None else StatedPower(watts))
            meter.device_state(name, DeviceState.UP, clock.monotonic_ns())
            engine = DemoEngine(name, STEPS[name], EngineConfig(), meter, clock)
            backends[name] = DemoBackend(name, models[0], engine, planned, numbers)
        else:
            backends[name] = FakeBackend(planned, models=models, name=name, placement=name, device=name, clock=clock)
    weights = {"aster": 3}
    deployed = {
        model: [Place(backends[name], name, weights.get(name, 1)) for name in where] for model, where in MODELS.items()
    }
    return list(backends.values()), deployed


def prepare(home: Path) -> Config:
    """The demo's configuration, in its home. Raises ConfigError for a home that is anybody's real one."""
    if home.exists() and any(home.iterdir()) and not (home / MARK).exists():
        raise ConfigError(f"{home} holds something that is no demo: name an empty or a new folder with --home.")
    private_folder(home)
    (home / MARK).touch()
    (home / FILE_NAME).write_text(CONFIG, encoding="utf-8")
    return load(home / FILE_NAME)


def placements(config: Config) -> dict[str, Placement]:
    return {name: each.placement(name) for name, each in config.placements.items()}


def served(home: Path, config: Config, random: Random) -> ServeOptions:
    """How it is served: what would be called is stood in for."""
    places = placements(config)
    first, *others = places.values()
    return ServeOptions(
        home=home,
        config=config,
        models={},
        placement=first,
        providers=tuple(others),
        demo=lambda meter, clock: stand_ins(Planned(random), meter, places, clock),
    )


def replay(
    home: Path, config: Config, *, days: int, per_day: int, end_ns: int, seed: int, tell: Callable[[float], None]
) -> int:
    """Make the ledger. Returns how many requests that were; `tell` hears what part of the time is done."""
    story = Story(Random(seed), days=days, end_ns=end_ns, per_day=per_day)  # noqa: S311 - made-up traffic, made again
    with asyncio.Runner(loop_factory=SkippingLoop) as runner:
        loop = cast("SkippingLoop", runner.get_loop())
        clock = LoopClock(loop, story.start_ns)
        return runner.run(_replayed(home, config, story, loop, clock, Random(seed + 1), end_ns, tell))  # noqa: S311


async def _replayed(
    home: Path,
    config: Config,
    story: Story,
    loop: SkippingLoop,
    clock: LoopClock,
    random: Random,
    end_ns: int,
    tell: Callable[[float], None],
) -> int:
    ids = SystemIds(clock, random.randbytes)
    gateway = ids.new("gw")
    ledger = SqliteLedger(home / "ledger.db", config.ledger, clock, gateway)
    await ledger.start()
    try:
        waiting = cast("Ledger", Working(loop, ledger))
        shares = StepTimeShares(clock, ids, step_configuration(config.engine))
        meter = Meter(clock, gateway, ids, shares)
        planned, places = Planned(random), placements(config)
        backends, deployed = stand_ins(planned, meter, places, clock)
        await ledger.write(partial(follow_config, configured=config.budgets))
        features = Features(config.features)
        pipeline = Pipeline(
            backends=backends,
            ledger=waiting,
            meter=meter,
            placements=places,
            clock=clock,
            limits=config.limits,
            fits=shares,
            features=features,
            estimates=Estimates(Quoter(lambda *_: None), PriceBook(config.prices, lambda *_: None)),
            places=deployed,
            policies=config.policies,
            random=random,
        )
        queries = LedgerQueries(home / "ledger.db")
        alert_ids = SystemIds(clock, Random(len(config.alerts)).randbytes)  # noqa: S311 - made again like all else
        watching = Watcher(config.alerts, ledger=ledger, queries=queries, clock=clock, ids=alert_ids)
        watcher = cast("Watcher", Working(loop, watching))
        teller = _Teller(pipeline, waiting, planned, features, ids, clock, random)
        await pipeline.checkpoint()
        next_ns = hour_start_ns(clock.now_ns()) + _CHECKPOINTS_NS
        look_ns = next_ns + _LOOK_AFTER_NS
        tasks: set[asyncio.Task[None]] = set()
        for event in story.events():
            while next_ns <= event.at_ns:
                await _until(clock, next_ns)
                await pipeline.checkpoint()
                tell((next_ns - story.start_ns) / (end_ns - story.start_ns))
                next_ns += _CHECKPOINTS_NS
            while look_ns <= event.at_ns:
                await _until(clock, look_ns)
                while await watcher.tick():
                    pass
                look_ns += _CHECKPOINTS_NS
            await _until(clock, event.at_ns)
            task = asyncio.create_task(teller.tell(event))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        await asyncio.gather(*tasks)
        await _until(clock, end_ns)
        await pipeline.drain(0)
        await pipeline.close()
        return teller.told
    finally:
        loop.working += 1  # what ends now does so in real time: the ledger's thread, and then the event loop's own
        await ledger.stop()


async def _until(clock: Clock, at_ns: int) -> None:
    if (left_ns := at_ns - clock.now_ns()) > 0:
        await asyncio.sleep(left_ns / NS_PER_S)


class _Teller:
    """Plays one event: asks, reads the answer as a client does, and rates it later."""

    def __init__(
        self,
        pipeline: Pipeline,
        ledger: Ledger,
        planned: Planned,
        features: Features,
        ids: SystemIds,
        clock: Clock,
        random: Random,
    ) -> None:
        self.told = 0
        self._pipeline = pipeline
        self._ledger = ledger
        self._planned = planned
        self._features = features
        self._ids = ids
        self._clock = clock
        self._random = random

    async def tell(self, event: Event) -> None:
        request = msgspec.structs.replace(event.request, id=self._ids.new("rcpt"))
        self._planned.answers[request.id] = list(event.answers)
        self.told += 1
        try:
            receipt = await self._answered(request, event.cancel_after_s)
        except MillicentError:
            return  # its receipt, if it got that far, says what went wrong; the demo's clients go on
        finally:
            del self._planned.answers[request.id]
        if receipt is not None and event.score is not None and receipt.status == "succeeded":
            await self._rated(receipt, event)

    async def _answered(self, request: Request, cancel_after_s: float | None) -> Receipt | None:
        answer = await self._pipeline.admit(request)
        leaving = None
        if cancel_after_s is not None:
            leaving = asyncio.get_running_loop().call_later(cancel_after_s, answer.cancel)
        try:
            while await answer.take() is not None:
                pass
        finally:
            if leaving is not None:
                leaving.cancel()
        return answer.settled

    async def _rated(self, receipt: Receipt, event: Event) -> None:
        """A minute or so after the answer."""
        await asyncio.sleep(self._random.uniform(5, 120))
        feature = receipt.attribution.feature
        useful = self._features.feedback(feature, event.score, None)
        feedback = Feedback(receipt.id, self._clock.now_ns(), score=event.score, useful=useful, id="demo")
        await self._ledger.add_feedback((feedback,))
