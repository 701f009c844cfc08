"""Levers that give the same answers for less: caches, and doing more at once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from decimal import Decimal

import msgspec

from millicent.core.clock import NS_PER_MS, NS_PER_S
from millicent.core.receipts import RESPONSE_CACHE
from millicent.core.usage import Leaf
from millicent.economics.api_cost import api_cost
from millicent.economics.levers import SAME_ANSWERS, Ground, Lever, effect, price_of
from millicent.economics.recorded import Recorded

# How long a kept answer is taken to need to be given.
_HIT_NS = 5 * NS_PER_MS
_BYTES_PER_TOKEN = 4
# What providers' caches hold, and for how long after the last use.
_LEAST_CACHED_TOKENS = 1024
_CACHED_FOR_NS = 300 * NS_PER_S
# Dollars per million tokens are so many nano-dollars per token.
_NANOUSD = 1000
_NO_HASHES = "hashes of what was asked, which receipts have from this version on"


def response_cache(ground: Ground) -> list[Lever]:
    """Requests that ask the same again, within the time and the room that the cache is given."""
    config, replayed = ground.cache, ground.replayed
    known = [each for each in replayed if each.receipt.prompt is not None]
    notes = ["What was drawn at a temperature counts too, which `sampled = true` keeps: all who ask get one draw."]
    if any((each.receipt.policy or {}).get(RESPONSE_CACHE) == "hit" for each in known):
        notes.append("Hits that the cache has given already are not counted again.")
    lever = Lever(
        name="response_cache",
        title=f"Keep answers for {config.ttl_s:,} s and give them again",
        how="digests of requests, in the order in which they came",
        of=len(replayed),
        quality=SAME_ANSWERS,
        configuration=f"[cache]\nenabled = true\nttl_s = {config.ttl_s}\nsampled = true",
        on=config.is_used,
        notes=tuple(notes),
    )
    if not known:
        return [msgspec.structs.replace(lever, needs=_NO_HASHES)]
    hits = cache_hits(ground, replayed)
    return [_without(ground, msgspec.structs.replace(lever, requests=len(hits)), hits)]


def cache_hits(ground: Ground, recorded: Sequence[Recorded]) -> set[str]:
    """Identifiers of those that the cache would have answered."""
    config = ground.cache
    kept: OrderedDict[tuple[str | None, bytes], tuple[int, int]] = OrderedDict()  # until when, and how large
    room, found = config.max_mb << 20, set()
    for each in recorded:
        receipt = each.receipt
        if receipt.prompt is None or (receipt.policy or {}).get(RESPONSE_CACHE) == "hit":
            continue
        owner = None if config.scope == "shared" else receipt.attribution.key
        key = (owner, receipt.prompt.digest)
        if key in kept and kept[key][0] > each.arrival.at_ns:
            kept.move_to_end(key)
            found.add(receipt.id)
            continue
        if receipt.finish_reason not in {"stop", "tool_calls"}:
            continue
        size = each.arrival.output_tokens * _BYTES_PER_TOKEN
        room += kept.pop(key, (0, 0))[1] - size
        # Who asks while the first is running waits for it, which is a hit too.
        kept[key] = (each.arrival.at_ns + (receipt.timing.total_ns or 0) + config.ttl_s * NS_PER_S, size)
        while kept and (len(kept) > config.max_entries or room < 0):
            room += kept.popitem(last=False)[1][1]
    return found


def _without(ground: Ground, lever: Lever, gone: set[str]) -> Lever:
    """Without these requests, but for the moment that it takes to give what is there."""
    if ground.basis is not None and ground.before is not None:
        recorded = ground.basis.recorded
        after = ground.run(ground.basis.machine, [each for each in recorded if each.receipt.id not in gone])
        ran = iter(after.fates)
        fates = [None if each.receipt.id in gone else next(ran) for each in recorded]
        freed_ns = [
            round(was.serving_ns) - (0 if then is None else round(then.serving_ns))
            for was, then in zip(ground.before.fates, fates, strict=True)
        ]
        totals = [_HIT_NS if then is None else then.total_ns for then in fates]
        lever = ground.freeing(lever, freed_ns, effect([fate.total_ns for fate in ground.before.fates], totals))
    if ground.elsewhere:
        savings = [
            each.cost.nanousd if each.cost is not None and each.receipt.id in gone else 0 for each in ground.elsewhere
        ]
        lever = ground.saving(lever, ground.elsewhere, savings)
    return lever


def engine_prefixes(ground: Ground) -> list[Lever]:
    """Beginnings that prompts share, in the engine's own prefix cache."""
    if ground.basis is None or ground.before is None:
        return []
    machine = ground.basis.machine
    now = machine.prefix_cache
    wanted = "tenant" if now == "off" else "shared"
    whose = "each key" if wanted == "tenant" else "all keys together"
    lever = Lever(
        name="prefix_cache",
        title=f"Compute what prompts of {whose} have in common once",
        how="segments of prompts, through the engine's own prefix cache",
        quality=SAME_ANSWERS,
        configuration=f'[engine]\nprefix_cache = "{wanted}"',
    )
    if not any(each.arrival.prefix for each in ground.basis.recorded):
        return [msgspec.structs.replace(lever, needs=_NO_HASHES)]
    found = []
    if now != "off":
        was_off = ground.run(msgspec.structs.replace(machine, prefix_cache="off"))
        as_it_is = msgspec.structs.replace(
            lever,
            title="The engine's prefix cache as it is, against none",
            configuration=f'[engine]\nprefix_cache = "{now}"',
            on=True,
            requests=sum(fate.cached_tokens > 0 for fate in ground.before.fates),
        )
        found.append(ground.compared_with(as_it_is, was_off, ground.before))
    if now != "shared":
        if wanted == "shared":
            notes = ("How fast an answer comes then tells one key what others have sent.",)
            lever = msgspec.structs.replace(lever, notes=notes)
        found.append(ground.on_machine(lever, msgspec.structs.replace(machine, prefix_cache=wanted)))
    return found


def provider_prefixes(ground: Ground) -> list[Lever]:
    """Beginnings that prompts share, in providers' caches."""
    if not ground.elsewhere:
        return []
    seen: dict[tuple[str, str | None, bytes], int] = {}
    savings = []
    for each in ground.elsewhere:
        shared = 0
        for tokens, name in each.arrival.prefix:
            place = (each.place[1], each.receipt.attribution.key, name)
            if tokens >= _LEAST_CACHED_TOKENS:
                if seen.get(place, -_CACHED_FOR_NS) > each.arrival.at_ns - _CACHED_FOR_NS:
                    shared = tokens
                seen[place] = each.arrival.at_ns
        fresh = each.receipt.usage.tokens(Leaf.INPUT_FRESH) or 0
        again = max(0, min(fresh, shared - each.cached_tokens))
        usual, cached = price_of(each, "input"), price_of(each, "input_cached")
        priced = usual is not None and cached is not None
        savings.append(round(again * ((usual or 0) - (cached or 0)) * _NANOUSD) if priced else 0)
    lever = Lever(
        name="provider_prompt_cache",
        title="Let providers cache what prompts have in common",
        how="segments of prompts with the same key and model, for five minutes, from 1,024 tokens on",
        requests=sum(saving > 0 for saving in savings),
        of=len(ground.elsewhere),
        quality=SAME_ANSWERS,
        configuration='[placements.NAME]\nprompt_caching = "auto"',
        notes=("At most: what it costs to write to a provider's cache isn't taken off.",),
    )
    if not any(each.arrival.prefix for each in ground.elsewhere):
        return [msgspec.structs.replace(lever, needs=_NO_HASHES)]
    return [ground.saving(lever, ground.elsewhere, savings)]


def batching(ground: Ground) -> list[Lever]:
    """More side by side in the engine."""
    if ground.basis is None:
        return []
    machine = ground.basis.machine
    more = machine.max_sequences * 2
    lever = Lever(
        name="batching",
        title=f"Run up to {more} answers side by side, instead of {machine.max_sequences}",
        how="the engine's scheduler with more places",
        quality=SAME_ANSWERS,
        configuration=f"[engine]\nmax_sequences = {more}",
    )
    return [ground.on_machine(lever, msgspec.structs.replace(machine, max_sequences=more))]


def batch_prices(ground: Ground) -> list[Lever]:
    """Providers' batch prices, for what nobody waits for."""
    if not ground.elsewhere:
        return []
    savings = [
        None if each.arrival.streamed or each.arrival.target_ns is not None else _batch_saving(ground, each)
        for each in ground.elsewhere
    ]
    lever = Lever(
        name="batch_price",
        title="Send what nobody waits for as a provider's batch",
        how="answers that weren't streamed and had no latency target, at the provider's batch prices",
        requests=sum(saving is not None for saving in savings),
        of=len(ground.elsewhere),
        quality=SAME_ANSWERS,
        configuration='[placements.NAME]\nservice = "batch"',
        notes=("Answers come within a day then. Sending them as a batch is up to the caller.",),
    )
    return [ground.saving(lever, ground.elsewhere, [saving or 0 for saving in savings])]


def _batch_saving(ground: Ground, each: Recorded) -> int | None:
    """None where the provider has no such price, or it was paid already."""
    snapshot = each.receipt.prices.snapshot
    prices = ground.prices.find(each.place[1], each.arrival.at_ns, "batch")
    if prices is None or each.cost is None or snapshot.get("service") == "batch":
        return None
    cost = api_cost([each.receipt.usage], prices.service, Decimal(snapshot.get("discount", "0")))
    if isinstance(cost, str):
        return None
    saving = each.cost.nanousd - round(cost.per_request)
    return saving if saving > 0 else None
