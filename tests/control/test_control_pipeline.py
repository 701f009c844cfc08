"""Holds, rates and claims along the pipeline, with a fake backend whose time and price are known."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import pytest

from millicent.backends.fake import FakeAnswer, FakeBackend
from millicent.control.config import Rates
from millicent.control.idempotency import Idempotency, claim_of
from millicent.control.limits import RateLimiter
from millicent.core.budgets import Balance, Budget, Every
from millicent.core.chunks import Text
from millicent.core.clock import NS_PER_S, ManualClock
from millicent.core.errors import Conflict, EngineCrashed, InvalidRequest, PaymentRequired, RateLimited
from millicent.core.idempotency import KEPT_NS, Claim
from millicent.core.identifiers import SequentialIds
from millicent.core.money import Money
from millicent.core.receipts import Receipt, Status
from millicent.core.request import Attribution, Limits, Request
from millicent.core.steps import DeviceState
from millicent.core.usage import Provenance
from millicent.ledger.budgets import put_budget, read_balances
from millicent.ledger.claims import purge_answers
from millicent.ledger.memory import MemoryLedger
from millicent.ledger.queries import ReceiptFilter
from millicent.meter.meter import Meter
from millicent.meter.placements import Placement
from millicent.pipeline.answer import Answer, KeptAnswer
from millicent.pipeline.config import LimitsConfig
from millicent.pipeline.holds import HoldOf, HoldWatch, quoted_hold
from millicent.pipeline.pipeline import Pipeline

# A dollar a second: a chunk takes a second, so each costs a dollar.
PLACEMENT = Placement("fake", 1, Decimal(3600), Provenance.MEASURED)
TEN = FakeAnswer(chunks=tuple(Text(f"{number} ", 1) for number in range(10)), delay_s=1.0)


@dataclass
class World:
    pipeline: Pipeline
    ledger: MemoryLedger
    clock: ManualClock
    backend: FakeBackend
    budget: Budget | None
    numbers: int = 0

    def request(self, **changes: Any) -> Request:
        self.numbers += 1
        return Request(id=f"rcpt_{self.numbers}", dialect="test", model="fake", prompt="x", **changes)

    async def settle(self, request: Request, claim: Claim | None = None) -> tuple[Receipt, str]:
        answer = await self.pipeline.admit(request, claim)
        text = await read(answer)
        assert answer.settled is not None
        return answer.settled, text

    async def balance(self) -> Balance:
        budget = self.budget
        assert budget is not None
        [found] = await self.ledger.write(lambda connection: read_balances(connection, budget, self.clock.now_ns()))
        return found


async def read(answer: Answer) -> str:
    text = ""
    while (piece := await answer.take()) is not None:
        text += "".join(part.text for part in piece)
    return text


@asynccontextmanager
async def world(
    answer: FakeAnswer | Callable[[Request], FakeAnswer] = TEN,
    *,
    limit_usd: int | None = None,
    hold: HoldOf = quoted_hold,
    rates: Rates | None = None,
) -> AsyncIterator[World]:
    clock, ids = ManualClock(), SequentialIds()
    meter = Meter(clock, "gw", ids)
    meter.add_device("fake", PLACEMENT)
    meter.device_state("fake", DeviceState.UP, clock.monotonic_ns())

    async def sleep(delay_s: float) -> None:
        await asyncio.sleep(0)
        clock.advance(round(delay_s * NS_PER_S))

    backend = FakeBackend(answer, observer=meter, clock=clock, sleep=sleep)
    ledger = MemoryLedger("gw")
    limits = LimitsConfig()
    pipeline = Pipeline(
        backends=[backend],
        ledger=ledger,
        meter=meter,
        placements={"fake": PLACEMENT},
        clock=clock,
        limits=limits,
        limiter=RateLimiter(clock, lambda _: rates or limits),
        hold=hold,
    )
    budget = None
    if limit_usd is not None:
        budget = Budget(name="b", limit=Money.from_usd(limit_usd), every=Every.ONCE)
        made = budget
        await ledger.write(lambda connection: put_budget(connection, made))
    await pipeline.start()
    try:
        yield World(pipeline, ledger, clock, backend, budget)
    finally:
        await pipeline.drain(10)
        await pipeline.close()
        assert ledger.queries.verify() == []


def dollars(amount: int) -> HoldOf:
    return lambda _plan: Money.from_usd(amount)


def run(scenario: Callable[[], Any]) -> None:
    asyncio.run(scenario())


def test_what_an_answer_cost_is_booked_when_it_closes_and_its_hold_is_given_back() -> None:
    async def scenario() -> None:
        async with world(limit_usd=100, hold=dollars(30)) as here:
            receipt, _ = await here.settle(here.request())
            found = await here.balance()
            assert receipt.total == found.spent == Money.from_usd(10)
            assert found.held == Money(0)

    run(scenario)


def test_a_hold_that_turns_out_too_small_grows_while_the_budget_has_room() -> None:
    async def scenario() -> None:
        async with world(limit_usd=100, hold=dollars(3)) as here:
            receipt, text = await here.settle(here.request())
            assert text == "0 1 2 3 4 5 6 7 8 9 "
            assert receipt.finish_reason == "stop"
            assert receipt.hold is not None
            assert receipt.hold >= Money.from_usd(10)
            assert (await here.balance()).spent == Money.from_usd(10)

    run(scenario)


def test_output_stops_with_length_where_the_budget_has_no_more() -> None:
    async def scenario() -> None:
        async with world(limit_usd=6, hold=dollars(6)) as here:
            receipt, text = await here.settle(here.request())
            assert receipt.finish_reason == "length"
            assert receipt.status is Status.SUCCEEDED
            assert text == "0 1 2 3 4 "
            found = await here.balance()
            assert found.spent == receipt.total == Money.from_usd(5)
            assert found.held == Money(0)

    run(scenario)


def test_64_calls_at_once_with_holds_that_are_too_small_never_overspend() -> None:
    async def scenario() -> None:
        async with world(limit_usd=40, hold=dollars(4)) as here:
            results = await asyncio.gather(*(here.settle(here.request()) for _ in range(64)), return_exceptions=True)
            served = [result[0] for result in results if isinstance(result, tuple)]
            assert all(isinstance(result, tuple | PaymentRequired) for result in results)
            assert 0 < len(served) < 64
            found = await here.balance()
            assert found.spent == Money.total(receipt.total for receipt in served if receipt.total is not None)
            assert found.spent <= Money.from_usd(40)
            assert found.held == Money(0)

    run(scenario)


@pytest.mark.parametrize("error", [EngineCrashed("gone"), InvalidRequest("no")])
def test_an_answer_that_fails_gives_its_hold_back_and_is_booked_for_what_it_used(error: Any) -> None:
    async def scenario() -> None:
        failing = FakeAnswer(chunks=TEN.chunks[:3], delay_s=1.0, error=error)
        async with world(failing, limit_usd=100, hold=dollars(30)) as here:
            with pytest.raises(type(error)):
                await here.settle(here.request())
            found = await here.balance()
            assert (found.spent, found.held) == (Money.from_usd(3), Money(0))

    run(scenario)


def test_a_call_without_an_upper_bound_is_refused_by_a_hard_budget_before_it_runs() -> None:
    async def scenario() -> None:
        async with world(limit_usd=100, hold=lambda _plan: None) as here:
            with pytest.raises(PaymentRequired, match="nobody can say"):
                await here.settle(here.request())
            assert here.backend.running == 0
            assert here.ledger.queries.count_open() == 0

    run(scenario)


def test_a_watch_warns_before_the_dearest_step_could_pass_the_hold() -> None:
    watch = HoldWatch(Money(100))
    assert not watch.is_near(Money(50))  # the prompt, however dear
    assert not watch.is_near(Money(60))
    assert not watch.is_near(Money(70))
    assert watch.is_near(Money(71))


def test_a_watch_lets_an_answer_go_on_to_a_hold_that_is_enough_for_the_longest() -> None:
    watch = HoldWatch(Money(100), enough=True)
    assert not any(watch.is_near(Money(cost)) for cost in (10, 90, 100))
    assert watch.is_near(Money(101))


def test_rates_are_reserved_from_the_call_and_settled_from_the_usage() -> None:
    async def scenario() -> None:
        async with world(rates=Rates(tokens_per_minute=1000)) as here:
            await here.settle(here.request(limits=Limits(max_tokens=900)))
            await here.settle(here.request(limits=Limits(max_tokens=900)))  # 30 used of 905 reserved
            first = await here.pipeline.admit(here.request(limits=Limits(max_tokens=900)))
            with pytest.raises(RateLimited) as caught:
                await here.pipeline.admit(here.request(limits=Limits(max_tokens=900)))
            assert caught.value.retry_after_s is not None
            await read(first)

    run(scenario)


def claimed(here: World, request: Request, key: str = "k", owner: str | None = None) -> Claim:
    return claim_of(key, owner, request, None)


def test_an_answer_is_kept_with_its_receipt_and_found_again() -> None:
    async def scenario() -> None:
        async with world() as here:
            keeper = Idempotency(here.ledger.queries, here.clock)
            request = here.request()
            claim = claimed(here, request)
            assert await keeper.earlier(claim) is None
            receipt, text = await here.settle(request, claim)
            found = await keeper.earlier(claimed(here, here.request()))
            assert found is not None
            kept = KeptAnswer.read(found.answer or "")
            assert (found.receipt, "".join(part.text for part in kept.texts)) == (receipt.id, text)
            assert await keeper.earlier(claimed(here, here.request(), owner="mk_other")) is None
            with pytest.raises(Conflict):
                await keeper.earlier(claimed(here, here.request(limits=Limits(max_tokens=3))))
            here.clock.advance(KEPT_NS)
            assert await keeper.earlier(claim) is None
            await here.pipeline.checkpoint()
            assert await here.ledger.write(_claims) == 0

    run(scenario)


def test_a_second_request_waits_for_the_first_and_gets_its_answer() -> None:
    async def scenario() -> None:
        async with world() as here:
            keeper = Idempotency(here.ledger.queries, here.clock)
            request = here.request()
            answer = await here.pipeline.admit(request, claimed(here, request))
            second = here.request()
            with pytest.raises(Conflict) as caught:
                await here.pipeline.admit(second, claimed(here, second))
            assert caught.value.code == "idempotency_race"
            found = await keeper.earlier(claimed(here, second))
            assert found is not None
            assert found.receipt == answer.receipt_id
            assert len(here.ledger.queries.receipts(ReceiptFilter()).receipts) == 1

    run(scenario)


@pytest.mark.parametrize("how", ["failed", "cancelled", "refused"])
def test_what_did_not_end_well_leaves_the_key_free(how: str) -> None:
    async def scenario() -> None:
        error = EngineCrashed("gone") if how == "failed" else None
        refusal = InvalidRequest("no") if how == "refused" else None
        async with world(FakeAnswer(delay_s=1.0, error=error, refusal=refusal)) as here:
            keeper = Idempotency(here.ledger.queries, here.clock)
            request = here.request()
            claim = claimed(here, request)
            ended: Exception | None = None
            try:
                answer = await here.pipeline.admit(request, claim)
                if how == "cancelled":
                    answer.cancel()
                await read(answer)
            except (InvalidRequest, EngineCrashed) as error:
                ended = error
            assert isinstance(ended, {"failed": EngineCrashed, "refused": InvalidRequest}.get(how, type(None)))
            assert await keeper.earlier(claim) is None
            assert await here.ledger.write(_claims) == 0

    run(scenario)


def test_kept_answers_can_be_purged_by_user() -> None:
    async def scenario() -> None:
        async with world() as here:
            for user in ("ada", "bob"):
                request = here.request(attribution=Attribution(user=user))
                await here.settle(request, claimed(here, request, key=user))
            assert await here.ledger.write(lambda connection: purge_answers(connection, user="ada")) == 1
            assert await here.ledger.write(_claims) == 1
            assert await here.ledger.write(purge_answers) == 1

    run(scenario)


def test_requests_without_the_header_leave_no_text_behind() -> None:
    async def scenario() -> None:
        async with world() as here:
            await here.settle(here.request())
            assert await here.ledger.write(_claims) == 0

    run(scenario)


@pytest.mark.parametrize("key", ["", "x" * 256, "a\nb"])
def test_a_key_that_cannot_be_one_is_refused_by_name(key: str) -> None:
    request = Request(id="rcpt_1", dialect="test", model="fake", prompt="x")
    with pytest.raises(InvalidRequest, match="Idempotency-Key"):
        claim_of(key, None, request, None)


def _claims(connection: Any) -> int:
    (count,) = connection.execute("SELECT count(*) FROM claims").fetchone()
    return int(count)
