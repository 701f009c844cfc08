"""Where tokens have prices, a maximum cost is turned into a limit on the output before anything runs."""

from __future__ import annotations

import asyncio
from decimal import Decimal

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from millicent.backends.fake import FakeAnswer
from millicent.core.budgets import Budget, Every
from millicent.core.chunks import Text
from millicent.core.errors import PaymentRequired
from millicent.core.money import Money
from millicent.core.protocols import Call, Run
from millicent.core.request import Embedding, ImagePart, Limits, Message, Request, TextPart, Tool
from millicent.core.usage import Provenance
from millicent.ledger.budgets import put_budget
from millicent.meter.placements import PlacementConfig
from millicent.meter.prices import PriceBook, PriceConfig
from millicent.meter.quotes import Quoter
from millicent.pipeline.estimates import Estimates, Plan
from support.cached_world import World, read

PROVIDER = msgspec.convert({"kind": "api"}, PlacementConfig).placement("provider")
# One millicent for each token read, four for each written.
PRICES = PriceConfig(input=Decimal(10), output=Decimal(40))


class Provider:
    """Counts no input; each choice is as long as it may be."""

    name = "provider"

    def __init__(self, input_tokens: int | None = None) -> None:
        self._input_tokens = input_tokens

    def models(self) -> tuple[str, ...]:
        return ("m",)

    async def prepare(self, request: Request) -> Call:
        return _Call(request, self._input_tokens)


class _Call:
    sequences: tuple[int, ...] = ()
    placement, served_model = "provider", "m"

    def __init__(self, request: Request, input_tokens: int | None) -> None:
        most = request.limits.max_tokens
        self.input_tokens = input_tokens
        self.max_output_tokens = 0 if request.embedding else None if most is None else most * request.choices

    def start(self) -> Run:
        raise AssertionError("nothing runs here")


def asked(maximum: str | None = None, **fields: object) -> Request:
    given = {"messages": (Message("user", "hi"),)} | fields
    cost = None if maximum is None else Money.from_usd(maximum)
    return Request(id="rcpt_1", dialect="test", model="m", max_cost=cost, **given)  # type: ignore[arg-type]


def plan(request: Request, provider: Provider | None = None) -> Plan:
    backend = provider or Provider()

    async def story() -> Plan:
        estimates = Estimates(Quoter(lambda *_: None), PriceBook({"m": PRICES}))
        call = await backend.prepare(request)
        return await estimates.within(request, backend, call, estimates.asked(request, call, PROVIDER, 1, 0))

    return asyncio.run(story())


@given(st.integers(1, 9), st.one_of(st.none(), st.integers(1, 5000)), st.integers(0, 10**8), st.integers(1, 500))
def test_all_choices_together_keep_within_the_maximum(
    choices: int, limit: int | None, maximum_nanousd: int, read: int
) -> None:
    request = msgspec.structs.replace(
        asked(choices=choices, limits=Limits(max_tokens=limit)), max_cost=Money(maximum_nanousd)
    )
    try:
        found = plan(request, Provider(read))
    except PaymentRequired:
        assert read * 10_000 + choices * 40_000 > maximum_nanousd
        return
    written = found.call.max_output_tokens
    assert written is not None
    assert choices <= written <= choices * (limit or written)
    assert read * 10_000 + written * 40_000 <= maximum_nanousd
    # And no token less than that: one more for each choice would be too many.
    if written != choices * (limit or 0):
        assert read * 10_000 + (written + choices) * 40_000 > maximum_nanousd


def test_input_that_nobody_counted_may_be_twice_the_guess() -> None:
    found = plan(asked("0.01", limits=Limits(max_tokens=1000)))
    guess = found.asked.input_tokens
    assert found.call.max_output_tokens == (10**7 - 2 * guess * 10_000) // 40_000
    quote = plan(asked(limits=Limits(max_tokens=10))).quote
    assert quote.cost is not None
    assert quote.cost.high == Money(2 * guess * 10_000 + 10 * 40_000)
    assert quote.cost.low == Money(guess // 2 * 10_000 + quote.output_tokens.low * 40_000)


def test_what_the_longest_answer_costs_is_known_where_the_output_is_limited() -> None:
    limited = plan(asked(limits=Limits(max_tokens=10)))
    assert limited.most == limited.hold
    assert plan(asked()).most is None


def test_a_budget_that_just_covers_an_answer_cuts_none_of_it() -> None:
    async def story() -> None:
        world = World(FakeAnswer(tuple(Text("x", 1) for _ in range(40)), provenance=Provenance.REPORTED))
        request = world.request(limits=Limits(max_tokens=40))
        quote = (await world.pipeline.quotes(request, ("fake",)))[0]
        assert quote.cost is not None
        budget = Budget(name="all", limit=quote.cost.high, every=Every.ONCE)
        await world.ledger.write(lambda connection: put_budget(connection, budget))
        answer = await world.pipeline.admit(request)
        assert "".join(text.text for text in await read(answer)) == "x" * 40
        assert world.receipt(answer).finish_reason == "stop"

    asyncio.run(asyncio.wait_for(story(), 60))


def test_input_that_nobody_counts_counts_while_the_answer_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    async def story() -> None:
        pieces = tuple(Text("x", 1) for _ in range(700))
        world = World(FakeAnswer(pieces, input_tokens=10_004, context_tokens=20_000, provenance=Provenance.REPORTED))
        counted = world.backend.prepare

        async def uncounted(request: Request) -> Call:
            call = await counted(request)
            call.input_tokens = None
            return call

        monkeypatch.setattr(world.backend, "prepare", uncounted)
        # $0.10 of input, and a hundred millicents for each token of output.
        budget = Budget(name="all", limit=Money.from_usd("0.15"), every=Every.ONCE)
        await world.ledger.write(lambda connection: put_budget(connection, budget))
        monkeypatch.setattr(world.pipeline._books, "_hold", lambda _: Money.from_usd("0.15"))
        answer = await world.pipeline.admit(world.request("four" * 10_000))
        await read(answer)
        receipt = world.receipt(answer)
        assert (receipt.finish_reason, receipt.usage.input_tokens) == ("length", 10_004)
        assert receipt.total is not None
        assert Money.from_usd("0.14") < receipt.total <= budget.limit

    asyncio.run(asyncio.wait_for(story(), 60))


def test_the_texts_of_embeddings_are_held_for_and_kept_within_a_maximum() -> None:
    texts = asked(messages=None, embedding=Embedding(("word " * 4000, tuple(range(3000)))))
    found = plan(texts)
    assert found.asked.input_tokens == 5000 + 3000
    assert found.hold == Money(2 * 8000 * 10_000)
    assert plan(msgspec.structs.replace(texts, max_cost=Money(2 * 8000 * 10_000))).call.max_output_tokens == 0
    with pytest.raises(PaymentRequired, match="doesn't pay"):
        plan(msgspec.structs.replace(texts, max_cost=Money(2 * 8000 * 10_000 - 1)))


@pytest.mark.parametrize(
    ("message", "tools", "tokens"),
    [
        (Message("user", "four" * 10), (), 10 + 4),
        (Message("user", "\u8a9e" * 40), (), 30 + 4),
        (Message("user", "\ud800"), (), 1 + 4),
        (Message("user", (TextPart("four"), ImagePart(url="https://a/b.png"))), (), 1 + 1024 + 4),
        (Message("user", "four"), (Tool("name", "what", "{}" * 20),), (4 + 4 + 40 + 4) // 4 + 4),
    ],
)
def test_what_a_model_would_read_is_guessed_from_its_bytes(
    message: Message, tools: tuple[Tool, ...], tokens: int
) -> None:
    assert plan(asked(messages=(message,), tools=tools)).asked.input_tokens == tokens
