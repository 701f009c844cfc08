"""Levers against savings worked out by hand."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import msgspec
import pytest

from millicent.caching.config import CacheConfig
from millicent.core.clock import NS_PER_HOUR, NS_PER_S
from millicent.core.errors import InvalidRequest
from millicent.core.money import Money
from millicent.core.prompts import Prompt, Segment
from millicent.core.receipts import Accelerator, PriceSource, Timing
from millicent.core.request import Attribution
from millicent.core.usage import Provenance, Usage
from millicent.economics.arrivals import Arrival
from millicent.economics.basis import Basis, basis_of
from millicent.economics.levers import Cheaper, Ground, Lever, cheaper, estimate, ground_of
from millicent.economics.levers_caches import (
    batch_prices,
    batching,
    cache_hits,
    engine_prefixes,
    provider_prefixes,
    response_cache,
)
from millicent.economics.levers_list import LEVERS
from millicent.economics.levers_models import another_place, other_apis, quantization, routing, shorter, smaller_models
from millicent.economics.recorded import Recorded, prefix_of, read_recorded
from millicent.economics.scaling import Limits
from millicent.economics.scaling_elsewhere import scale_elsewhere
from millicent.ledger.queries import LedgerQueries, ReceiptFilter
from millicent.meter.prices import PriceBook, PriceConfig, PriceList
from support.plan_ledgers import T0, answer
from support.replay_ledgers import COSTS, FIT, SHAPE, keep, machine, recorded, traffic

# Dollars per million tokens.
LARGE = PriceConfig(
    input=Decimal(2),
    input_cached=Decimal("0.5"),
    output=Decimal(8),
    batch=PriceList(input=Decimal(1), output=Decimal(4)),
)
SMALL = PriceConfig(input=Decimal(1), output=Decimal(2))
SNAPSHOT = {"kind": "api", "service": "standard", "input": "2", "input_cached": "0.5", "output": "8"}


def prompt(text: bytes, *, system: int = 0) -> Prompt:
    """A question after a system prompt that all share, in tokens."""
    shared = (Segment("system", system, b"system"),) if system else ()
    return Prompt(text, (*shared, Segment("user", 4000 - system, text)))


def bought(number: int, at_s: float, **changes: Any) -> Recorded:
    """4,000 tokens in, 500 out of the large model: $0.012; streamed within two seconds."""
    at_ns = T0 + int(at_s * NS_PER_S)
    asked: Prompt | None = changes.pop("prompt", None)
    key: str | None = changes.pop("key", None)
    receipt = answer(
        number,
        at_ns,
        placement="cloud",
        model="large",
        served_model="large",
        stream=True,
        attribution=Attribution(key=key),
        usage=Usage.of(Provenance.REPORTED, input_fresh=4000, output_text=500),
        timing=Timing(total_ns=2 * NS_PER_S, ttft_ns=NS_PER_S),
        accelerator=Accelerator(),
        prices=PriceSource("published", SNAPSHOT),
        prompt=asked,
        **changes,
    )
    arrival = Arrival(at_ns, 4000, 500, streamed=receipt.stream, key=key, prefix=prefix_of(asked, 4000))
    return Recorded(arrival, receipt, Money.from_usd(Decimal("0.012")))


def ground(everything: Sequence[Recorded], basis: Basis | None = None, **given: Any) -> Ground:
    prices = PriceBook({"large": LARGE, "small": SMALL})
    settings: dict[str, Any] = {"cache": CacheConfig(), "prices": prices, "now_ns": T0} | given
    return ground_of(everything, basis, 10_000, **settings)


def only(levers: Sequence[Lever]) -> Lever:
    (lever,) = levers
    return lever


def dollars(lever: Lever) -> Decimal:
    assert lever.saved is not None
    return lever.saved.expected.usd


def test_an_answer_is_kept_until_its_time_is_over() -> None:
    """Kept from its end, at 2 s, for 60 s. The one at 100 s comes too late, and is kept itself."""
    same = [bought(number, at_s, prompt=prompt(b"a")) for number, at_s in enumerate((0, 1, 50, 100, 130))]
    other = bought(9, 51, prompt=prompt(b"b"))
    found = only(response_cache(ground([*same, other], cache=CacheConfig(ttl_s=60))))
    assert (found.requests, found.of) == (3, 6)
    assert dollars(found) == Decimal("0.036")
    assert found.share == pytest.approx(0.5)
    assert "ttl_s = 60" in found.configuration


def test_a_cache_gives_each_key_its_own_unless_it_is_shared() -> None:
    two = [bought(1, 0, prompt=prompt(b"a"), key="ada"), bought(2, 9, prompt=prompt(b"a"), key="bob")]
    assert cache_hits(ground(two), two) == set()
    assert len(cache_hits(ground(two, cache=CacheConfig(scope="shared")), two)) == 1


def test_a_cache_with_room_for_one_forgets_the_other() -> None:
    asked = [bought(number, number * 9, prompt=prompt(text)) for number, text in enumerate((b"a", b"b", b"a", b"a"))]
    assert len(cache_hits(ground(asked, cache=CacheConfig(max_entries=1)), asked)) == 1
    assert len(cache_hits(ground(asked), asked)) == 2


def test_what_was_cut_off_or_given_by_the_cache_is_not_kept() -> None:
    cut = [bought(number, number * 9, prompt=prompt(b"a"), finish_reason="length") for number in range(3)]
    assert cache_hits(ground(cut), cut) == set()
    given = [bought(1, 0, prompt=prompt(b"a")), bought(2, 9, prompt=prompt(b"a"), policy={"response_cache": "hit"})]
    assert cache_hits(ground(given), given) == set()
    assert any("not counted again" in note for note in only(response_cache(ground(given))).notes)


def test_without_hashes_a_lever_says_what_it_needs() -> None:
    plain = ground([bought(1, 0), bought(2, 9)])
    for lever in (*response_cache(plain), *provider_prefixes(plain), *routing(plain)):
        assert lever.needs is not None
        assert (lever.saved, lever.freed, lever.requests) == (None, None, 0)


def test_providers_caches_hold_shared_beginnings_for_five_minutes() -> None:
    """3,000 tokens of 4,000 at $1.50 less a million, of the second and the third; the fourth comes too late."""
    asked = [
        bought(number, at_s, prompt=prompt(f"{number}".encode(), system=3000))
        for number, at_s in enumerate((0, 100, 350, 700))
    ]
    found = only(provider_prefixes(ground(asked)))
    assert found.requests == 2
    assert dollars(found) == Decimal("0.009")
    short = [bought(number, number, prompt=prompt(f"{number}".encode(), system=1000)) for number in range(3)]
    assert dollars(only(provider_prefixes(ground(short)))) == 0


def test_batch_prices_are_for_what_nobody_waits_for() -> None:
    waits = bought(1, 0)
    idle = bought(2, 9)
    idle = msgspec.structs.replace(idle, arrival=msgspec.structs.replace(idle.arrival, streamed=False))
    found = only(batch_prices(ground([waits, idle])))
    assert (found.requests, found.of, dollars(found)) == (1, 2, Decimal("0.006"))


def test_another_providers_model_is_priced_on_the_same_tokens() -> None:
    """4,000 at $1 and 500 at $2 are $0.005 instead of $0.012."""
    found = only(other_apis(ground([bought(1, 0), bought(2, 9)], compared=("small", "unheard-of"))))
    assert dollars(found) == Decimal("0.014")
    assert '"small", "large"' in found.configuration
    assert found.quality.startswith("not evaluated")


def test_a_tenth_shorter_saves_a_tenth_of_what_is_paid_by_the_token() -> None:
    given, made = shorter(ground([bought(1, 0), bought(2, 9)]))
    assert dollars(given) == Decimal("0.0016")
    assert dollars(made) == Decimal("0.0008")


def test_routing_is_extended_to_what_was_not_routed() -> None:
    """Of three routed ones two were cheaper, by $0.003 in all: $0.001 each. Two more were not routed."""
    policy = {"routing": "auto"}
    routed = [
        bought(1, 0, policy=policy, saved={"routing": Money.from_usd("0.001")}),
        bought(2, 1, policy=policy, saved={"routing": Money.from_usd("0.002")}),
        bought(3, 2, policy=policy),
    ]
    found = only(routing(ground([*routed, bought(4, 3), bought(5, 4)], policies=("auto",))))
    assert dollars(found) == Decimal("0.002")
    assert (found.requests, found.of) == (2, 5)
    assert '"auto"' in found.configuration


def test_another_place_is_the_difference_of_two_bills() -> None:
    """$730 a month against $73: $657 in 730 hours, 90 cents in one."""
    asked = [bought(1, 0), bought(2, 3600)]
    bills = {"box": Money.from_usd(73), "elsewhere": Money.from_usd(100)}
    found = only(another_place(ground(asked, bill=Money.from_usd(730), places=bills)))
    assert (dollars(found), found.title) == (Decimal("0.9"), "Run it at box")
    assert found.saved is not None
    assert found.saved.low is None
    assert another_place(ground(asked, bill=Money.from_usd(70), places=bills)) == []


@pytest.fixture(scope="module")
def basis(tmp_path_factory: pytest.TempPathFactory) -> Basis:
    """An engine whose prompts begin alike; every fourth request asks the same as another."""
    home = tmp_path_factory.mktemp("levers")
    arrivals = [msgspec.structs.replace(each, input_tokens=400) for each in traffic(200, every_ms=300)]
    prompts = [
        Prompt(
            f"{number // 2 if number % 4 == 1 else number}".encode(),
            (Segment("system", 300, b"system"), Segment("user", 100, f"{number}".encode())),
        )
        for number in range(200)
    ]
    prefixed = [
        msgspec.structs.replace(each, prefix=prefix_of(asked, each.input_tokens))
        for each, asked in zip(arrivals, prompts, strict=True)
    ]
    keep(home, recorded(prefixed, machine(), prompts))
    queries = LedgerQueries(home / "ledger.db")
    return basis_of(queries, read_recorded(queries, ReceiptFilter()), SHAPE)


def test_on_an_own_machine_time_is_freed_and_no_money_saved(basis: Basis) -> None:
    over = ground(basis.recorded, basis)
    for lever in (*engine_prefixes(over), *shorter(over), *batching(over)):
        assert lever.saved is None
        assert lever.freed is not None
        assert lever.freed_ns is not None
        assert lever.freed.expected == Money.of_time(lever.freed_ns, Decimal(1))
        assert lever.latency is not None


def test_the_prefix_cache_that_is_on_is_worth_what_it_saves_against_none(basis: Basis) -> None:
    as_it_is, shared = engine_prefixes(ground(basis.recorded, basis))
    assert as_it_is.on
    assert as_it_is.requests > 150
    assert as_it_is.freed is not None
    assert as_it_is.freed.low is not None
    assert as_it_is.freed.low > Money(0)
    # All are one tenant's: there is nothing more to share.
    assert not shared.on
    assert shared.freed_ns == 0
    off = msgspec.structs.replace(basis.machine, prefix_cache="off")
    without = msgspec.structs.replace(basis, calibration=msgspec.structs.replace(basis.calibration, machine=off))
    (could_be,) = engine_prefixes(ground(basis.recorded, without))
    assert (could_be.on, could_be.freed_ns) == (False, as_it_is.freed_ns)


def test_requests_that_a_cache_answers_free_all_of_their_time(basis: Basis) -> None:
    over = ground(basis.recorded, basis)
    found = only(response_cache(over))
    hits = cache_hits(over, over.replayed)
    assert 0 < found.requests == len(hits)
    assert over.before is not None
    assert found.freed_ns is not None
    own_ns = sum(
        fate.serving_ns for fate, each in zip(over.before.fates, basis.recorded, strict=True) if each.receipt.id in hits
    )
    # Those that stay are sometimes dearer, having fewer beside them.
    assert 0.5 * own_ns < found.freed_ns < 1.1 * own_ns
    assert found.latency is not None
    assert found.latency.mean_after_ns < found.latency.mean_before_ns


def test_a_smaller_model_is_as_cheap_as_its_steps(basis: Basis) -> None:
    """Steps that take half as long free half the time, and a little less: fewer answers run side by side."""
    halves = {name: value / 2 for name, value in msgspec.structs.asdict(COSTS).items()}
    tiny = msgspec.structs.replace(FIT, version="fit_2", model="tiny", **halves)
    larger = msgspec.structs.replace(FIT, version="fit_3", model="huge", weights_ns=9e7)
    over = ground(basis.recorded, basis, fits=(FIT, tiny, larger))
    found = only(smaller_models(over))
    assert found.title == "tiny instead of small"
    assert found.freed_ns is not None
    assert 0.3 < found.freed_ns / over.device_ns <= 0.5


def test_fewer_bits_are_replayed_where_they_were_seen(basis: Basis) -> None:
    assert only(quantization(ground(basis.recorded, basis, fits=(FIT,)))).needs is not None
    faster = msgspec.structs.replace(FIT, version="fit_2", configuration="dtype=int8 threads=2", weights_ns=1e6)
    found = only(quantization(ground(basis.recorded, basis, fits=(FIT, faster))))
    assert found.freed_ns is not None
    assert found.freed_ns > 0
    assert found.configuration == '[engine]\ndtype = "int8"\nthreads = 2'


def test_all_levers_are_ranked_and_what_is_not_known_comes_last(basis: Basis) -> None:
    said: list[str] = []
    everything = [*basis.recorded, *(bought(1000 + number, number, prompt=prompt(b"x")) for number in range(30))]
    found: Cheaper = cheaper(ground(everything, basis), LEVERS, said.append)
    assert (found.requests, found.of) == (230, 230)
    known = [each for each in found.levers if each.needs is None]
    assert list(found.levers[: len(known)]) == known
    assert [each.worth for each in known] == sorted((each.worth for each in known), reverse=True)
    assert len(said) == len(LEVERS)
    assert found.cost == Money.of_time(found.device_ns, Decimal(1)) + Money.from_usd(Decimal("0.36"))
    assert found.span_ns < NS_PER_HOUR
    assert found.monthly(Money(7)) == Money(7 * 730), "what came within an hour is an hour's"
    assert msgspec.structs.replace(found, span_ns=10 * NS_PER_HOUR).monthly(Money(7)) == Money(7 * 73)


def test_what_is_paid_by_the_token_grows_in_cost_and_not_in_time() -> None:
    """Ten requests an hour at $0.012, two seconds each; and ten in ten milliseconds, where ten may run at once."""
    paid = [bought(number, number * 360) for number in range(10)]
    found = scale_elsewhere(paid, Limits(), multiples=(5,), target_ns=NS_PER_S)
    assert found.elsewhere
    assert found.breaks == ()
    assert found.requests_per_month == 7300
    assert found.scaled[0].busy_cost_per_month == Money.from_usd(Decimal("0.012") * 7300 * 5)
    assert found.ladder[-1].outcome.latency.total == found.ladder[0].outcome.latency.total
    together = [bought(number, 0.001 * number) for number in range(10)]
    crowded = scale_elsewhere(together, Limits(max_concurrent=10), multiples=(2,))
    assert [(each.what, each.multiple, each.held_at) for each in crowded.breaks] == [("concurrency", 2, 1)]
    assert crowded.ladder[-1].outcome.refused == {"too_many_requests": 10}
    assert crowded.ladder[-1].outcome.busy_cost == Money.from_usd(Decimal("0.12"))
    with pytest.raises(InvalidRequest, match="nothing in this part of the ledger can be grown"):
        scale_elsewhere([], Limits())


def test_realised_savings_are_those_of_receipts(tmp_path: Path) -> None:
    saved = {"response_cache": Money(700), "routing": Money(30)}
    found = cheaper(ground([bought(1, 0, saved=saved), bought(2, 1, saved={"routing": Money(4)})]), ())
    assert [(each.name, each.requests, each.saved.nanousd) for each in found.realised] == [
        ("response_cache", 1, 700),
        ("routing", 2, 34),
    ]


def test_nothing_at_all_can_be_replayed_too() -> None:
    found = cheaper(ground([]), LEVERS)
    assert (found.requests, found.cost, found.span_ns) == (0, Money(0), 0)


def test_the_interval_is_as_wide_as_days_differ() -> None:
    day_ns = 24 * NS_PER_HOUR
    alike = estimate([day * day_ns for day in range(10)], [100] * 10)
    assert (alike.expected, alike.low, alike.high) == (Money(1000),) * 3
    uneven = estimate([day * day_ns for day in range(10)], [0] * 9 + [1000])
    assert uneven.expected == Money(1000)
    assert uneven.low == Money(0)
    assert uneven.high is not None
    assert Money(2000) <= uneven.high <= Money(4000)


def test_in_less_than_five_days_stretches_are_drawn() -> None:
    found = estimate(list(range(40)), [100, 0] * 20)
    assert (found.expected, found.low, found.high) == (Money(2000),) * 3
    assert estimate([], []).expected == Money(0)
