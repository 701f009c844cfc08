"""What a lever saved, against a random part that went without: by hand, and how often the interval holds the truth."""

from __future__ import annotations

from decimal import Decimal
from random import Random

import pytest

from millicent.core.holdouts import drawn as draw
from millicent.core.money import Money
from millicent.economics.holdouts import LEAST, compared
from millicent.ledger.queries import Drawn


def each(nanousd: int, *, without: bool, requests: int = 1, share: str = "0.1", unpriced: int = 0) -> Drawn:
    return Drawn(share, without, requests, nanousd, unpriced, reckoned_nanousd=0 if without else 7 * requests)


def both(with_lever: int, without: int) -> list[Drawn]:
    return [each(2, without=False) for _ in range(with_lever)] + [each(10, without=True) for _ in range(without)]


def test_what_was_saved_is_the_difference_of_means_over_all_that_had_the_lever() -> None:
    found = compared("routing", both(300, 40))
    assert (found.with_lever, found.without, found.unpriced) == (300, 40, 0)
    assert found.saved is not None
    # Eight nano-dollars each, and nothing varies.
    assert (found.saved.expected, found.saved.low, found.saved.high) == (Money(2400), Money(2400), Money(2400))
    assert found.reckoned == Money(2100)


def test_the_interval_is_worked_out_by_hand() -> None:
    """With: 50 x 0 and 50 x 4, mean 2, variance 4 x 100/99 / 100. Without: 20 x 0 and 20 x 20, 100 x 40/39 / 40."""
    drawn = [each(nanousd, without=False) for nanousd in (0, 4)] * 50
    drawn += [each(nanousd, without=True) for nanousd in (0, 20)] * 20
    saved = compared("response_cache", drawn).saved
    assert saved is not None
    assert saved.expected == Money(800)
    # 100 x sqrt(4/99 + 100/39) = 161.38; in whole nano-dollars, times 1.96.
    assert saved.low is not None
    assert saved.high is not None
    assert saved.high.nanousd - 800 == 800 - saved.low.nanousd == round(Decimal("1.96") * 161)


def test_a_conversation_counts_as_one_drawing_however_many_requests_it_has() -> None:
    alone = [each(amount, without=side) for side in (False, True) for amount in (0, 6) for _ in range(40)]
    together = [
        each(20 * amount, requests=20, without=side) for side in (False, True) for amount in (0, 6) for _ in range(40)
    ]
    one, many = compared("routing", alone).saved, compared("routing", together).saved
    assert one is not None
    assert many is not None
    assert one.high is not None
    assert many.high is not None
    # Twenty times as many requests, and as far off for each of them.
    assert many.high.nanousd == pytest.approx(20 * one.high.nanousd, rel=0.02)


def test_too_few_on_a_side_say_nothing_and_shares_are_compared_each_with_its_own() -> None:
    assert compared("routing", both(1000, LEAST - 1)).saved is None
    # At another share other traffic came, which was dearer on both sides.
    dearer = [each(1002, without=False, share="0.5")] * 50 + [each(1010, without=True, share="0.5")] * 50
    saved = compared("routing", both(100, 40) + dearer).saved
    assert saved is not None
    assert (saved.expected, saved.low) == (Money(8 * 150), Money(8 * 150))


def test_what_has_no_price_is_counted_and_in_no_mean() -> None:
    found = compared("routing", [*both(100, 40), each(0, without=True, requests=0, unpriced=3)])
    assert (found.unpriced, found.without) == (3, 40)
    assert found.saved is not None
    assert found.saved.expected == Money(800)


def test_the_interval_holds_what_is_true_about_as_often_as_it_says() -> None:
    """A cache that answers a third, of conversations whose costs are as uneven as costs are."""
    random = Random(7)
    held = 0
    for _ in range(100):
        found, truth = [], 0
        for number in range(700):
            requests = random.randint(1, 6)
            cost = sum(round(1e6 * random.lognormvariate(0, 1)) for _ in range(requests))
            without = draw("response_cache", Decimal("0.1"), f"{random.random()} {number}").without
            paid = cost if without or random.random() > 1 / 3 else 0
            truth += 0 if without else cost - paid
            found.append(each(paid, requests=requests, without=without))
        saved = compared("response_cache", found).saved
        assert saved is not None
        assert saved.low is not None
        assert saved.high is not None
        held += saved.low.nanousd <= truth <= saved.high.nanousd
    assert 90 <= held < 100


def test_draws_are_as_many_as_stated_the_same_again_and_each_levers_own() -> None:
    share = Decimal("0.05")
    routing = {name: draw("routing", share, str(name)).without for name in range(20_000)}
    assert sum(routing.values()) == pytest.approx(1000, abs=100)
    assert all(draw("routing", share, str(name)).without == without for name, without in routing.items())
    cache = {name: draw("response_cache", share, str(name)).without for name in range(20_000)}
    assert sum(routing[name] and cache[name] for name in routing) == pytest.approx(50, abs=30)
