"""How long a request would wait for its answer, given what is there already.

By the step-time model: what is left of the prompts that came before, then a place beside those that run, then the
request's own steps. Nothing is learned from earlier waits, so that a queue that is gone delays nobody.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from millicent.core.receipts import Receipt
from millicent.core.usage import Leaf
from millicent.meter.durations import fitted_times
from millicent.step_time import Coefficients, Work

_PERMILLE = 1000
_FADING = 64
_SCALE = 1 << 10  # so that fading rounds nothing away


class Beside(msgspec.Struct, frozen=True):
    """A request that is there already: its prompt, what its output is expected to be and has been. Until it has
    `begun`, its prompt is still to be computed."""

    input_tokens: int
    output_tokens: int
    made_tokens: int = 0
    begun: bool = False
    sequences: int = 1


class Wait(msgspec.Struct, frozen=True):
    """Nanoseconds until the answer (its first token, if `streamed`): on an idle machine, and as things are."""

    alone_ns: int
    forecast_ns: int


class Waits:
    """`fit` gives a model's coefficients, where there are any; `slots` is how many sequences run side by side."""

    def __init__(self, fit: Callable[[str], Coefficients | None], slots: int) -> None:
        self._fit = fit
        self._slots = slots
        self._cached: dict[str, tuple[int, int]] = {}  # tokens of prompts found in caches, and all of them; fading

    def learn(self, receipt: Receipt) -> None:
        """What part of prompts needn't be computed."""
        read = receipt.usage.input_tokens
        if read:
            found = receipt.usage.tokens(Leaf.INPUT_CACHE_READ) or 0
            cached, whole = self._cached.get(receipt.model, (0, 0))
            self._cached[receipt.model] = (
                cached - cached // _FADING + found * _SCALE,
                whole - whole // _FADING + read * _SCALE,
            )

    def forecast(self, model: str, mine: Beside, others: Sequence[Beside], *, streamed: bool) -> Wait | None:
        """None where nobody knows what steps take."""
        fit = self._fit(model)
        if fit is None:
            return None
        cached, whole = self._cached.get(model, (0, 0))
        fresh = _PERMILLE - cached * _PERMILLE // whole if whole else _PERMILLE

        def own_ns(batch: int) -> int:
            tokens = mine.input_tokens * fresh // _PERMILLE
            _, first_ns, total_ns = fitted_times(fit, tokens, mine.output_tokens, batch)
            return first_ns if streamed else total_ns

        prompts_ns = sum(
            fitted_times(fit, other.input_tokens * fresh // _PERMILLE, 1, 1)[1] for other in others if not other.begun
        )
        batch = min(self._slots, sum(other.sequences for other in others) + 1)
        return Wait(own_ns(1), prompts_ns + self._place_ns(fit, others, batch) + own_ns(batch))

    def _place_ns(self, fit: Coefficients, others: Sequence[Beside], batch: int) -> int:
        """Until one of the places is free."""
        left = sorted(
            max(1, other.output_tokens - other.made_tokens) for other in others for _ in range(other.sequences)
        )
        ahead = len(left) - self._slots
        if ahead < 0:
            return 0
        context = sum(other.input_tokens + other.made_tokens for other in others)
        return left[ahead] * int(fit.step_ns(Work(batch, batch, context, 0)))
