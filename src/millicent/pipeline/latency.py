"""`X-Millicent-Latency-Target-Ms`: refused before anything is spent where it can't be met, told on the receipt else.

The target is for what the caller waits for: the first token where the answer is streamed, else the whole of it.
"""

from __future__ import annotations

from millicent.core.clock import NS_PER_MS, NS_PER_S
from millicent.core.errors import RateLimited
from millicent.core.receipts import Receipt
from millicent.meter.waits import Wait

TARGET_HEADER = "x-millicent-latency-target-ms"
_TARGET, _MET = "latency_target_ms", "latency_target_met"
# Where not even an idle machine would do, what could change that takes longer than a queue.
_HOPELESS_RETRY_S = 60
_TRIAL_EVERY_NS = 60 * NS_PER_S


class Trials:
    """Second chances. What a fit makes hopeless would never run again, so nothing would ever correct a fit that a bad
    moment of the machine's has spoiled: now and then one request that meets an idle model runs all the same."""

    def __init__(self) -> None:
        self._last_ns: dict[str, int] = {}

    def due(self, model: str, now_ns: int) -> bool:
        """Whether this hopeless request is the one that runs. `now_ns` is monotonic."""
        if now_ns - self._last_ns.setdefault(model, now_ns) < _TRIAL_EVERY_NS:
            return False
        self._last_ns[model] = now_ns
        return True


def check_target(target_ms: int, wait: Wait, beside: int) -> None:
    """Raises RateLimited, with how long to wait, when the target cannot be met beside so many others."""
    if wait.alone_ns > target_ms * NS_PER_MS:
        raise _refusal(target_ms, wait.alone_ns, "even with the machine to itself", _HOPELESS_RETRY_S)
    late_ns = wait.forecast_ns - target_ms * NS_PER_MS
    if late_ns > 0:
        raise _refusal(target_ms, wait.forecast_ns, f"beside {beside} others", -(-late_ns // NS_PER_S))


def policy_of(target_ms: int | None) -> dict[str, str] | None:
    """What the receipt says of the target when it is opened."""
    return None if target_ms is None else {_TARGET: str(target_ms)}


def with_verdict(receipt: Receipt) -> dict[str, str] | None:
    """The receipt's policy, once it is known whether its target was met."""
    policy = receipt.policy
    if policy is None or _TARGET not in policy:
        return policy
    took_ns = receipt.timing.ttft_ns if receipt.stream else receipt.timing.total_ns
    met = took_ns is not None and took_ns <= int(policy[_TARGET]) * NS_PER_MS
    return policy | {_MET: str(met).lower()}


def _refusal(target_ms: int, forecast_ns: int, where: str, retry_after_s: int) -> RateLimited:
    return RateLimited(
        f"This would take about {max(1, forecast_ns // NS_PER_MS)} ms {where}, and its latency target is"
        f" {target_ms} ms: retry later, ask for less, or raise `X-Millicent-Latency-Target-Ms`.",
        param=TARGET_HEADER,
        code="latency_target_unreachable",
        retry_after_s=retry_after_s,
    )
