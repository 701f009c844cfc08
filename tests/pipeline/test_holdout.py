"""Requests that go without a lever: as if it were off, nobody refused for it, and both sides marked on receipts."""

from __future__ import annotations

from decimal import Decimal

import pytest

from millicent.core.errors import ConfigError
from millicent.core.money import Money
from millicent.core.receipts import Receipt
from millicent.core.request import Attribution
from millicent.economics.holdouts import measured
from millicent.ledger.queries import ReceiptFilter
from millicent.pipeline.holdout import Holdout, HoldoutConfig
from millicent.routing.config import PolicyConfig, RuleConfig
from support import cached_world
from support.places import World, letters
from support.virtual_time import run

HALF = HoldoutConfig(share=Decimal("0.5"))
EASY = PolicyConfig(kind="rules", models=("spare", "main"), rules=(RuleConfig(model="spare", min_input_tokens=0),))


def told(receipt: Receipt) -> dict[str, str]:
    return {name: value for name, value in (receipt.policy or {}).items() if name.startswith("holdout")}


def talk(number: int, feature: str | None = None) -> Attribution:
    return Attribution(conversation=f"talk {number}", feature=feature)


def sides(lever: str, count: int = 40) -> tuple[int, int]:
    """A conversation that has the lever, and one that goes without."""
    arms = {}
    for number in range(count):
        request = cached_world.World().request(who=talk(number))
        arm = Holdout(HALF).arm(lever, request)  # type: ignore[arg-type]
        assert arm is not None
        arms[arm.without] = number
    return arms[False], arms[True]


def test_held_out_from_routing_a_request_goes_to_the_strongest_model_and_both_sides_are_marked() -> None:
    async def story() -> None:
        world = World(letters(3), here=letters(3, text="y", delay_s=0.01), routing={"auto": EASY}, holdout=HALF)
        routed, held = sides("routing")
        one, text, _ = await world.ask(model="auto", attribution=talk(routed))
        assert (text, one.served_model) == ("yyy", "spare")
        assert told(one) == {"holdout_routing": "with", "holdout_share": "0.5"}
        other, text, _ = await world.ask(model="auto", attribution=talk(held))
        assert (text, other.served_model) == ("xxx", "main")
        assert told(other) == {"holdout_routing": "without", "holdout_share": "0.5"}
        assert (other.policy or {})["why"] == "held out"
        assert "routing" in one.saved
        assert "routing" not in other.saved
        # Who names a model isn't routed, and takes no part.
        assert told((await world.ask(attribution=talk(held)))[0]) == {}
        await world.close()

    run(story)


def test_nobody_is_refused_for_being_held_out_from_routing() -> None:
    async def story() -> None:
        world = World(letters(3), here=letters(3, text="y", delay_s=0.01), routing={"auto": EASY}, holdout=HALF)
        _, held = sides("routing")
        # `main` is expected to cost more than this: whoever can't go without the lever is on no side.
        poor, text, error = await world.ask(model="auto", attribution=talk(held), max_cost=Money.from_usd("0.0009"))
        assert (text, error, told(poor)) == ("yyy", None, {})
        await world.close()

    run(story)


def test_held_out_from_the_cache_a_request_is_given_nothing_and_fills_nothing() -> None:
    async def story() -> None:
        world = cached_world.World(holdout=HALF)
        kept, held = sides("response_cache")
        outcomes = []
        for who in (held, kept, kept, held):
            receipt = await world.ask(who=talk(who))
            outcomes.append((cached_world.outcome(receipt), (receipt.policy or {}).get("response_cache_why")))
            assert told(receipt)["holdout_response_cache"] == ("without" if who == held else "with")
        assert outcomes == [("bypass", "held_out"), ("miss", None), ("hit", None), ("bypass", "held_out")]
        assert world.calls == 3
        # What the cache couldn't have been asked for takes no part.
        assert told(await world.ask(who=talk(held), cache_control="no-store")) == {}
        assert told(await world.ask(who=talk(held), cache_control="no-cache")) == {}

    cached_world.run(story)


def test_what_a_cache_saved_is_measured_from_the_ledger_by_conversation() -> None:
    async def story() -> None:
        world = cached_world.World(holdout=HALF)
        price: int | None = None
        for number in range(120):
            for _ in range(3):
                receipt = await world.ask(f"question {number}", who=talk(number))
                assert receipt.total is not None
                price = price or receipt.total.nanousd
        (found,) = measured(world.ledger.queries, ReceiptFilter())
        assert (found.lever, found.with_lever + found.without) == ("response_cache", 360)
        assert price is not None
        # Two of three are given again, at nothing: exactly, since all conversations are alike.
        assert found.saved is not None
        assert found.saved.expected == Money(found.with_lever * 2 // 3 * price) == found.saved.low
        assert found.reckoned == found.saved.expected

    cached_world.run(story)


def test_shares_are_by_feature_and_only_of_the_levers_that_are_named() -> None:
    holdout = Holdout(
        HoldoutConfig(
            share=Decimal("0.1"), levers=("routing",), features={"checkout": Decimal(0), "faq": Decimal("0.5")}
        )
    )
    world = cached_world.World()
    arms = {
        feature: holdout.arm("routing", world.request(who=talk(1, feature))) for feature in ("faq", "other", "checkout")
    }
    shares = {feature: None if arm is None else arm.share for feature, arm in arms.items()}
    assert shares == {"faq": Decimal("0.5"), "other": Decimal("0.1"), "checkout": None}
    assert holdout.arm("response_cache", world.request(who=talk(1))) is None
    assert Holdout(HoldoutConfig()).arm("routing", world.request()) is None


def test_a_conversations_requests_stay_on_one_side_and_another_keys_are_drawn_apart() -> None:
    holdout = Holdout(HALF)
    world = cached_world.World()

    def side(conversation: str | None = None, *, run: str | None = None, key: str | None = None) -> bool:
        arm = holdout.arm("routing", world.request(who=Attribution(conversation=conversation, run=run, key=key)))
        assert arm is not None
        return arm.without

    assert len({side("a") for _ in range(20)}) == 1
    assert len({side(run="a") for _ in range(20)}) == 1
    assert len({side("a", key=str(key)) for key in range(20)}) == 2
    assert len({side() for _ in range(20)}) == 2


@pytest.mark.parametrize("share", ["0.6", "-0.1", "NaN"])
def test_a_share_is_from_nothing_to_a_half(share: str) -> None:
    HALF.check()
    with pytest.raises(ConfigError, match=r"must be from 0 to 0\.5"):
        HoldoutConfig(share=Decimal(share)).check()
    with pytest.raises(ConfigError, match=r"features\.faq"):
        HoldoutConfig(features={"faq": Decimal(share)}).check()
