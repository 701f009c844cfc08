"""Published prices, from the genai-prices package: loaded at the first question, which takes some 0.1 s."""

from __future__ import annotations

from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

from millicent.core.clock import NS_PER_S
from millicent.meter.prices import LongContext, PriceEntry, PriceList

# genai-prices' names for the prices that we have a meter for. Its one price for cache writes is that of five minutes.
_PER_MILLION = {
    "input_mtok": "input",
    "cache_read_mtok": "input_cached",
    "cache_write_mtok": "cache_write_5m",
    "cache_write_5m_mtok": "cache_write_5m",
    "cache_write_1h_mtok": "cache_write_1h",
    "output_mtok": "output",
    "output_reasoning_mtok": "reasoning",
    "input_image_mtok": "input_image",
    "output_image_mtok": "output_image",
    "input_audio_mtok": "input_audio",
    "output_audio_mtok": "output_audio",
}
# What a model takes in is charged as its text is, where the package has no price of its own for it.
_LIKE_TEXT = ("input_image", "input_audio")
_PER_THOUSAND_CALLS = {
    "web_searches_kcount": "web_search",
    "storage_searches_kcount": "file_search",
    "code_executions_kcount": "code_execution",
}
_SERVICES = {
    "batch": {"processing": "batch"},
    "flex": {"service_tier": "flex"},
    "priority": {"service_tier": "priority"},
}


def published_prices(model: str, at_ns: int, provider: str | None) -> tuple[str, PriceEntry] | None:
    """None for a model that isn't in the package, or is there without prices: which is not the same as free."""
    import genai_prices
    from genai_prices.data_snapshot import get_snapshot

    snapshot = get_snapshot()
    try:
        found, info = snapshot.find_provider_model(model, None, provider, None)
    except LookupError:
        return None
    when = datetime.fromtimestamp(at_ns // NS_PER_S, UTC)
    standard = _price_list(info.get_prices(when))
    if standard is None:
        return None
    fields: dict[str, Any] = {field: getattr(standard, field) for field in PriceList.__struct_fields__}
    fields |= {
        name: _price_list(info.get_prices(when, context))
        for name, context in _SERVICES.items()
        # Without prices of its own for it, the package would answer with the standard ones.
        if any(variant.when == context and _in_force(variant, when) for variant in info.price_variants or ())
    }
    return f"genai-prices {genai_prices.__version__} {found.id}/{info.id}", PriceEntry(**fields)


def _in_force(variant: Any, when: datetime) -> bool:
    return variant.constraint is None or bool(variant.constraint.active(when))


def _price_list(published: Any) -> PriceList | None:
    """One of the package's tables as ours; None when it is empty."""
    given = {key: price for key, price in vars(published).items() if price is not None}
    if not given:
        return None
    starts = sorted({tier.start for price in given.values() for tier in getattr(price, "tiers", ())})
    tiers = tuple(LongContext(above_input_tokens=start, **_prices(given, start)) for start in starts)
    return PriceList(long_context=tiers, **_prices(given, None))


def _prices(given: dict[str, Any], start: int | None) -> dict[str, Any]:
    """The prices that hold above `start` input tokens; None: from the first token on."""
    prices: dict[str, Any] = {
        ours: _amount(given[theirs], start) for theirs, ours in _PER_MILLION.items() if theirs in given
    }
    if "input" in prices:
        prices = dict.fromkeys(_LIKE_TEXT, prices["input"]) | prices
    if "requests_kcount" in given:
        prices["request_fee"] = _amount(given["requests_kcount"], start).scaleb(-3)
    tools = {
        ours: _amount(given[theirs], start).scaleb(-3)
        for theirs, ours in _PER_THOUSAND_CALLS.items()
        if theirs in given
    }
    return prices | {"tools": tools}


def _amount(price: Any, start: int | None) -> Decimal:
    """A flat price, or the tier's that `start` reaches."""
    if isinstance(price, Decimal):
        return price
    reached = [tier for tier in price.tiers if start is not None and tier.start <= start]
    amount: Decimal = reached[-1].price if reached else price.base
    return amount
