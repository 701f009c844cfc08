"""Every request's way from admission to its receipt, with fakes on all sides."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, cast

import pytest

from millicent.backends.fake import FakeAnswer, FakeBackend
from millicent.core.chunks import FinishReason, Text
from millicent.core.clock import NS_PER_S, ManualClock
from millicent.core.errors import (
    EngineCrashed,
    InvalidRequest,
    LedgerUnavailable,
    MillicentError,
    ModelNotFound,
    RateLimited,
    Unavailable,
)
from millicent.core.identifiers import SequentialIds
from millicent.core.protocols import Observer
from millicent.core.receipts import HourShare, Receipt, Status
from millicent.core.request import Message, Request
from millicent.core.steps import DeviceState, StepRecord
from millicent.core.usage import Provenance
from millicent.ledger.memory import MemoryLedger
from millicent.ledger.queries import ReceiptFilter
from millicent.meter.meter import Meter
from millicent.meter.placements import Placement, assumed_placement
from millicent.pipeline.answer import Answer
from millicent.pipeline.config import LimitsConfig
from millicent.pipeline.pipeline import Pipeline

LETTERS = tuple(Text(letter, 1) for letter in "abcdef")


class GatedLedger(MemoryLedger):
    """`close` waits until the gate is opened."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = asyncio.Event()
        self.gate.set()

    async def close(self, receipt: Receipt, shares: tuple[HourShare, ...], answer: str | None = None) -> None:
        await self.gate.wait()
        await super().close(receipt, shares, answer)


class World:
    """A pipeline and what it needs; time passes only as the fake backend works."""

    def __init__(self, answer: FakeAnswer | Callable[[Request], FakeAnswer], max_concurrent: int = 8) -> None:
        self.clock = ManualClock()
        self.ids = SequentialIds()
        self.ledger = GatedLedger()
        placement: Placement = assumed_placement("here", 2)
        self.meter = Meter(self.clock, "gw", self.ids)
        self.meter.add_device("fake", placement)
        self.meter.device_state("fake", DeviceState.UP, self.clock.monotonic_ns())
        self.backend = FakeBackend(answer, placement="here", observer=self.meter, clock=self.clock, sleep=self._work)
        self.pipeline = Pipeline(
            backends=[self.backend],
            ledger=self.ledger,
            meter=self.meter,
            placements={"here": placement},
            clock=self.clock,
            limits=LimitsConfig(max_concurrent=max_concurrent),
        )

    async def _work(self, seconds: float) -> None:
        self.clock.advance(int(seconds * NS_PER_S))
        await asyncio.sleep(0)

    def request(self, model: str = "fake") -> Request:
        message = Message("user", "hi")
        return Request(id=self.ids.new("rcpt"), dialect="test", model=model, messages=(message,))

    async def ask(self, model: str = "fake") -> Answer:
        return await self.pipeline.admit(self.request(model))

    def receipt(self, answer: Answer) -> Receipt:
        found = self.ledger.queries.receipt(answer.receipt_id)
        assert found is not None
        return found


async def taken(answer: Answer) -> str:
    return "".join(text.text for text in await answer.take() or ())


async def read(answer: Answer) -> str:
    text = ""
    while (piece := await answer.take()) is not None:
        text += "".join(part.text for part in piece)
    return text


def run(story: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(60):
            await story()

    asyncio.run(bounded())


def test_an_answer_is_read_and_its_receipt_tells_all_of_it() -> None:
    async def story() -> None:
        world = World(FakeAnswer(LETTERS, delay_s=0.5, input_tokens=7))
        answer = await world.ask()
        assert await read(answer) == "abcdef"
        receipt = world.receipt(answer)
        assert receipt == answer.settled
        assert (receipt.status, receipt.finish_reason) == (Status.SUCCEEDED, "stop")
        assert (receipt.usage.input_tokens, receipt.usage.output_tokens) == (7, 6)
        assert receipt.accelerator.serving_ns == 3 * NS_PER_S
        assert receipt.timing.queue_ns == 0
        assert receipt.timing.ttft_ns == NS_PER_S // 2
        assert receipt.timing.tpot_ns == NS_PER_S // 2
        assert receipt.timing.total_ns == 3 * NS_PER_S
        # 3 s of a machine at an assumed $0.10/hour
        assert str(receipt.total) == "0.000083333"
        assert receipt.lines[0].provenance is Provenance.ASSUMED
        assert receipt.attempts[0].status is Status.SUCCEEDED

    run(story)


def test_the_open_receipt_is_durable_before_the_backend_is_called() -> None:
    async def story() -> None:
        world = World(FakeAnswer(LETTERS))
        answer = await world.ask()
        assert world.receipt(answer).status is None
        assert world.backend.running == 0
        await read(answer)

    run(story)


def test_no_answer_ends_before_its_receipt_is_durable() -> None:
    async def story() -> None:
        world = World(FakeAnswer(LETTERS))
        world.ledger.gate.clear()
        answer = await world.ask()
        reading = asyncio.create_task(read(answer))
        for _ in range(100):
            await asyncio.sleep(0)
        assert answer.closing is not None
        assert not reading.done()
        assert world.pipeline.running(answer) == answer.closing
        world.ledger.gate.set()
        assert await reading == "abcdef"

    run(story)


def test_a_ledger_that_cannot_be_written_stops_work_before_it_starts() -> None:
    async def story() -> None:
        world = World(FakeAnswer(LETTERS), max_concurrent=1)
        world.ledger.problem = "disk full"
        for _ in range(3):
            with pytest.raises(LedgerUnavailable):
                await world.ask()
        assert world.backend.running == 0
        world.ledger.problem = None
        assert await read(await world.ask()) == "abcdef"

    run(story)


def test_an_answer_whose_receipt_cannot_be_closed_ends_in_an_error_and_is_closed_later() -> None:
    async def story() -> None:
        world = World(FakeAnswer(LETTERS))
        answer = await world.ask()
        world.ledger.problem = "disk full"
        with pytest.raises(LedgerUnavailable):
            await read(answer)
        assert world.receipt(answer).status is None
        world.ledger.problem = None
        await world.pipeline.checkpoint()
        receipt = world.receipt(answer)
        assert receipt.status is Status.SUCCEEDED
        assert receipt.usage.output_tokens == 6

    run(story)


def test_an_answer_whose_receipt_no_ledger_can_hold_ends_in_an_error(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def too_large(*_: object) -> None:
        raise OverflowError("Python int too large to convert to SQLite INTEGER")

    async def story() -> None:
        world = World(FakeAnswer(LETTERS))
        monkeypatch.setattr(world.ledger, "close", too_large)
        answer = await world.ask()
        with pytest.raises(MillicentError, match="The server failed"):
            await read(answer)
        assert world.receipt(answer).status is None
        assert "could not be closed" in caplog.text
        caplog.clear()
        await world.pipeline.drain(0)

    run(story)


@pytest.mark.parametrize("seconds", [-7200, 7200])
def test_durations_are_what_passed_when_the_system_clock_is_set_meanwhile(seconds: int) -> None:
    async def story() -> None:
        world = World(FakeAnswer(LETTERS, delay_s=0.5))
        answer = await world.ask()
        assert await taken(answer) == "a"
        world.clock.set(seconds * NS_PER_S)
        await read(answer)
        receipt = world.receipt(answer)
        assert (receipt.timing.queue_ns, receipt.timing.ttft_ns) == (0, NS_PER_S // 2)
        assert receipt.timing.tpot_ns == NS_PER_S // 2
        assert receipt.timing.total_ns == 3 * NS_PER_S
        assert receipt.settled_at_ns is not None
        assert receipt.settled_at_ns >= max(receipt.created_at_ns, *(line.posted_at_ns for line in receipt.lines))
        assert receipt.attempts[0].ended_at_ns == receipt.settled_at_ns

    run(story)


def test_more_than_the_limit_at_once_is_told_to_come_back() -> None:
    async def story() -> None:
        world = World(FakeAnswer(LETTERS), max_concurrent=2)
        running = [await world.ask() for _ in range(2)]
        with pytest.raises(RateLimited) as caught:
            await world.ask()
        assert caught.value.retry_after_s == 1
        for answer in running:
            await read(answer)
        await read(await world.ask())

    run(story)


def test_a_cancellation_before_the_work_began_still_reaches_it() -> None:
    async def story() -> None:
        world = World(FakeAnswer(LETTERS))
        answer = await world.ask()
        answer.cancel()
        await read(answer)
        receipt = world.receipt(answer)
        assert receipt.status is Status.CANCELLED
        assert receipt.usage.output_tokens == 0

    run(story)


def test_a_cancelled_answer_is_charged_for_what_it_used() -> None:
    async def story() -> None:
        world = World(FakeAnswer(LETTERS, delay_s=1))
        answer = await world.ask()
        assert await taken(answer) == "a"
        answer.cancel()
        await read(answer)
        receipt = world.receipt(answer)
        assert receipt.status is Status.CANCELLED
        assert receipt.usage.output_tokens is not None
        assert 1 <= receipt.usage.output_tokens < 6
        assert receipt.accelerator.serving_ns == receipt.usage.output_tokens * NS_PER_S

    run(story)


@pytest.mark.parametrize(
    ("error", "status"),
    [(EngineCrashed("the engine ended; retry"), Status.INTERRUPTED), (MillicentError("broken"), Status.FAILED)],
)
def test_an_error_reaches_the_reader_after_the_text_and_is_on_the_receipt(
    error: MillicentError, status: Status
) -> None:
    async def story() -> None:
        world = World(FakeAnswer(LETTERS[:2], finish=FinishReason.ERROR, error=error))
        answer = await world.ask()
        assert await taken(answer) == "a"
        assert await taken(answer) == "b"
        with pytest.raises(type(error)) as caught:
            await answer.take()
        assert caught.value is error
        receipt = world.receipt(answer)
        assert (receipt.status, receipt.error) == (status, error.message)
        assert receipt.usage.output_tokens == 2

    run(story)


def test_a_fault_of_ours_is_a_failed_receipt_that_tells_no_secrets(caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        def step(self, record: StepRecord) -> None:
            raise ZeroDivisionError("secret detail")

    async def story() -> None:
        world = World(FakeAnswer(LETTERS, delay_s=1))
        world.backend.observer = cast("Observer", Broken())
        answer = await world.ask()
        with pytest.raises(MillicentError) as caught:
            await read(answer)
        assert "secret" not in caught.value.message
        assert world.receipt(answer).status is Status.FAILED
        assert "secret detail" in caplog.text

    run(story)


@pytest.mark.parametrize(
    ("model", "refusal", "kind"),
    [
        ("fakr", None, ModelNotFound),
        ("fake", InvalidRequest("too long"), InvalidRequest),
        ("fake", Unavailable("down"), Unavailable),
    ],
)
def test_a_refusal_leaves_no_receipt_and_takes_no_place(model: str, refusal: Any, kind: type[MillicentError]) -> None:
    async def story() -> None:
        world = World(FakeAnswer(refusal=refusal), max_concurrent=1)
        for _ in range(3):
            with pytest.raises(kind):
                await world.ask(model)
        assert world.ledger.queries.count_open() == 0

    run(story)


def test_an_unknown_model_is_answered_with_a_suggestion() -> None:
    async def story() -> None:
        with pytest.raises(ModelNotFound, match="did you mean `fake`"):
            await World(FakeAnswer()).ask("fakr")

    run(story)


def test_draining_takes_nothing_new_and_settles_what_runs() -> None:
    async def story() -> None:
        world = World(FakeAnswer(LETTERS))
        held = asyncio.Event()

        async def stuck(_: float) -> None:
            await held.wait()

        world.backend.sleep = stuck
        answer = await world.ask()
        draining = asyncio.create_task(world.pipeline.drain(grace_s=0))
        await asyncio.sleep(0)
        with pytest.raises(Unavailable):
            await world.ask()
        held.set()
        await draining
        assert world.receipt(answer).status in {Status.CANCELLED, Status.SUCCEEDED}
        await world.pipeline.close()
        assert world.ledger.queries.count_open() == 0

    run(story)


def test_waiting_text_is_merged_for_a_slow_reader() -> None:
    async def story() -> None:
        world = World(FakeAnswer(LETTERS))
        answer = await world.ask()
        await world.pipeline.drain(grace_s=60)
        assert await taken(answer) == "abcdef"
        assert await answer.take() is None

    run(story)


def test_a_wait_that_was_given_up_loses_nothing() -> None:
    async def story() -> None:
        world = World(FakeAnswer(LETTERS))
        world.ledger.gate.clear()
        answer = await world.ask()
        text = ""
        for _ in range(3):
            try:
                async with asyncio.timeout(0.01):
                    while (piece := await answer.take()) is not None:
                        text += "".join(part.text for part in piece)
            except TimeoutError:
                continue
        world.ledger.gate.set()
        assert text + await read(answer) == "abcdef"

    run(story)


def test_accounts_and_receipts_agree_after_many_answers() -> None:
    async def story() -> None:
        world = World(FakeAnswer(LETTERS, delay_s=700))  # 6 steps of 700 s each: hours are crossed
        await asyncio.gather(*[read(await world.ask()) for _ in range(5)])
        await world.pipeline.checkpoint()
        accounts = world.ledger.queries.accounts(0, world.clock.now_ns() + 1)
        receipts = world.ledger.queries.receipts(ReceiptFilter(), limit=10).receipts
        assert len(accounts) > 3
        for hour in accounts:
            spent = hour.serving_ns + hour.overhead_ns + hour.lost_ns + hour.idle_ns + hour.down_ns
            assert spent == hour.wall_ns * hour.accelerators
        assert sum(hour.serving_ns for hour in accounts) == sum(one.accelerator.serving_ns for one in receipts)
        assert sum(one.accelerator.serving_ns for one in receipts) == 5 * 6 * 700 * NS_PER_S

    run(story)


def test_a_checkpoint_that_fails_is_followed_by_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("millicent.pipeline.pipeline.CHECKPOINT_INTERVAL_S", 0.0)

    async def story() -> None:
        world = World(FakeAnswer(LETTERS))
        calls = 0
        followed = asyncio.Event()

        async def checkpoint(checkpoint: object) -> None:
            nonlocal calls
            calls += 1
            if calls == 2:
                raise OverflowError("too large for SQLite")
            if calls == 3:
                followed.set()

        monkeypatch.setattr(world.ledger, "checkpoint", checkpoint)
        await world.pipeline.start()
        await asyncio.wait_for(followed.wait(), 60)
        await world.pipeline.close()

    asyncio.run(story())


def test_the_ledger_is_maintained_every_tenth_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("millicent.pipeline.pipeline.CHECKPOINT_INTERVAL_S", 0.0)

    async def story() -> None:
        world = World(FakeAnswer(LETTERS))
        calls: list[str] = []
        maintained = asyncio.Event()

        async def checkpoint(checkpoint: object) -> None:
            calls.append("checkpoint")

        async def maintain() -> None:
            calls.append("maintain")
            maintained.set()

        monkeypatch.setattr(world.ledger, "checkpoint", checkpoint)
        monkeypatch.setattr(world.ledger, "maintain", maintain)
        await world.pipeline.start()
        await maintained.wait()
        # The one at the start, then ten.
        assert calls == ["checkpoint"] * 11 + ["maintain"]
        await world.pipeline.close()

    run(story)
