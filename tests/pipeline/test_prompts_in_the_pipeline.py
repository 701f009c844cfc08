"""What was asked is on the receipt, without its words; and where it was asked matters to what comes next."""

from __future__ import annotations

import json
from decimal import Decimal
from typing import Any

from millicent.backends.fake import FakeAnswer
from millicent.caching.segments import prompt_of
from millicent.core.chunks import Text
from millicent.core.errors import UpstreamError
from millicent.core.money import Money
from millicent.core.receipts import Receipt
from millicent.core.request import Attribution, Message, Request, TextPart
from millicent.core.usage import Provenance, Usage
from millicent.ledger.queries import ReceiptFilter
from millicent.meter.prices import PriceConfig
from millicent.pipeline.config import ModelPolicy
from millicent.pipeline.holdout import HoldoutConfig
from millicent.wire.anthropic_upstream import encode
from support.fake_anthropic import PromptCache
from support.places import SECRET, World, letters, read
from support.virtual_time import run

SYSTEM = Message("system", "Answer briefly.")


def test_every_receipt_says_what_was_asked_without_its_words() -> None:
    async def story() -> None:
        world = World(letters(3))
        first = await world.pipeline.admit(world.request(messages=(SYSTEM, Message("user", "Hello"))))
        while await first.take() is not None:
            pass
        await world.ask(messages=(SYSTEM, Message("user", "Goodbye")))
        one, two = (each.receipt.prompt for each in world.ledger.queries.asked(ReceiptFilter()).asked)
        assert one is not None
        assert two is not None
        wanted = prompt_of(world.request(messages=(SYSTEM, Message("user", "Hello"))), SECRET)
        assert one == wanted
        assert [each.kind for each in one.segments] == ["system", "user"]
        assert (one.segments[0] == two.segments[0], one.segments[1].chain == two.segments[1].chain) == (True, False)
        await world.close()

    run(story)


LONG = Message("system", "x" * 20_000)
TWO = letters(1, delay_s=0.0)


def turns(name: str, count: int) -> tuple[Message, ...]:
    said = [Message("user" if i % 2 == 0 else "assistant", f"{name} {i}") for i in range(2 * count - 1)]
    return (LONG, *said)


async def talk(world: World, name: str, count: int) -> list[str | None]:
    """Where each turn of a conversation was answered."""
    return [(await world.ask(messages=turns(name, turn + 1)))[0].placement for turn in range(count)]


def test_a_conversation_goes_on_where_it_was_answered_before() -> None:
    async def story() -> None:
        world = World(TWO, TWO)
        places = [await talk(world, f"talk {number}", 5) for number in range(12)]
        assert [len(set(each)) for each in places] == [1] * 12
        # What only begins alike is shared out as ever.
        assert {each[0] for each in places} == {"one", "two"}
        await world.close()

    run(story)


def test_without_affinity_turns_are_shared_out_as_any_others() -> None:
    async def story() -> None:
        world = World(TWO, TWO, policy=ModelPolicy(prefix_affinity=False))
        places = [await talk(world, f"talk {number}", 5) for number in range(12)]
        assert max(len(set(each)) for each in places) == 2
        await world.close()

    run(story)


def test_another_tenants_conversation_says_nothing_of_ones_own() -> None:
    async def story() -> None:
        world = World(TWO, TWO)
        firsts = []
        for number in range(12):
            await world.ask(messages=turns("same", 1), attribution=Attribution(key="ann"))
            firsts.append((await world.ask(messages=turns("same", 2), attribution=Attribution(key=str(number))))[0])
        assert {each.placement for each in firsts} == {"one", "two"}
        await world.close()

    run(story)


def test_a_conversation_leaves_a_deployment_that_fails_and_stays_where_it_went() -> None:
    async def story() -> None:
        failing = False

        def one(_: Request) -> FakeAnswer:
            return FakeAnswer((), usage=Usage(), error=UpstreamError("down")) if failing else TWO

        world = World(one, TWO, weights=(1, 0))
        assert await talk(world, "a", 2) == ["one", "one"]
        failing = True
        assert (await world.ask(messages=turns("a", 3)))[0].placement == "two"
        failing = False
        # No share of new calls goes to a weight of 0, nor do conversations stay there when the first is well again.
        assert (await world.ask(messages=turns("a", 4)))[0].placement == "one"
        await world.close()

    run(story)


def test_a_much_busier_deployment_is_passed_over_though_it_holds_the_beginning() -> None:
    async def story() -> None:
        world = World(letters(1, delay_s=10.0), letters(1, delay_s=10.0), policy=ModelPolicy(balance="least_busy"))
        (place,) = set(await talk(world, "a", 1))
        going = [await world.pipeline.admit(world.request(messages=turns("a", 2))) for _ in range(8)]
        # Passed over once, when it had five more than twice what the other had; then again the holder's turn.
        running = {each.placement: each.running for each in world.pipeline.deployments()}
        other = {"one": "two", "two": "one"}[str(place)]
        assert (running[place], running[other]) == (7, 1)
        for answer in going:
            await read(answer)
        await world.close()

    run(story)


def test_after_a_restart_conversations_go_on_where_they_were() -> None:
    async def story() -> None:
        before = World(TWO, TWO)
        places = [(await talk(before, f"talk {number}", 1))[0] for number in range(12)]
        after = World(TWO, TWO, seed=1)
        after.pipeline.remember(before.ledger.queries.recent(100))
        again = [(await after.ask(messages=turns(f"talk {number}", 2)))[0].placement for number in range(12)]
        assert again == places
        await before.close()
        await after.close()

    run(story)


class Marked:
    """A provider that keeps what is marked, as Anthropic does. A request that is prepared again is the same one."""

    def __init__(self) -> None:
        self.cache = PromptCache()
        self.bodies: dict[str, dict[str, Any]] = {}
        self._usages: dict[tuple[str, int], dict[str, Any]] = {}

    def __call__(self, request: Request) -> FakeAnswer:
        body = self.bodies[request.id] = json.loads(encode(request, "claude", "the fake").body)
        told = self._usages.get((request.id, marks_in(body))) or self.cache.usage(body, 0)
        self._usages[request.id, marks_in(body)] = told
        usage = Usage.of(
            Provenance.REPORTED,
            input_fresh=told["input_tokens"],
            input_cache_read=told["cache_read_input_tokens"],
            input_cache_write_5m=told["cache_creation_input_tokens"],
            output_text=1,
        )
        read = usage.input_tokens or 0
        return FakeAnswer((Text("x", 1),), usage=usage, input_tokens=read, delay_s=0.0, context_tokens=200_000)


def marks_in(body: dict[str, Any]) -> int:
    return json.dumps(body).count("cache_control")


KEPT = PriceConfig(input=Decimal(3), output=Decimal(15), input_cached=Decimal("0.3"), cache_write_5m=Decimal("3.75"))


def test_twenty_turns_at_a_provider_that_keeps_what_is_marked_show_on_their_receipts_what_that_saved() -> None:
    async def story() -> None:
        provider = Marked()
        world = World(provider, marked_at=("one",), prices=KEPT)
        receipts = [(await world.ask(messages=turns("a", turn + 1)))[0] for turn in range(20)]
        saved = [each.saved.get("prefix_cache", Money(0)).nanousd for each in receipts]
        # 5,000 tokens and a few are written at $0.75 a million above fresh ones, and then read at $2.70 below.
        assert saved[0] == 0
        assert -3_800_000 < saved[1] < -3_700_000
        assert all(13_000_000 < each < 14_500_000 for each in saved[2:])
        assert sum(saved) > 240_000_000
        told = [(each.policy or {}).get("prompt_cache_marks") for each in receipts]
        assert told[:2] == [None, "3 for 5m"]
        assert None not in told[1:]
        for each in receipts:
            assert each.list_price is not None
            assert each.total is not None
            assert Money.total(each.saved.values()) == each.list_price - each.total
        await world.close()

    run(story)


def test_quotes_and_holds_count_what_marks_read_and_write() -> None:
    async def story() -> None:
        world = World(Marked(), marked_at=("one",), prices=KEPT)
        for turn in range(6):
            request = world.request(messages=turns("a", turn + 1))
            [quote] = await world.pipeline.quotes(request, ["main"])
            answer = await world.pipeline.admit(request)
            await read(answer)
            receipt = world.receipt(answer)
            assert quote.cost is not None
            assert receipt.total is not None
            # But for some tokens of output that didn't come.
            assert abs(quote.cost.expected.nanousd - receipt.total.nanousd) < 0.02 * receipt.total.nanousd + 200_000
            assert quote.cost.low <= receipt.total <= quote.cost.high
            assert receipt.hold == quote.cost.high
        await world.close()

    run(story)


def test_what_the_caller_marks_is_held_for_as_if_all_of_it_were_written() -> None:
    async def story() -> None:
        world = World(Marked(), marked_at=("one",), prices=KEPT)
        request = world.request(messages=(Message("user", (TextPart("x" * 20_000, cache="5m"),)),))
        [quote] = await world.pipeline.quotes(request, ["main"])
        assert quote.cost is not None
        assert quote.input_tokens is not None
        # $3.75 a million for what is written, $3 for what is not, and $15 for ten tokens of output at most.
        assert quote.cost.high == Money(quote.input_tokens * 3750 + 10 * 15_000)
        assert quote.cost.expected == Money(quote.input_tokens * 3000 + quote.output_tokens.expected * 15_000)
        answer = await world.pipeline.admit(request)
        await read(answer)
        receipt = world.receipt(answer)
        assert receipt.total is not None
        assert receipt.hold == quote.cost.high >= receipt.total
        await world.close()

    run(story)


def test_held_out_from_marking_a_conversation_is_sent_as_it_came_and_both_sides_are_told() -> None:
    async def story() -> None:
        provider = Marked()
        half = HoldoutConfig(share=Decimal("0.5"), levers=("prompt_caching",))
        world = World(provider, marked_at=("one",), prices=KEPT, holdout=half)
        told: dict[str, list[str | None]] = {}
        for number in range(8):
            name = f"talk {number}"
            for turn in range(4):
                receipt, _, _ = await world.ask(
                    messages=turns(name, turn + 1), attribution=Attribution(conversation=name)
                )
                policy = receipt.policy or {}
                side = policy.get("holdout_prompt_caching")
                assert ("prompt_cache_marks" in policy) == (side == "with")
                assert (marks_in(provider.bodies[receipt.id]) > 0) == (side == "with")
                told.setdefault(name, []).append(side)
        # A first turn that nothing speaks for marking is on no side; the others are all on their conversation's.
        assert {side for sides in told.values() for side in sides[1:]} == {"with", "without"}
        assert all(len(set(sides[1:])) == 1 for sides in told.values())
        await world.close()

    run(story)


def test_where_marks_are_off_nothing_is_marked() -> None:
    async def story() -> None:
        provider = Marked()
        world = World(provider, prices=KEPT)
        for turn in range(5):
            await world.ask(messages=turns("a", turn + 1))
        assert [marks_in(body) for body in provider.bodies.values()] == [0] * 5
        await world.close()

    run(story)


def test_what_a_write_costs_more_is_held_and_within_the_callers_maximum() -> None:
    async def second(most: str, marked_at: tuple[str, ...]) -> Receipt:
        world = World(Marked(), marked_at=marked_at, prices=KEPT)
        maximum = Money.from_usd(most)
        receipts = [(await world.ask(messages=turns("a", turn + 1), max_cost=maximum))[0] for turn in range(2)]
        await world.close()
        return receipts[1]

    async def story() -> None:
        marked, plain = await second("0.05", ("one",)), await second("0.05", ())
        assert marked.saved["prefix_cache"].nanousd < 0
        assert marked.hold is not None
        assert marked.total is not None
        assert plain.hold is not None
        # 5,000 tokens and a few at $0.75 a million.
        assert 3_750_000 <= (marked.hold - plain.hold).nanousd < 3_800_000
        assert marked.total <= marked.hold <= Money.from_usd("0.05")
        assert "prefix_cache" not in (await second("0.02", ("one",))).saved

    run(story)


def test_a_caller_who_left_has_written_nothing_that_is_counted_on() -> None:
    async def story() -> None:
        provider = Marked()
        world = World(provider, marked_at=("one",), prices=KEPT)
        await world.ask(messages=turns("a", 1))
        answer = await world.pipeline.admit(world.request(messages=turns("a", 2)))
        answer.cancel()
        await read(answer)
        assert (await world.ask(messages=turns("a", 2)))[0].saved["prefix_cache"].nanousd != 0
        await world.close()

    run(story)
