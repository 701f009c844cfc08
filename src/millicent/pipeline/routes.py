"""Requests to a routing policy: its models are looked at, one is chosen, and what that saved is counted."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import msgspec

from millicent.core.errors import MillicentError
from millicent.core.holdouts import Arm
from millicent.core.money import Money
from millicent.core.receipts import Receipt, Status
from millicent.core.request import Request
from millicent.core.usage import Provenance
from millicent.meter.quotes import Asked
from millicent.pipeline.answer import Answer
from millicent.pipeline.deployments import Deployment, Deployments, may_run, not_allowed
from millicent.pipeline.estimates import Estimates
from millicent.routing.policies import Candidate, Decision, Policies, Policy

Look = Callable[[Request, Deployment], Awaitable[Asked]]
"""A request as one deployment would run it. Raises why it can't. Nothing is spent."""

# Beside `policies.CHOSEN`: whose answer it was in the end, and what that is compared with.
ANSWERED_BY, STRONGEST, SAVED_PROVENANCE = "answered_by", "strongest", "saved_provenance"


class Routes:
    """The policies, with where their models run. A feature's allowed placements bound every candidate."""

    def __init__(self, policies: Policies, deployments: Deployments, look: Look, estimates: Estimates) -> None:
        self.policies = policies
        self._deployments = deployments
        self._look = look
        self._estimates = estimates

    async def decide(
        self, policy: Policy, request: Request, allowed: frozenset[str] | None, arm: Arm | None
    ) -> Decision:
        """Raises why none of the policy's models may be asked."""
        models = policy.config.models
        return policy.decide(request, [await self._candidate(request, model, allowed) for model in models], arm)

    def with_savings(self, receipt: Receipt, answer: Answer) -> Receipt:
        """A closed receipt with the lever `routing`: the strongest model's list price for the same output, without
        caches, less what was paid and what other levers saved. All attempts count, so that a cascade that escalates
        saves less than nothing. Left alone where either price isn't known."""
        decision = answer.decision
        if decision is None:
            return receipt
        strongest = self.policies.models_of(decision.policy)[-1]
        told = {ANSWERED_BY: answer.answered_by, STRONGEST: strongest}
        policy = (receipt.policy or {}) | told
        receipt = msgspec.structs.replace(receipt, policy=policy)
        ours = [line.amount for line in receipt.lines if line.attempt > 0 and line.book == "actual"]
        paid = [amount for amount in ours if amount is not None]
        listed = self._listed(receipt, decision, answered_by_strongest=answer.answered_by == strongest)
        if receipt.status is not Status.SUCCEEDED or listed is None or len(paid) < len(ours):
            return receipt
        saved = listed - Money.total(paid) - Money.total(receipt.saved.values())
        if not saved.nanousd:
            return receipt
        return msgspec.structs.replace(
            receipt,
            list_price=listed,
            saved={"routing": saved, **receipt.saved},
            policy=policy | {SAVED_PROVENANCE: Provenance.ESTIMATED.value},
        )

    def _listed(self, receipt: Receipt, decision: Decision, *, answered_by_strongest: bool) -> Money | None:
        if answered_by_strongest:
            return receipt.list_price
        written = receipt.usage.output_tokens
        if decision.reference is None or written is None:
            return None
        return self._estimates.list_price(decision.reference, written)

    async def _candidate(self, request: Request, model: str, allowed: frozenset[str] | None) -> Candidate:
        wanted = msgspec.structs.replace(request, model=model)
        feature = request.attribution.feature
        found: list[Asked] = []
        refusal: MillicentError | None = None
        try:
            for deployment in self._deployments.in_order(model, allowed, feature):
                try:
                    asked = await self._look(wanted, deployment)
                except MillicentError as error:
                    refusal = refusal or error
                    continue
                if may_run(asked.placement.name, allowed):
                    found.append(asked)
                else:
                    refusal = refusal or not_allowed(feature, allowed, model, [asked.placement.name])
        except MillicentError as error:
            refusal = error
        if not found:
            return Candidate(model, refusal=refusal)
        quoted = [(self._estimates.quote(asked), asked) for asked in found]
        priced = [each for each in quoted if each[0].cost is not None] or quoted
        quote, asked = min(priced, key=lambda each: 0 if each[0].cost is None else each[0].cost.expected.nanousd)
        return Candidate(model, asked, quote)
