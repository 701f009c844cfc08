"""`[prices.NAME]`: what a model costs per token, and where such prices come from.

One rule: a price that isn't there is not known. Nothing falls back to a neighbour's price, except that reasoning is
output. An entry of ours replaces the published one whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import date
from decimal import Decimal
from functools import cached_property
from typing import Literal

import msgspec

from millicent.core.clock import NS_PER_S
from millicent.core.errors import ConfigError
from millicent.core.usage import Leaf

Service = Literal["standard", "batch", "flex", "priority"]


class TokenPrices(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, dict=True):
    """US dollars per million tokens; `cache_storage` for an hour of them; a `request_fee` and `tools` per call."""

    input: Decimal | None = None
    input_cached: Decimal | None = None
    cache_write_5m: Decimal | None = None
    cache_write_1h: Decimal | None = None
    cache_storage: Decimal | None = None
    output: Decimal | None = None
    reasoning: Decimal | None = None
    input_image: Decimal | None = None
    output_image: Decimal | None = None
    input_audio: Decimal | None = None
    output_audio: Decimal | None = None
    request_fee: Decimal | None = None
    tools: dict[str, Decimal] = {}

    @cached_property
    def per_token(self) -> Mapping[Leaf, Decimal | None]:
        """Dollars for one token of each kind, before any discount. Providers that name no price for reasoning charge it
        as output."""
        per_million = {
            Leaf.INPUT_FRESH: self.input,
            Leaf.INPUT_CACHE_READ: self.input_cached,
            Leaf.INPUT_CACHE_WRITE_5M: self.cache_write_5m,
            Leaf.INPUT_CACHE_WRITE_1H: self.cache_write_1h,
            Leaf.INPUT_IMAGE: self.input_image,
            Leaf.INPUT_AUDIO: self.input_audio,
            Leaf.OUTPUT_TEXT: self.output,
            Leaf.OUTPUT_REASONING: self.output if self.reasoning is None else self.reasoning,
            Leaf.OUTPUT_IMAGE: self.output_image,
            Leaf.OUTPUT_AUDIO: self.output_audio,
        }
        return {leaf: None if usd is None else usd.scaleb(-6) for leaf, usd in per_million.items()}

    @cached_property
    def snapshot(self) -> Mapping[str, str]:
        """The prices as they are, for the receipt."""
        values = {field: getattr(self, field) for field in TokenPrices.__struct_fields__ if field != "tools"}
        values |= {f"tools.{name}": fee for name, fee in self.tools.items()}
        return {field: format(value, "f") for field, value in values.items() if value is not None}


UNPRICED = TokenPrices()


class LongContext(TokenPrices, frozen=True, kw_only=True):
    """What the whole request costs once its input is longer than `above_input_tokens`."""

    above_input_tokens: int


class PriceList(TokenPrices, frozen=True, kw_only=True):
    long_context: tuple[LongContext, ...] = ()

    def tier(self, input_tokens: int) -> TokenPrices:
        """The tier that an input of this length falls into."""
        if not self.long_context:
            return self
        reached = [tier for tier in self.long_context if input_tokens > tier.above_input_tokens]
        return max(reached, key=lambda tier: tier.above_input_tokens) if reached else self


class PriceEntry(PriceList, frozen=True, kw_only=True):
    """Standard prices, and whole lists of their own for the other ways of processing."""

    batch: PriceList | None = None
    flex: PriceList | None = None
    priority: PriceList | None = None

    def of(self, service: Service) -> PriceList | None:
        lists: dict[Service, PriceList | None] = {
            "standard": self,
            "batch": self.batch,
            "flex": self.flex,
            "priority": self.priority,
        }
        return lists[service]


class DatedPriceEntry(PriceEntry, frozen=True, kw_only=True):
    """In force from the start of that day, UTC, until the next one is."""

    effective_from: date


class PriceConfig(PriceEntry, frozen=True, kw_only=True):
    """Prices per million tokens, in dollars; `cache_storage` is for an hour. A price that is left out is not known, and
    usage of that kind is then unpriced. `dated` entries replace all of it from a day on."""

    dated: tuple[DatedPriceEntry, ...] = ()

    def check(self, name: str) -> None:
        """Raises ConfigError for a price that can't be one."""
        for where, prices in self._lists():
            amounts = {field: getattr(prices, field) for field in TokenPrices.__struct_fields__ if field != "tools"}
            for field, value in (amounts | prices.tools).items():
                if value is not None and not (value.is_finite() and 0 <= value <= _DEAREST):
                    raise ConfigError(f"[prices.{name}] {where}{field} = {value}: must be a number from 0 to a million")

    def in_force(self, at_ns: int) -> PriceEntry:
        """What holds at that UTC instant."""
        due = [entry for entry in self.dated if day_start_ns(entry.effective_from) <= at_ns]
        return max(due, key=lambda entry: entry.effective_from) if due else self

    def _lists(self) -> list[tuple[str, TokenPrices]]:
        entries: list[tuple[str, PriceEntry]] = [("", self)]
        entries += [(f"dated {entry.effective_from} ", entry) for entry in self.dated]
        found: list[tuple[str, TokenPrices]] = []
        for where, entry in entries:
            for service in ("", "batch", "flex", "priority"):
                prices = getattr(entry, service) if service else entry
                if prices is not None:
                    found.append((f"{where}{service + ' ' if service else ''}", prices))
                    found += [(f"{where}long_context ", tier) for tier in prices.long_context]
        return found


class Prices(msgspec.Struct, frozen=True):
    """What one request is priced at. `standard` is the list that `saved` is counted against."""

    source: str
    standard: PriceList
    service: PriceList


Published = Callable[[str, int, str | None], tuple[str, PriceEntry] | None]
"""A model, a UTC instant and its provider (or None) to where its published prices come from, and the prices."""


class PriceBook:
    """Our own table first, then what is published. Answers None where nobody knows."""

    def __init__(self, overrides: Mapping[str, PriceConfig], published: Published | None = None) -> None:
        self._overrides = overrides
        self._published = published
        self._found: dict[tuple[str, str | None, int], tuple[str, PriceEntry] | None] = {}

    def find(self, model: str, at_ns: int, service: Service = "standard", provider: str | None = None) -> Prices | None:
        found = self._entry(model, at_ns, provider)
        if found is None:
            return None
        source, entry = found
        prices = entry.of(service)
        return None if prices is None else Prices(source, entry, prices)

    def _entry(self, model: str, at_ns: int, provider: str | None) -> tuple[str, PriceEntry] | None:
        if model in self._overrides:
            return f"prices.{model}", self._overrides[model].in_force(at_ns)
        if self._published is None:
            return None
        quarter_ns = at_ns - at_ns % _NS_PER_QUARTER  # some are lower at night, in hours that begin at half past
        key = (model, provider, quarter_ns)
        if key not in self._found:
            if len(self._found) >= _MOST_FOUND:
                self._found.clear()
            self._found[key] = self._published(model, quarter_ns, provider)
        return self._found[key]


_NS_PER_DAY = 86_400 * NS_PER_S
_NS_PER_QUARTER = 900 * NS_PER_S
_MOST_FOUND = 1024
# A million dollars for a million tokens, or for a call: what an answer costs is then a number that ledgers can hold.
_DEAREST = 10**6


def day_start_ns(day: date) -> int:
    """UTC nanoseconds at which the day begins."""
    return (day - date(1970, 1, 1)).days * _NS_PER_DAY
