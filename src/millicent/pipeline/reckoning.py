"""Small sums over plans, receipts and errors, as the pipeline needs them."""

from __future__ import annotations

from millicent.core.errors import MillicentError
from millicent.core.money import ZERO, Money
from millicent.core.receipts import Receipt
from millicent.core.usage import Usage
from millicent.meter.waits import Beside
from millicent.pipeline.answer import Answer
from millicent.pipeline.estimates import Plan
from millicent.routing.policies import Decision


def beside_others(plan: Plan) -> Beside:
    sequences = max(1, len(plan.call.sequences))
    return Beside(plan.asked.input_tokens, plan.quote.output_tokens.expected, sequences=sequences)


def as_told(error: Exception) -> MillicentError:
    """What a client is told of it: of a bug, no detail."""
    if isinstance(error, MillicentError):
        return error
    return MillicentError("The server failed while answering: retry, and report this if it happens again.")


def explained(decision: Decision | None) -> dict[str, str]:
    return {} if decision is None else decision.explained()


def tokens_of(usage: Usage) -> int | None:
    read, written = usage.input_tokens, usage.output_tokens
    return None if read is None or written is None else read + written


def most_tokens(plan: Plan) -> int:
    return plan.asked.input_tokens + (plan.call.max_output_tokens or 0)


def cost_so_far(receipt: Receipt, answer: Answer) -> Money | None:
    """With what is reserved for ended attempts of which nobody knows; None where nobody knows of the one that runs."""
    last = receipt.attempts[-1].ordinal
    ours = [line for line in receipt.lines if line.book == "actual"]
    amounts = [line.amount for line in ours if line.amount is not None or line.attempt == last]
    if not amounts or any(amount is None for amount in amounts):
        return None
    return Money.total(amount or ZERO for amount in amounts) + answer.reserved
