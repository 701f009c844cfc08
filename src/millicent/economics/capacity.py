"""What one machine can carry of this traffic, and how that is known. What nobody measured or stated is not known."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import msgspec

from millicent.core.clock import NS_PER_HOUR, NS_PER_MS, iso_utc
from millicent.core.fits import StepTimeFit
from millicent.core.tallies import nearest_rank
from millicent.core.usage import Leaf, Provenance, Usage
from millicent.economics.machines import MachineConfig
from millicent.economics.traffic import Ran, Spread
from millicent.step_time import Coefficients


class Capacity(msgspec.Struct, frozen=True):
    """Requests an hour, of one machine, and one line that says where the figure comes from."""

    requests_per_hour: int
    provenance: Provenance
    how: str


class Slots(msgspec.Struct, frozen=True):
    """How many sequences run side by side in the embedded engine, and the most rows of one step."""

    sequences: int
    step_tokens: int


def measured(ran: Ran, target_ns: int | None) -> Capacity | None:
    """The most answers of one hour whose 95th percentile met the target. A floor: nobody may have asked for more."""
    met = [hour for hour in ran.hours if target_ns is None or (hour.p95_ns is not None and hour.p95_ns <= target_ns)]
    if not met:
        return None
    best = max(met, key=lambda hour: hour.answers)
    return Capacity(
        best.answers,
        Provenance.MEASURED,
        f"at least: its best hour began {iso_utc(best.start_ns)[:16]}Z" + _in_time(target_ns),
    )


def back_to_back(ran: Ran, accelerators: int, target_ns: int | None) -> Capacity | None:
    """As many answers as an hour holds of the device time that one took here on average.

    Device time is of all accelerators. What others shared is told apart in it; seen alone, answers cost the most, so
    that light traffic errs towards too little. With a target, the hour is filled only so far that it is still met: on a
    machine shared evenly answers take 1 / (1 - busy) times as long on average (M/G/1 processor sharing), so busy = 1 -
    p95 / target. The p95 is that of all or of the busiest hour, whichever is longer. None where it misses the target.
    """
    if not ran.serving_ns:
        return None
    per_hour = NS_PER_HOUR * accelerators / ran.serving_ns
    took = f"an answer takes {_ms(ran.serving_ns)} ms of device time here"
    if target_ns is None:
        return Capacity(
            int(per_hour), Provenance.ESTIMATED, f"{took}, and an hour holds so many; queues grow before that"
        )
    p95_ns = _p95_ns(ran)
    if p95_ns is None or p95_ns >= target_ns:
        return None
    busy = 1 - Fraction(p95_ns, target_ns)
    how = f"{took}; at most {float(busy):.1%} busy{_in_time(target_ns)}"
    return Capacity(int(per_hour * busy), Provenance.ESTIMATED, how)


def modelled(fit: StepTimeFit, usages: Sequence[Usage], slots: Slots, target_ns: int | None) -> Capacity | None:
    """What the step-time model gives when as many sequences run side by side as still meet the target, queue apart.

    With n sequences, each in d steps, a step does n/d of a request's work: t(n) = c0 + max(w, a rows n/d) + n/d (s
    sampled + k kv + p pairs), and n / (d t(n)) requests are answered in a unit of time. None where even one alone is
    too late.
    """
    if not usages:
        return None
    works = [_work(usage, slots.step_tokens) for usage in usages]
    steps, rows, sampled, kv, pairs = (sum(each[i] for each in works) / len(works) for i in range(5))
    ordered = sorted(each[0] for each in works)
    steps_p95 = nearest_rank(ordered, 95)
    costs = Coefficients.of(fit)
    own_ns = costs.sampled_row_ns * sampled + costs.kv_token_ns * kv + costs.pair_ns * pairs
    best = None
    for n in range(1, slots.sequences + 1):
        part = n / steps
        if n > 1 and rows * part > slots.step_tokens:
            break
        step_ns = costs.fixed_ns + max(costs.weights_ns, costs.row_ns * rows * part) + own_ns * part
        if step_ns <= 0 or (target_ns is not None and steps_p95 * step_ns > target_ns):
            break
        best = n, part / step_ns
    if best is None:
        return None
    n, per_ns = best
    how = f"step-time model {fit.version}, {n} side by side{_in_time(target_ns)}; queues grow before that"
    return Capacity(int(per_ns * NS_PER_HOUR), Provenance.ESTIMATED, how)


def stated(machine: MachineConfig, output_tokens: Spread | None) -> Capacity | None:
    """What the user says of it."""
    if machine.requests_per_hour is not None:
        return Capacity(int(machine.requests_per_hour), Provenance.ASSUMED, "stated: requests_per_hour")
    if machine.output_tokens_per_s is None or output_tokens is None or not output_tokens.mean:
        return None
    per_hour = Fraction(machine.output_tokens_per_s) * 3600 / output_tokens.mean
    how = f"stated: {machine.output_tokens_per_s:f} output tokens/s, {round(output_tokens.mean)} a request"
    return Capacity(int(per_hour), Provenance.ASSUMED, how)


def best(*found: Capacity | None) -> Capacity | None:
    """What was measured is a floor: where something says more, more is possible. Of equals, the first."""
    known = [each for each in found if each is not None and each.requests_per_hour > 0]
    return max(known, key=lambda each: each.requests_per_hour, default=None)


def _p95_ns(ran: Ran) -> int | None:
    """Of all answers, or of the busiest hour that it is known of if that was slower."""
    known = [hour for hour in ran.hours if hour.p95_ns is not None]
    busiest = max(known, key=lambda hour: hour.answers, default=None)
    seen = (None if ran.total_ns is None else ran.total_ns.p95, None if busiest is None else busiest.p95_ns)
    return max((each for each in seen if each is not None), default=None)


def _ms(ns: Fraction) -> str:
    ms = float(ns / NS_PER_MS)
    return f"{ms:,.0f}" if ms >= 10 else f"{ms:.2g}"


def _in_time(target_ns: int | None) -> str:
    return "" if target_ns is None else f", 95 in 100 within {target_ns // 1_000_000} ms"


def _work(usage: Usage, step_tokens: int) -> tuple[int, int, int, int, int]:
    """Steps, rows, rows sampled, KV tokens read while decoding, and prefill pairs of one request."""
    cached = usage.tokens(Leaf.INPUT_CACHE_READ) or 0
    fresh = (usage.input_tokens or 0) - cached
    output = usage.output_tokens or 0
    decoded = max(output - 1, 0)
    kv = decoded * (cached + fresh) + decoded * (decoded + 1) // 2
    pairs = fresh * cached + fresh * (fresh + 1) // 2
    return max(decoded + -(-fresh // step_tokens), 1), fresh + decoded, max(output, 1), kv, pairs
