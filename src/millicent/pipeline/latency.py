"""`X-Millicent-Latency-Target-Ms`: whether it can be met, told before anything is spent.

The target is for what the caller waits for: the first token where the answer is streamed, else the whole of it. The
forecast is the step-time model's: what is left of the prompts that came before, then a place beside those that run,
then the request's own steps. Nothing is learned from earlier waits, so that a queue that is gone refuses nobody.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from millicent.core.clock import NS_PER_MS, NS_PER_S
from millicent.core.errors import RateLimited
from millicent.core.receipts import Receipt
from millicent.core.usage import Leaf
from millicent.meter.durations import fitted_times
from millicent.step_time import Coefficients, Work

TARGET_HEADER = "x-millicent-latency-target-ms"
# Where not even an idle machine would do, what could change that takes longer than a queue.
_HOPELESS_RETRY_S = 60
_FADING = 64


class Beside(msgspec.Struct, frozen=True):
    """A request that is there already: its prompt, what its output is expected to be and has been. Until it has
    `begun`, its prompt is still to be computed."""

    input_tokens: int
    output_tokens: int
    made_tokens: int
    begun: bool
    sequences: int = 1


class LatencyTargets:
    """`slots` is how many sequences the engine runs side by side."""

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._cached: dict[str, tuple[float, float]] = {}  # tokens of prompts found in caches, and all of them; fading

    def learn(self, receipt: Receipt) -> None:
        """What part of prompts needn't be computed."""
        usage = receipt.usage
        if usage.input_tokens:
            cached, whole = self._cached.get(receipt.model, (0.0, 0.0))
            keep = 1 - 1 / _FADING
            found = usage.tokens(Leaf.INPUT_CACHE_READ) or 0
            self._cached[receipt.model] = (cached * keep + found, whole * keep + usage.input_tokens)

    def check(self, target_ms: int, model: str, fit: Coefficients, mine: Beside, others: Sequence[Beside], *,
              streamed: bool) -> None:  # fmt: skip
        """Raises RateLimited, with how long to wait, when the target cannot be met."""
        cached, whole = self._cached.get(model, (0.0, 0.0))
        fresh = 1 - cached / whole if whole else 1.0
        alone_ns = self._own_ns(fit, mine, 1, fresh, streamed=streamed)
        if alone_ns > target_ms * NS_PER_MS:
            raise _refusal(target_ms, alone_ns, "even with the machine to itself", _HOPELESS_RETRY_S)
        batch = min(self._slots, sum(other.sequences for other in others) + 1)
        wait_ns = self._wait_ns(fit, others, batch, fresh)
        forecast_ns = wait_ns + self._own_ns(fit, mine, batch, fresh, streamed=streamed)
        late_ns = forecast_ns - target_ms * NS_PER_MS
        if late_ns > 0:
            raise _refusal(target_ms, forecast_ns, f"beside {len(others)} others", -(-late_ns // NS_PER_S))

    def _own_ns(self, fit: Coefficients, mine: Beside, batch: int, fresh: float, *, streamed: bool) -> int:
        _, first_ns, total_ns = fitted_times(fit, int(mine.input_tokens * fresh), mine.output_tokens, batch)
        return first_ns if streamed else total_ns

    def _wait_ns(self, fit: Coefficients, others: Sequence[Beside], batch: int, fresh: float) -> int:
        """Until the others' prompts are computed and a place is free."""
        prompts = (fitted_times(fit, int(other.input_tokens * fresh), 1, 1)[1] for other in others if not other.begun)
        return sum(prompts) + self._place_ns(fit, others, batch)

    def _place_ns(self, fit: Coefficients, others: Iterable[Beside], batch: int) -> int:
        left = sorted(
            max(1, other.output_tokens - other.made_tokens) for other in others for _ in range(other.sequences)
        )
        ahead = len(left) - self._slots
        if ahead < 0:
            return 0
        context = sum(other.input_tokens + other.made_tokens for other in others)
        return left[min(ahead, len(left) - 1)] * int(fit.step_ns(Work(batch, batch, context, 0)))


def told(receipt: Receipt) -> dict[str, str] | None:
    """The receipt's policy, once it is known whether its target was met."""
    policy = receipt.policy
    if policy is None or "latency_target_ms" not in policy:
        return policy
    took_ns = receipt.timing.ttft_ns if receipt.stream else receipt.timing.total_ns
    met = took_ns is not None and took_ns <= int(policy["latency_target_ms"]) * NS_PER_MS
    return policy | {"latency_target_met": str(met).lower()}


def _refusal(target_ms: int, forecast_ns: int, where: str, retry_after_s: int) -> RateLimited:
    return RateLimited(
        f"This would take about {max(1, round(forecast_ns / NS_PER_MS))} ms {where}, and its latency target is"
        f" {target_ms} ms: retry later, ask for less, or raise `X-Millicent-Latency-Target-Ms`.",
        param=TARGET_HEADER,
        code="latency_target_unreachable",
        retry_after_s=retry_after_s,
    )
