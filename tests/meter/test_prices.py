"""Token prices: every amount here is worked out by hand."""

from __future__ import annotations

import tomllib
from decimal import Decimal
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from millicent.core.accounts import Reading
from millicent.core.clock import NS_PER_S, parse_time_ns
from millicent.core.errors import ConfigError
from millicent.core.money import Money
from millicent.core.receipts import Accelerator, Attempt, Line, Meter, Role
from millicent.core.usage import Count, Leaf, Provenance, Usage
from millicent.meter.placements import Placement, PlacementConfig
from millicent.meter.prices import PriceBook, PriceConfig, PriceEntry, TokenPrices
from millicent.meter.pricing import Consumption, Priced, price, token_lines, total
from millicent.meter.published_prices import published_prices

ATTEMPT = Attempt(1, "provider", "api", "big", Role.INFERENCE, 10, 20)
AT_NS = parse_time_ns("2026-06-01")
LATER_NS = parse_time_ns("2026-11-01")

BIG = """
[prices.big]
input = 3
input_cached = 0.30
cache_write_5m = 3.75
cache_write_1h = 6
cache_storage = 4.5
output = 15
input_image = 2
output_image = 40
input_audio = 32
output_audio = 64
request_fee = 0.005
tools = { web_search = 0.01 }
long_context = [{ above_input_tokens = 200_000, input = 6, output = 22.5 }]
batch = { input = 1.5, input_cached = 0.15, cache_write_5m = 1.875, output = 7.5, request_fee = 0.005 }

[[prices.big.dated]]
effective_from = 2026-07-01
input = 2
output = 10
"""


def config(text: str = BIG) -> PriceConfig:
    prices = msgspec.convert(tomllib.loads(text, parse_float=Decimal)["prices"]["big"], PriceConfig)
    prices.check("big")
    return prices


def book(text: str = BIG) -> PriceBook:
    return PriceBook({"big": config(text)})


def lines_of(**tokens: int) -> tuple[Line, ...]:
    return token_lines(Consumption(Usage.of(Provenance.REPORTED, **tokens)), config(), ATTEMPT, 99)


@pytest.mark.parametrize(
    ("leaf", "tokens", "meter", "usd"),
    [
        ("input_fresh", 1_234, Meter.INPUT, "0.003702"),
        ("input_cache_read", 10_001, Meter.INPUT_CACHED, "0.0030003"),
        ("input_cache_write_5m", 1_000, Meter.CACHE_WRITE, "0.00375"),
        ("input_cache_write_1h", 1_000, Meter.CACHE_WRITE, "0.006"),
        ("output_text", 7, Meter.OUTPUT, "0.000105"),
        ("output_reasoning", 2_000, Meter.REASONING, "0.03"),  # no price of its own: output's
        ("input_image", 85, Meter.IMAGE, "0.00017"),
        ("output_image", 1_056, Meter.IMAGE, "0.04224"),
        ("input_audio", 100, Meter.AUDIO, "0.0032"),
        ("output_audio", 50, Meter.AUDIO, "0.0032"),
    ],
)
def test_each_kind_of_token_has_its_own_price(leaf: str, tokens: int, meter: Meter, usd: str) -> None:
    line, fee = lines_of(**{leaf: tokens})
    assert (line.meter, line.quantity, line.unit, line.amount) == (meter, Decimal(tokens), "token", Money.from_usd(usd))
    assert line.provenance is Provenance.REPORTED
    assert (fee.meter, fee.amount) == (Meter.REQUEST_FEE, Money.from_usd("0.005"))


def test_an_hour_of_cache_is_not_billed_as_five_minutes() -> None:
    five, hour, _ = lines_of(input_cache_write_5m=1_000, input_cache_write_1h=1_000)
    assert (five.note, hour.note) == ("kept for 5 minutes", "kept for 1 hour")
    assert (str(five.amount), str(hour.amount)) == ("0.00375", "0.006")


def test_storage_and_tools_are_charged_beside_the_tokens() -> None:
    consumption = Consumption(Usage(), 1, {"web_search": 3, "unheard_of": 1}, Decimal(2_000_000))
    storage, search, unknown, fee = token_lines(consumption, config(), ATTEMPT, 99)
    # two million token-hours at $4.50 a million; three searches at a cent
    assert (storage.meter, str(storage.amount)) == (Meter.CACHE_STORAGE, "9")
    assert (search.meter, search.note, str(search.amount)) == (Meter.TOOL_CALL, "web_search", "0.03")
    assert (unknown.amount, unknown.provenance) == (None, Provenance.UNKNOWN)
    assert fee.amount == Money.from_usd("0.005")


def test_what_has_no_price_is_unpriced_and_so_is_the_whole() -> None:
    lines = token_lines(
        Consumption(Usage.of(Provenance.REPORTED, input_fresh=5, output_text=5)),
        TokenPrices(input=Decimal(1)),
        ATTEMPT,
        99,
    )
    assert [line.amount for line in lines] == [Money(5_000), None]
    assert total(lines) is None


def test_what_nobody_counted_is_unpriced_even_at_a_known_price() -> None:
    usage = Usage({Leaf.OUTPUT_TEXT: Count(None, Provenance.UNKNOWN)})
    line, _ = token_lines(Consumption(usage), config(), ATTEMPT, 99)
    assert (line.amount, line.provenance) == (None, Provenance.UNKNOWN)


def api(**fields: Any) -> Placement:
    return msgspec.convert({"kind": "api", **fields}, PlacementConfig).placement("api")


def priced(placement: Placement, prices: PriceBook | None = None, at_ns: int = AT_NS, **tokens: int) -> Priced:
    found = (prices or book()).find("big", at_ns, placement.service, placement.provider)
    reading = Reading("r", Usage.of(Provenance.REPORTED, **tokens), Accelerator())
    return price(reading, (ATTEMPT,), placement, 99, found)


def test_a_long_input_moves_the_whole_request_to_the_long_tier() -> None:
    short = priced(api(), input_fresh=200_000, output_text=1_000)
    # 200,000 x $3 + 1,000 x $15 a million, and the fee
    assert total(short.lines) == Money.from_usd("0.62")
    long = priced(api(), input_fresh=200_001, output_text=1_000)
    # 200,001 x $6 + 1,000 x $22.50 a million; the tier names no fee
    assert total(long.lines) == Money.from_usd("1.222506")
    # Nor does it name a price for cached input: unpriced, not the short tier's.
    assert total(priced(api(), input_fresh=200_001, input_cache_read=1).lines) is None


def test_prices_change_on_their_day_and_not_before() -> None:
    before = priced(api(), at_ns=parse_time_ns("2026-06-30T23:59:59.999999"), input_fresh=1_000_000 // 10)
    after = priced(api(), at_ns=parse_time_ns("2026-07-01"), input_fresh=1_000_000 // 10)
    assert (str(total(before.lines)), str(total(after.lines))) == ("0.305", "0.2")


def test_savings_sum_to_list_less_effective() -> None:
    tokens: dict[str, Any] = {"input_fresh": 1_000, "input_cache_read": 9_000, "output_text": 100}
    result = priced(api(service="batch", discount=Decimal("0.1")), **tokens)
    # List: 10,000 x $3 + 100 x $15 a million + $0.005 = 0.0365. With caches 0.0122; in batch 0.0086, of which 10% off.
    assert str(result.list_price) == "0.0365"
    assert str(total(result.lines)) == "0.00774"
    assert {lever: str(amount) for lever, amount in result.saved.items()} == {
        "prefix_cache": "0.0243",
        "batch": "0.0036",
        "contract": "0.00086",
    }
    assert result.prices.source == "prices.big"
    assert result.prices.snapshot["input"] == "1.5"
    assert result.prices.snapshot["discount"] == "0.1"


@given(st.dictionaries(st.sampled_from([leaf.value for leaf in Leaf]), st.integers(0, 10**6), min_size=1))
def test_savings_always_sum_to_list_less_effective(tokens: dict[str, Any]) -> None:
    result = priced(api(discount=Decimal("0.123")), **tokens)
    effective = total(result.lines)
    if result.list_price is not None:
        assert effective is not None
        assert Money.total(result.saved.values()) == result.list_price - effective


def test_a_service_without_prices_of_its_own_is_unpriced() -> None:
    result = priced(api(service="flex"), input_fresh=10)
    assert (total(result.lines), result.list_price, result.prices.snapshot) == (None, None, {})


def test_our_table_replaces_what_is_published_whole() -> None:
    ours = PriceBook({"gpt-4o": config(BIG)}, published_prices)
    found = ours.find("gpt-4o", AT_NS)
    assert found is not None
    assert (found.source, found.service.input) == ("prices.gpt-4o", Decimal(3))


def test_published_prices_that_are_lower_at_night_are_asked_for_at_that_hour() -> None:
    day_ns = 20_000 * 86_400 * NS_PER_S

    def by_night(model: str, at_ns: int, provider: str | None) -> tuple[str, PriceEntry]:
        del model, provider
        return "night", PriceEntry(input=Decimal(1 if at_ns - day_ns < 1800 * NS_PER_S else 2))

    book = PriceBook({}, by_night)
    for after_s, usd in ((0, 1), (1799, 1), (1800, 2), (86_399, 2), (1799, 1)):
        found = book.find("m", day_ns + after_s * NS_PER_S)
        assert found is not None
        assert found.service.input == usd


def test_published_prices_cover_tiers_caches_and_batch() -> None:
    published = PriceBook({}, published_prices)
    standard = published.find("claude-sonnet-4-5", AT_NS, provider="anthropic")
    batch = published.find("claude-sonnet-4-5", LATER_NS, "batch", "anthropic")
    assert standard is not None
    assert batch is not None
    prices = standard.service
    assert (prices.input, prices.input_cached, prices.output) == (Decimal(3), Decimal("0.3"), Decimal(15))
    assert (prices.cache_write_5m, prices.cache_write_1h) == (Decimal("3.75"), Decimal(6))
    assert prices.tier(200_000).input == Decimal(3)
    assert (prices.tier(200_001).input, prices.tier(200_001).output) == (Decimal(6), Decimal("22.5"))
    assert (batch.service.input, batch.service.output) == (Decimal("1.5"), Decimal("7.5"))
    assert standard.source.startswith("genai-prices ")
    assert prices.tools["web_search"] == Decimal("0.01")


@pytest.mark.parametrize(
    ("provider", "model", "service", "tokens", "usd"),
    [
        # Anthropic: a cache written for 5 minutes costs 1.25 times the input, for an hour twice; a read a tenth.
        # 1,000 x $3 + 10,000 x $0.30 + 2,000 x $3.75 + 3,000 x $6 + 500 x $15, a million
        ("anthropic", "claude-sonnet-4-5", "standard", (1_000, 10_000, 2_000, 3_000, 500, 0), "0.039"),
        # The same in a batch: half of everything.
        ("anthropic", "claude-sonnet-4-5", "batch", (1_000, 10_000, 2_000, 3_000, 500, 0), "0.0195"),
        # 190,000 of the input are cached: what counts for the tier is all of it. 10,001 x $6 + 190,000 x $0.60 + 15.00
        ("anthropic", "claude-sonnet-4-5", "standard", (10_001, 190_000, 0, 0, 1_000, 0), "0.196506"),
        # Gemini: 200,000 x $1.25 + 1,000 x $10; one token more, and all of it is $2.50 and $15.
        ("google", "gemini-2.5-pro", "standard", (200_000, 0, 0, 0, 1_000, 0), "0.26"),
        ("google", "gemini-2.5-pro", "standard", (200_001, 0, 0, 0, 1_000, 0), "0.5150025"),
        # OpenAI: 2,000 x $1.25 + 8,000 x $0.125 + 300 x $10; batch and flex half of it, priority twice.
        ("openai", "gpt-5", "standard", (2_000, 8_000, 0, 0, 300, 0), "0.0065"),
        ("openai", "gpt-5", "batch", (2_000, 8_000, 0, 0, 300, 0), "0.00325"),
        ("openai", "gpt-5", "flex", (2_000, 8_000, 0, 0, 300, 0), "0.00325"),
        ("openai", "gpt-5", "priority", (2_000, 8_000, 0, 0, 300, 0), "0.013"),
        # Thinking is output: 100 x $2 + (50 + 1,000) x $8.
        ("openai", "o3", "standard", (100, 0, 0, 0, 50, 1_000), "0.0086"),
        # A fee for the request beside its tokens: $0.014 + 1,000 x $3 + 200 x $15.
        ("perplexity", "sonar-pro", "standard", (1_000, 0, 0, 0, 200, 0), "0.02"),
        # Nobody publishes what sonar's cached input would cost.
        ("perplexity", "sonar-pro", "standard", (1_000, 10, 0, 0, 200, 0), None),
    ],
)
def test_published_prices_come_to_what_their_providers_say(
    provider: str, model: str, service: Any, tokens: tuple[int, ...], usd: str | None
) -> None:
    leaves = ("input_fresh", "input_cache_read", "input_cache_write_5m", "input_cache_write_1h", "output_text",
              "output_reasoning")  # fmt: skip
    used = {leaf: count for leaf, count in zip(leaves, tokens, strict=True) if count}
    found = PriceBook({}, published_prices).find(model, LATER_NS, service, provider)
    assert found is not None
    reading = Reading("r", Usage.of(Provenance.REPORTED, **used), Accelerator())
    lines = price(reading, (ATTEMPT,), api(provider=provider, service=service), 99, found).lines
    assert total(lines) == (None if usd is None else Money.from_usd(usd))


@pytest.mark.parametrize(
    ("model", "provider", "service"),
    [
        ("no-such-model-anywhere", None, "standard"),
        ("gpt-4o", "github-copilot", "standard"),  # in the package, with an empty price: not free
        ("claude-sonnet-4-5", "anthropic", "flex"),  # no such service: not the standard price
        ("gpt-4o", "nobody", "standard"),
    ],
)
def test_what_is_not_published_is_unknown_never_free(model: str, provider: str | None, service: Any) -> None:
    assert PriceBook({}, published_prices).find(model, AT_NS, service, provider) is None


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("[prices.big]\ninput = -1", "[prices.big] input = -1"),
        ("[prices.big]\noutput = nan", "output = NaN"),
        ("[prices.big]\ntools = { search = -0.1 }", "search = -0.1"),
        ("[prices.big]\nbatch = { input = -2 }", "batch input = -2"),
        ("[[prices.big.dated]]\neffective_from = 2026-01-01\ninput = -3", "dated 2026-01-01 input = -3"),
        ("[prices.big]\nlong_context = [{ above_input_tokens = 1, input = -4 }]", "long_context input = -4"),
    ],
)
def test_a_price_that_cannot_be_one_is_refused_where_it_stands(text: str, where: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config(text)
    assert where in caught.value.message
