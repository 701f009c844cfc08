"""The plans as JSON: what `millicent plan --json` prints and `/v1/plan/...` answers."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import msgspec

from millicent.core.clock import iso_utc
from millicent.core.money import Money, exact_usd
from millicent.economics.estimate import Estimated, Scenario
from millicent.economics.places import Place
from millicent.economics.scenarios import Outcome, Saved
from millicent.economics.standing import Standing, Tick, band_words
from millicent.economics.traffic import Spread, Traffic
from millicent.economics.where import Where, verdict


def where_body(found: Where) -> dict[str, Any]:
    rule = found.rule
    return {
        "object": "plan.where",
        "traffic": traffic_body(found.traffic),
        "requests_per_month": found.volume,
        "verdict": verdict(found) or None,
        "latency_target_ms": found.asked.latency_target_ms,
        "spares": found.asked.spares,
        "spent_usd": exact_usd(found.spent),
        "accounts_spent_usd": exact_usd(found.accounts_spent),
        "places": [_place_body(each) for each in found.places],
        "cheapest": [{"from": each.from_volume, "to": each.to_volume, "place": each.name} for each in found.cheapest],
        "up_to": found.up_to,
        "break_evens": [
            {
                "machine": each.machine,
                "api": each.api,
                "pays_from": each.pays_from,
                "pays_always_from": each.pays_always_from,
                "one_machine_pays_from_utilization": ratio(each.utilization),
                "crossings": [
                    {"at": each_range.from_volume, "cheaper": each_range.name} for each_range in each.ranges[1:]
                ],
                "up_to": each.up_to,
            }
            for each in found.break_evens
        ],
        "sensitivities_of": found.sensitive,
        "sensitivities": [
            {"what": each.what, "pays_from": each.pays_from, "pays_always_from": each.pays_always_from}
            for each in found.sensitivities
        ],
        "rule_of_thumb": {
            "verdict": rule.verdict,
            "api_below_1m": rule.below,
            "self_host_above_100m": rule.above,
            "api_usd_at": [exact_usd(amount) for amount in rule.api_at],
            "machine_usd_at": [exact_usd(amount) for amount in rule.machine_at],
        },
    }


def traffic_body(traffic: Traffic) -> dict[str, Any]:
    return {
        "from": iso_utc(traffic.from_ns),
        "to": iso_utc(traffic.to_ns),
        "hours": traffic.hours,
        "requests": traffic.requests,
        "requests_per_month": traffic.monthly,
        "busiest_hour_requests": traffic.busiest,
        "peak": ratio(traffic.peak),
        "input_tokens": _spread_body(traffic.input_tokens),
        "output_tokens": _spread_body(traffic.output_tokens),
        "input_from_caches": ratio(traffic.cached),
        "answers_looked_at": len(traffic.usages) + traffic.unknown,
        "unknown_usage": traffic.unknown,
        "provenance": traffic.provenance,
    }


def _spread_body(found: Spread | None) -> dict[str, Any] | None:
    return None if found is None else {"mean": ratio(found.mean), "p50": found.p50, "p95": found.p95}


def _place_body(place: Place) -> dict[str, Any]:
    capacity = place.capacity
    return {
        "name": place.name,
        "kind": place.kind,
        "model": place.model,
        "monthly_usd": exact_usd(place.monthly),
        "per_request_usd": exact_usd(place.per_request),
        "per_million_tokens_usd": exact_usd(place.per_million_tokens),
        "monthly_without_caches_usd": exact_usd(place.uncached),
        "machines": place.machines,
        "usd_per_hour": None if place.usd_per_hour is None else f"{place.usd_per_hour:f}",
        "capacity": None
        if capacity is None
        else {
            "requests_per_hour": capacity.requests_per_hour,
            "provenance": capacity.provenance,
            "how": capacity.how,
        },
        "utilization": ratio(place.utilization),
        "unused_usd": exact_usd(place.unused),
        "rented_when_needed_usd": exact_usd(place.when_needed),
        "busy": ratio(place.busy),
        "latency_ms": {
            "p50": ms(place.p50_ns),
            "p95": ms(place.p95_ns),
            "provenance": place.latency_provenance,
        },
        "in_time": place.in_time,
        "provenance": place.provenance,
        "source": place.source,
        "notes": list(place.notes),
    }


def ratio(value: Fraction | None) -> float | None:
    """For reading: to a millionth."""
    return None if value is None else round(float(value), 6)


def ms(duration_ns: float | None) -> float | None:
    return None if duration_ns is None else round(duration_ns / 1_000_000, 3)


def estimate_body(scenario: Scenario, found: Sequence[Estimated]) -> dict[str, Any]:
    return {
        "object": "plan.estimate",
        "scenario": _scenario_body(scenario),
        "data": [
            {
                "name": each.name,
                "monthly_usd": {
                    "low": exact_usd(each.low),
                    "expected": exact_usd(each.expected),
                    "high": exact_usd(each.high),
                },
                "per_call_usd": exact_usd(each.per_call),
                "per_user_usd": exact_usd(each.per_user),
                "machines": each.machines,
                "provenance": each.provenance,
                "source": each.source,
                "notes": list(each.notes),
            }
            for each in found
        ],
    }


def saved_body(saved: Saved) -> dict[str, Any]:
    return {
        "name": saved.name,
        "object": "plan.scenario",
        "saved_at": iso_utc(saved.saved_at_ns),
        "scenario": _scenario_body(saved.scenario),
        "expected_usd": {name: f"{amount:f}" for name, amount in saved.expected_usd.items()},
    }


def outcome_body(found: Outcome) -> dict[str, Any]:
    return saved_body(found.saved) | {
        "traffic": traffic_body(found.traffic),
        "beside": [
            {
                "what": each.what,
                "unit": each.unit,
                "expected": _figure(each.unit, each.expected),
                "happened": _figure(each.unit, each.happened),
                "change": ratio(each.change),
            }
            for each in found.beside
        ],
    }


def _scenario_body(scenario: Scenario) -> dict[str, Any]:
    body: dict[str, Any] = msgspec.to_builtins(scenario)
    return body | {"calls_per_month": ratio(scenario.calls_per_month)}


def _figure(unit: str, value: Fraction | None) -> str | float | None:
    """Money as a decimal string, to a nano-dollar."""
    return exact_usd(Money(round(value * 10**9))) if unit == "usd" and value is not None else ratio(value)


def standing_body(found: Standing) -> dict[str, Any]:
    return {
        "object": "plan.standing",
        "traffic": traffic_body(found.traffic),
        "stands": [
            {
                "measure": each.band.measure,
                "industry": each.band.industry,
                "unit": each.band.unit,
                "value": _figure(each.band.unit, each.value),
                "stands": each.where,
                "bands": dict(zip(("behind", "typical", "leading"), band_words(each.band), strict=True)),
                "evidence": each.evidence,
            }
            for each in found.stands
        ],
        "checklist": [_tick_body(each) for each in found.ticks],
        "next_step": None if found.next_step is None else _tick_body(found.next_step),
        "without_model": [
            {
                "feature": each.feature,
                "what": each.what,
                "without_usd": exact_usd(each.without),
                "with_usd": exact_usd(each.with_model),
                "of": each.of,
                "saved_usd": exact_usd(each.saved),
                "outcomes": each.outcomes,
            }
            for each in found.without
        ],
    }


def _tick_body(tick: Tick) -> dict[str, Any]:
    body: dict[str, Any] = msgspec.to_builtins(tick)
    return body
