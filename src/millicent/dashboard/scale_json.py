"""What `millicent replay --json`, `millicent plan scale --json` and `millicent plan cheaper --json` print."""

from __future__ import annotations

from typing import Any

import msgspec

from millicent.core.money import exact_usd
from millicent.dashboard.plan_json import ms
from millicent.economics.basis import Basis
from millicent.economics.levers import Cheaper, Estimate, Lever
from millicent.economics.outcomes import Latencies, Latency, Outcome
from millicent.economics.scaling import Scale


def basis_body(basis: Basis) -> dict[str, Any]:
    """Where the simulated machine's behaviour comes from, and how good it is."""
    machine, rates = basis.machine, basis.rates
    return {
        "placement": basis.placement,
        "model": basis.model,
        "answers": len(basis.recorded),
        "step_time_version": basis.fit.version,
        "step_time_error": basis.fit.error,
        "pace": basis.calibration.pace,
        "outside_steps_ms": {
            "entry": ms(machine.entry_ns),
            "between_steps": ms(machine.gap_ns),
            "exit": ms(machine.exit_ns),
        },
        "errors": None if basis.fidelity is None else msgspec.to_builtins(basis.fidelity),
        "kv_tokens": machine.kv_blocks * machine.block_tokens,
        "kv_tokens_known": basis.memory_known,
        "usd_per_hour": None if rates.hour is None else f"{rates.hour:f}",
        "receipts_usd_per_hour": None if rates.receipt is None else f"{rates.receipt:f}",
    }


def outcome_body(found: Outcome) -> dict[str, Any]:
    return {
        "machines": found.machines,
        "requests": found.requests,
        "answered": found.answered,
        "refused": found.refused,
        "seconds": found.wall_ns / 1e9,
        "busy_seconds": found.busy_ns / 1e9,
        "utilization": round(found.utilization, 6),
        "kv_peak": round(found.kv_peak, 6),
        "preemptions": found.preemptions,
        "tokens": {"input": found.input_tokens, "cached": found.cached_tokens, "output": found.output_tokens},
        "latency_ms": latencies_body(found.latency),
        "in_time": found.in_time,
        "busy_cost_usd": exact_usd(found.busy_cost),
        "wall_cost_usd": exact_usd(found.wall_cost),
        "provenance": "estimated",
    }


def latencies_body(found: Latencies) -> dict[str, Any]:
    return {name: _latency(getattr(found, name)) for name in found.__struct_fields__}


def scale_body(found: Scale, basis: Basis | None) -> dict[str, Any]:
    return {
        "object": "plan.scale",
        "elsewhere": found.elsewhere,
        "model": found.model,
        "placement": found.placement,
        "answers": found.recorded,
        "engine": None if basis is None else basis_body(basis),
        "requests_per_month": found.requests_per_month,
        "stretch": {"requests": found.stretch, "seconds": found.stretch_ns / 1e9},
        "latency_target_ms": ms(found.target_ns),
        "latency_target_provenance": found.target_provenance,
        "on_present_machines": [
            {"multiple": rung.multiple, "p95_wait_ms": ms(rung.p95_wait_ns)} | outcome_body(rung.outcome)
            for rung in found.ladder
        ],
        "breaks": [msgspec.to_builtins(each) for each in found.breaks],
        "scaled": [
            {
                "multiple": each.multiple,
                "machines": each.machines,
                "p95_wait_ms": ms(each.p95_wait_ns),
                "requests_per_month": each.requests_per_month,
                "busy_cost_per_month_usd": exact_usd(each.busy_cost_per_month),
                "wall_cost_per_month_usd": exact_usd(each.wall_cost_per_month),
                "outcome": None if each.outcome is None else outcome_body(each.outcome),
            }
            for each in found.scaled
        ],
    }


def cheaper_body(found: Cheaper, basis: Basis | None) -> dict[str, Any]:
    return {
        "object": "plan.cheaper",
        "requests": found.requests,
        "of": found.of,
        "seconds": found.span_ns / 1e9,
        "cost_usd": str(found.cost),
        "device_seconds": found.device_ns / 1e9,
        "engine": None if basis is None else basis_body(basis),
        "levers": [_lever(found, each) for each in found.levers],
        "realised": [
            {"name": each.name, "requests": each.requests, "saved_usd": str(each.saved), "provenance": "estimated"}
            for each in found.realised
        ],
        "measured": [
            {
                "lever": each.lever,
                "requests_with": each.with_lever,
                "requests_without": each.without,
                "unpriced": each.unpriced,
                "saved_usd": _estimate(found, each.saved),
                "predicted_usd": str(each.reckoned),
                "provenance": "unknown" if each.saved is None else "estimated",
            }
            for each in found.measured
        ],
    }


def _lever(found: Cheaper, lever: Lever) -> dict[str, Any]:
    latency = lever.latency
    return {
        "name": lever.name,
        "title": lever.title,
        "on": lever.on,
        "requests": lever.requests,
        "of": lever.of,
        "saved_usd": _estimate(found, lever.saved),
        "capacity_freed_usd": _estimate(found, lever.freed),
        "capacity_freed_seconds": None if lever.freed_ns is None else lever.freed_ns / 1e9,
        "share": lever.share,
        "total_ms": None
        if latency is None
        else {
            "mean": {"before": ms(latency.mean_before_ns), "after": ms(latency.mean_after_ns)},
            "p95": {"before": ms(latency.p95_before_ns), "after": ms(latency.p95_after_ns)},
        },
        "quality": lever.quality,
        "needs": lever.needs,
        "how": lever.how,
        "configuration": lever.configuration,
        "notes": list(lever.notes),
        "provenance": "unknown" if lever.needs is not None else "estimated",
    }


def _estimate(found: Cheaper, amount: Estimate | None) -> dict[str, str | None] | None:
    if amount is None:
        return None
    return {
        "expected": str(amount.expected),
        "low": exact_usd(amount.low),
        "high": exact_usd(amount.high),
        "a_month": str(found.monthly(amount.expected)),
    }


def _latency(found: Latency | None) -> dict[str, float | None] | None:
    return None if found is None else {name: ms(getattr(found, name)) for name in found.__struct_fields__}
