"""Levers that may change what answers say: other models, fewer bits, other places, fewer words."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from decimal import Decimal
from fractions import Fraction

import msgspec

from millicent.core.clock import NS_PER_HOUR
from millicent.core.fits import StepTimeFit
from millicent.core.money import Money
from millicent.core.usage import Leaf
from millicent.economics.api_cost import api_cost
from millicent.economics.calibration import slower
from millicent.economics.levers import (
    NOT_EVALUATED,
    Estimate,
    Ground,
    Lever,
    estimate,
    price_of,
)
from millicent.economics.recorded import Recorded
from millicent.economics.simulator import Machine
from millicent.economics.traffic import HOURS_PER_MONTH
from millicent.step_time import Coefficients

_SHORTER = Decimal("0.1")
_NANOUSD = 1000


def smaller_models(ground: Ground) -> list[Lever]:
    """The other models that this ledger has seen an engine run, on the same tokens."""
    if ground.basis is None:
        return []
    own, found = ground.basis.fit, []
    for model, fit in _newest_by(ground.fits, lambda fit: fit.model).items():
        if (model, fit.device) == (own.model, own.device) or fit.device != own.device:
            continue
        lever = Lever(
            name="smaller_model",
            title=f"{model} instead of {own.model}",
            how=f"the same tokens with the step times that were learned of {model}",
            quality=NOT_EVALUATED,
            configuration=_cheapest_of(model, own.model),
            notes=("Another model says it in other, and other many, words: the same lengths are taken.",),
        )
        lever = ground.on_machine(lever, _as_quick_as(ground, fit))
        found += [lever] if lever.freed_ns is not None and lever.freed_ns > 0 else []
    return found


def other_apis(ground: Ground) -> list[Lever]:
    """Other models of providers: those that this ledger has seen, and those named, on the same tokens."""
    there = sorted({each.place[1] for each in ground.elsewhere})
    found = []
    for model in dict.fromkeys((*ground.compared, *there)):
        others = [each for each in ground.elsewhere if each.place[1] != model]
        prices = ground.prices.find(model, ground.now_ns)
        if not others or prices is None:
            continue
        costs = [api_cost([each.receipt.usage], prices.standard) for each in others]
        savings = [
            0 if isinstance(cost, str) or each.cost is None else each.cost.nanousd - round(cost.per_request)
            for each, cost in zip(others, costs, strict=True)
        ]
        lever = Lever(
            name="smaller_model",
            title=f"{model} for what other models of providers answered",
            how=f"the same tokens at the prices of {prices.source}",
            requests=len(others),
            of=len(ground.elsewhere),
            quality=NOT_EVALUATED,
            configuration=_cheapest_of(model, others[0].place[1]),
            notes=("Tokens are counted as they were: another model's tokenizer may count others.",),
        )
        found += [ground.saving(lever, others, savings)] if sum(savings) > 0 else []
    return found


def quantization(ground: Ground) -> list[Lever]:
    """The same model with fewer bits, where the ledger has seen one."""
    if ground.basis is None:
        return []
    own = ground.basis.fit
    others = [fit for fit in ground.fits if (fit.model, fit.device) == (own.model, own.device)]
    found = []
    for configuration, fit in _newest_by(others, lambda fit: fit.configuration).items():
        if configuration == own.configuration:
            continue
        lever = Lever(
            name="quantization",
            title=f"{own.model} with {configuration}, instead of {own.configuration}",
            how="the same traffic with the step times that were learned of that",
            quality=NOT_EVALUATED,
            configuration="[engine]\n" + "\n".join(map(_setting, configuration.split())),
        )
        found.append(ground.on_machine(lever, _as_quick_as(ground, fit)))
    missing = Lever(
        name="quantization",
        title=f"{own.model} with fewer bits",
        how="step times of another precision",
        quality=NOT_EVALUATED,
        configuration='[engine]\nquantize = "int4"',
        needs="step times of it: serve the model quantized under another name, answer some requests, ask again",
    )
    return found or [missing]


def routing(ground: Ground) -> list[Lever]:
    """Requests that no policy was asked for, taken to be like those that one was."""
    routed = [each for each in ground.everything if "routing" in (each.receipt.policy or {})]
    counted = [each for each in routed if "routing" in each.receipt.saved]
    rest = [each for each in ground.replayed if "routing" not in (each.receipt.policy or {})]
    asking = f'"model": "{ground.policies[0]}" in requests' if ground.policies else None
    lever = Lever(
        name="routing",
        title="Route what no policy is asked for",
        how=f"what routing saved of {len(routed):,} requests, on average, for each of the others",
        requests=len(rest),
        of=len(ground.replayed),
        quality=NOT_EVALUATED,
        configuration=asking
        or '[routing.auto]\nkind = "learned"\nmodels = ["SMALL", "LARGE"]\nscores = "scores.json"\nthreshold = 0.5',
        notes=("Taken to be like those that were routed, which may be other requests.",),
    )
    if not counted:
        why = "receipts of a routing policy, or captured prompts: hashes don't say how hard a question is"
        return [msgspec.structs.replace(lever, requests=0, how="nothing yet", needs=why)]
    found = estimate(
        [each.arrival.at_ns for each in counted], [each.receipt.saved["routing"].nanousd for each in counted]
    )
    seen = [one for one in (found.expected, found.low, found.high) if one is not None]
    saved = Estimate(*(Money(round(Fraction(one.nanousd * len(rest), len(routed)))) for one in seen))
    return [ground.shared(msgspec.structs.replace(lever, saved=saved))]


def shorter(ground: Ground) -> list[Lever]:
    """A tenth less to read, and a tenth less to write."""
    found = []
    for what, title, do in (
        ("input", "Prompts a tenth shorter", "none: change what is asked; `millicent report --waste` says where"),
        ("output", "Outputs a tenth shorter", "none: ask for less, or lower max_tokens"),
    ):
        lever = Lever(
            name=f"shorter_{what}",
            title=title,
            how=f"the same traffic with a tenth fewer {what} tokens in each request",
            requests=len(ground.replayed),
            of=len(ground.replayed),
            quality=NOT_EVALUATED,
            configuration=do,
        )
        if ground.basis is not None:
            recorded = [_shortened(each, what) for each in ground.basis.recorded]
            lever = ground.on_machine(lever, ground.basis.machine, recorded)
        if ground.elsewhere:
            savings = [_tenth_of(each, what) for each in ground.elsewhere]
            lever = ground.saving(lever, ground.elsewhere, savings)
        found.append(lever)
    return found


def another_place(ground: Ground) -> list[Lever]:
    """The cheapest place that `millicent plan where` knows for this traffic, beside what it costs now."""
    replayed = ground.replayed
    if not ground.places or not replayed or ground.bill is None:
        return []
    name, there = min(ground.places.items(), key=lambda place: place[1])
    saved = ground.bill - there
    if saved.nanousd <= 0:
        return []
    span_ns = replayed[-1].arrival.at_ns - replayed[0].arrival.at_ns
    expected = Money(round(Fraction(saved.nanousd * span_ns, HOURS_PER_MONTH * NS_PER_HOUR)))
    return [
        Lever(
            name="another_place",
            title=f"Run it at {name}",
            how="what the whole ledger's traffic costs a month at each place, whole machines and all",
            requests=len(replayed),
            of=len(replayed),
            quality=NOT_EVALUATED,
            configuration="see `millicent plan where`",
            saved=Estimate(expected),
            notes=("A comparison of bills, without an interval: machines cost the same however much they do.",),
        )
    ]


def _tenth_of(each: Recorded, what: str) -> int:
    """Nano-dollars. Of input, of what is paid in full."""
    tokens = each.arrival.output_tokens if what == "output" else each.receipt.usage.tokens(Leaf.INPUT_FRESH) or 0
    return round(tokens * _SHORTER * (price_of(each, what) or 0) * _NANOUSD)


def _shortened(each: Recorded, what: str) -> Recorded:
    kept, arrival = 1 - _SHORTER, each.arrival
    if what == "input":
        tokens = max(1, round(arrival.input_tokens * kept))
        prefix = tuple((end, name) for end, name in arrival.prefix if end <= tokens)
        changed = msgspec.structs.replace(arrival, input_tokens=tokens, prefix=prefix)
    else:
        drafted, accepted = (int(count * kept) for count in arrival.guessed)
        tokens = max(1, round(arrival.output_tokens * kept))
        changed = msgspec.structs.replace(arrival, output_tokens=tokens, guessed=(drafted, accepted))
    return msgspec.structs.replace(each, arrival=changed)


def _as_quick_as(ground: Ground, fit: StepTimeFit) -> Machine:
    """And as much slower than that fit as the own engine is than its own."""
    assert ground.basis is not None
    costs = slower(Coefficients.of(fit), ground.basis.calibration.pace)
    return msgspec.structs.replace(ground.basis.machine, coefficients=costs)


def _newest_by(fits: Iterable[StepTimeFit], key: Callable[[StepTimeFit], str]) -> dict[str, StepTimeFit]:
    return {key(fit): fit for fit in sorted(fits, key=lambda each: each.fitted_at_ns)}


def _cheapest_of(smaller: str, larger: str) -> str:
    return f'[routing.cheaper]\nkind = "cheapest"\nmodels = ["{smaller}", "{larger}"]'


def _setting(part: str) -> str:
    name, _, value = part.partition("=")
    return f"{name} = {value}" if value.isdecimal() or value in {"true", "false"} else f'{name} = "{value}"'
