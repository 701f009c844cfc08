"""A cheap model first, and a stronger one where its answer isn't verified: all attempts on one receipt."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import msgspec

from millicent.core.chunks import End, FinishReason, Text
from millicent.core.clock import Clock
from millicent.core.errors import MillicentError
from millicent.core.money import Money
from millicent.core.receipts import Role
from millicent.core.request import Request
from millicent.pipeline.answer import Answer
from millicent.pipeline.attempts import Journey, Leg, Planner
from millicent.pipeline.deployments import Deployments
from millicent.routing.checks import Checks, approves
from millicent.routing.policies import VERIFIED

ESCALATED = "escalated"


class Cascade(Journey):
    """`stages` are asked in order, and each one's answer held back until it is verified; the last one's goes straight
    out. A stage that fails is followed as any model that fails, then by the next stage. Where nobody stronger can be
    asked, for want of money, time or a healthy deployment, the answer that wasn't verified is given, and called so.
    """

    def __init__(
        self, request: Request, stages: Sequence[str], checks: Checks, deployments: Deployments, planner: Planner,
        clock: Clock, random: Random, allowed: frozenset[str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(request, deployments, planner, clock, random, allowed)
        self._asked = request
        self._stages = list(stages[1:])
        self._checks = checks
        self._standing: tuple[tuple[Text, ...], End] | None = None  # the answer that is given unless a better one comes
        self._why: str | None = None  # the next stage is to be asked
        self._escalated: str | None = None  # it was
        self._verified = False
        self._holds = False  # what the attempt that runs says
        self._set_logprobs()

    async def first(self) -> Leg:
        while True:
            try:
                return await super().first()
            except MillicentError:
                if not self._stages:
                    raise
            self._turn_to_next_stage()

    def begun(self, answer: Answer, leg: Leg) -> None:
        if leg.role is not Role.VERIFICATION:
            self._standing, self._escalated = None, self._why
        self._holds = bool(self._stages) or leg.role is Role.VERIFICATION
        if self._holds:
            answer.hold_back()
        else:
            answer.release(())

    async def following(self, answer: Answer, leg: Leg, end: End, left: Money | None) -> Leg | None:
        if answer.ending:
            return None
        if leg.role is Role.VERIFICATION:
            said = "".join(text.text for text in answer.held())
            self._verified = end.error is None and bool(approves(said))
            return None if self._verified else await self._escalate(answer, "judge", left)
        if end.error is not None:
            found = await super().following(answer, leg, end, left)
            return found or await self._escalate(answer, "failure", left)
        if not self._stages:
            return None
        texts = answer.held()
        self._standing = (texts, end)
        failure = self._checks.failure(texts)
        if failure is None and self._checks.judge is None:
            self._verified = True
            return None
        if failure is None:
            judge = self._checks.asked_of_judge(self._asked, texts)
            try:
                self._turn_to(judge.model)
                return await self._leg(Role.VERIFICATION, left, request=judge)
            except MillicentError:  # nobody can judge: as good as not verified
                failure = "judge"
        return await self._escalate(answer, failure, left)

    def concluded(self, answer: Answer, end: End) -> End:
        if answer.cancelled:
            return end
        if self._standing is None:
            # Cut off by its hold, or failed: what there is of it is all there will be.
            answer.release(() if end.reason is FinishReason.ERROR else self._shown(answer.held()))
            return end
        texts, its_end = self._standing
        answer.release(self._shown(texts))
        return its_end

    def notes(self) -> dict[str, str]:
        verified = str(self._verified).lower() if self._holds else "strongest"
        return {VERIFIED: verified} | ({} if self._escalated is None else {ESCALATED: self._escalated})

    async def _escalate(self, answer: Answer, why: str, left: Money | None) -> Leg | None:
        while self._stages and not answer.begun and not self._is_late():
            self._turn_to_next_stage()
            try:
                leg = await self._leg(Role.FALLBACK, left)
            except MillicentError:
                continue
            self._why = why
            return leg
        return None

    def _turn_to_next_stage(self) -> None:
        self._turn_to(self._stages.pop(0))
        self._set_logprobs()

    def _set_logprobs(self) -> None:
        """They are asked for where they are what an answer is verified by."""
        request = self._asked
        if self._stages and self._checks.needs_logprobs and request.sampling.logprobs is None:
            request = msgspec.structs.replace(request, sampling=msgspec.structs.replace(request.sampling, logprobs=0))
        self._request = request

    def _shown(self, texts: Sequence[Text]) -> tuple[Text, ...]:
        if self._asked.sampling.logprobs is not None:
            return tuple(texts)
        return tuple(msgspec.structs.replace(text, logprobs=()) for text in texts)
