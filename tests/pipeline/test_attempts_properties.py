"""Whatever fails, whenever, for how many at once: what must hold of every answer, receipt, budget and breaker."""

from __future__ import annotations

import asyncio
import itertools
import re
from collections import Counter

import msgspec
from hypothesis import event, given, settings
from hypothesis import strategies as st

from millicent.backends.fake import FakeAnswer
from millicent.core.chunks import Text
from millicent.core.errors import InvalidRequest, MillicentError, RateLimited, Unavailable, UpstreamError
from millicent.core.money import Money
from millicent.core.receipts import Receipt, Role, Status
from millicent.core.request import Request
from millicent.core.usage import Count, Leaf, Provenance, Usage
from millicent.ledger.queries import ReceiptFilter
from millicent.pipeline.answer import Answer
from millicent.pipeline.config import BreakerConfig, ModelPolicy
from support.places import World, read
from support.virtual_time import run

_NOTHING = Usage()
_READ = Usage.of(Provenance.REPORTED, input_fresh=100)
_UNKNOWN = Usage({Leaf.INPUT_FRESH: Count(None, Provenance.UNKNOWN)})


class Outcome(msgspec.Struct, frozen=True):
    """How one call goes: so many pieces, each after `delay_s`, then `error`, or a good end."""

    pieces: int
    delay_s: float
    error: MillicentError | None
    usage: Usage | None
    refused: bool = False

    def answer(self, label: str) -> FakeAnswer:
        texts = tuple(Text(f"<{label}:{i}>", 1) for i in range(self.pieces))
        if self.refused:
            return FakeAnswer(refusal=self.error or Unavailable("not now"))
        return FakeAnswer(texts, delay_s=self.delay_s, error=self.error, usage=self.usage, input_tokens=100)


errors = st.one_of(
    st.just(UpstreamError("down")),
    st.just(UpstreamError("unknown key", retryable=False)),
    st.just(InvalidRequest("wrong")),
    st.just(MillicentError("a bug")),
    st.integers(0, 60).map(lambda seconds: RateLimited("slowly", retry_after_s=seconds)),
    st.integers(0, 60).map(lambda seconds: Unavailable("not now", retry_after_s=seconds)),
)
good = st.builds(Outcome, st.integers(1, 6), st.sampled_from([0.0, 0.3, 5.0]), st.none(), st.none())
failing = st.builds(
    Outcome,
    st.sampled_from([0, 0, 0, 1, 3]),
    st.sampled_from([0.0, 0.3, 5.0, 1000.0]),
    errors,
    st.sampled_from([None, _NOTHING, _READ, _UNKNOWN]),
    st.sampled_from([False, False, False, True]),
)
outcomes = st.lists(st.one_of(good, failing, failing), min_size=1, max_size=8)


class InTurn:
    """A backend's calls as they were drawn, over and over. Each call's text is told from every other's."""

    def __init__(self, name: str, drawn: list[Outcome]) -> None:
        self._name = name
        self._drawn = drawn
        self._count = 0

    def __call__(self, request: Request) -> FakeAnswer:
        del request
        self._count += 1
        return self._drawn[self._count % len(self._drawn)].answer(f"{self._name}{self._count}")


policies = st.builds(
    ModelPolicy,
    balance=st.sampled_from(["weighted", "least_busy", "cheapest"]),
    retries=st.integers(0, 4),
    fallbacks=st.sampled_from([(), ("spare",)]),
    timeout_s=st.sampled_from([None, 20.0, 90.0]),
    first_token_timeout_s=st.sampled_from([None, 4.0]),
    between_tokens_timeout_s=st.sampled_from([None, 2.0]),
    breaker=st.builds(BreakerConfig, failures=st.integers(1, 4), cooldown_s=st.just(10.0)),
)


class Asked:
    """One client: what it got. `ends` counts how often it was told that this was the end."""

    def __init__(self, answer: Answer, text: str, error: MillicentError | None) -> None:
        self.answer = answer
        self.text = text
        self.error = error


async def client(world: World, starts_s: float, leaves_s: float | None, maximum: Money | None) -> Asked | None:
    await asyncio.sleep(starts_s)
    try:
        answer = await world.pipeline.admit(world.request(max_cost=maximum))
    except MillicentError:  # refused: there is no receipt, which is looked at in the end
        return None
    if leaves_s is not None:
        asyncio.get_running_loop().call_later(leaves_s, answer.cancel)
    text, error = await read(answer)
    # Asking again says the same again: there is one end.
    assert await read(answer) == ("", error)
    return Asked(answer, text, error)


def check_delivered(asked: Asked, receipt: Receipt) -> None:
    """One call's text, from its beginning, and nothing after it."""
    pieces = re.findall(r"<(\w+?)(\d+):(\d+)>", asked.text)
    assert "".join(f"<{name}{call}:{i}>" for name, call, i in pieces) == asked.text
    assert [int(i) for _, _, i in pieces] == list(range(len(pieces)))
    assert len({(name, call) for name, call, _ in pieces}) <= 1
    if pieces:
        assert receipt.attempts[-1].backend == pieces[0][0]


def check_attempts(receipt: Receipt, policy: ModelPolicy) -> None:
    assert [each.ordinal for each in receipt.attempts] == list(range(1, len(receipt.attempts) + 1))
    roles = Counter(each.role for each in receipt.attempts)
    assert roles[Role.RETRY] <= policy.retries
    assert roles[Role.FALLBACK] <= len(policy.fallbacks)
    assert len(receipt.attempts) <= 1 + policy.retries + len(policy.fallbacks)
    assert all(each.status is Status.FAILED for each in receipt.attempts[:-1])
    last = receipt.attempts[-1]
    assert (receipt.backend, receipt.placement) == (last.backend, last.placement)
    for earlier, later in itertools.pairwise(receipt.attempts):
        assert earlier.ended_at_ns is not None
        assert earlier.ended_at_ns <= later.started_at_ns


def check_costs(receipt: Receipt) -> None:
    """Every attempt has its lines, in its role; they are the total, unless somebody doesn't know."""
    role = {each.ordinal: each.role for each in receipt.attempts}
    assert {line.attempt for line in receipt.lines} == set(role)
    assert all(line.role is role[line.attempt] for line in receipt.lines)
    amounts = [line.amount for line in receipt.lines]
    if None in amounts:
        assert receipt.total is None
    else:
        assert receipt.total == Money.total(amount for amount in amounts if amount is not None)


@settings(max_examples=150)
@given(
    one=outcomes,
    two=outcomes,
    spare=outcomes,
    policy=policies,
    clients=st.lists(
        st.tuples(
            st.sampled_from([0.0, 0.0, 1.0, 30.0]),
            st.sampled_from([None, None, 0.0, 0.4, 3.0, 40.0]),
            st.sampled_from([None, None, Money.from_usd("0.0015"), Money.from_usd("0.01")]),
        ),
        min_size=1,
        max_size=8,
    ),
    limit=st.sampled_from([None, "0.002", "0.02"]),
    seed=st.integers(0, 3),
)
def test_whatever_fails_every_promise_holds(
    one: list[Outcome],
    two: list[Outcome],
    spare: list[Outcome],
    policy: ModelPolicy,
    clients: list[tuple[float, float | None, Money | None]],
    limit: str | None,
    seed: int,
) -> None:
    async def story() -> None:
        world = World(InTurn("one", one), InTurn("two", two), InTurn("here", spare), policy=policy, seed=seed)
        if limit is not None:
            await world.limit(limit)
        found = await asyncio.gather(*(client(world, *each) for each in clients))
        answered = [asked for asked in found if asked is not None]
        for asked in answered:
            receipt = world.receipt(asked.answer)
            assert receipt == asked.answer.settled
            assert (receipt.error is None) == (asked.error is None)
            check_delivered(asked, receipt)
            check_attempts(receipt, policy)
            check_costs(receipt)
            event(f"attempts: {len(receipt.attempts)}")
        for each, (_, _, maximum) in zip(found, clients, strict=True):
            total = None if each is None else world.receipt(each.answer).total
            if maximum is not None and total is not None:
                assert total <= maximum
        if limit is not None:
            balance = await world.balance()
            assert balance.held == Money(0)
            assert balance.spent <= Money.from_usd(limit)
        receipts = world.ledger.queries.receipts(ReceiptFilter(), limit=100).receipts
        assert len(receipts) == len(answered)
        await world.close()
        accounts = world.ledger.queries.accounts(0, world.clock.now_ns() + 1)
        assert sum(hour.serving_ns for hour in accounts) == sum(one.accelerator.serving_ns for one in receipts)

    run(story)


def test_sixty_four_at_once_with_retries_and_fallbacks_never_overspend_a_nearly_empty_budget() -> None:
    read_only = Outcome(0, 0.3, UpstreamError("failed after reading"), _READ)
    fine = Outcome(6, 0.1, None, None)

    async def story() -> None:
        policy = ModelPolicy(retries=2, fallbacks=("spare",), breaker=BreakerConfig(failures=1000, window_calls=1000))
        world = World(
            InTurn("one", [read_only]),
            InTurn("two", [read_only, read_only, fine]),
            InTurn("here", [fine]),
            policy=policy,
        )
        await world.limit("0.03")
        found = await asyncio.gather(*(client(world, 0, None, None) for _ in range(64)))
        balance = await world.balance()
        receipts = [world.receipt(asked.answer) for asked in found if asked is not None]
        assert 0 < len(receipts) < 64
        assert any(len(receipt.attempts) > 1 for receipt in receipts)
        totals = [receipt.total for receipt in receipts if receipt.total is not None]
        assert len(totals) == len(receipts)
        assert balance.spent == Money.total(totals)
        assert balance.spent <= Money.from_usd("0.03")
        assert balance.held == Money(0)
        await world.close()

    run(story)
