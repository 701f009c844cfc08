"""One request's way through deployments: who is asked first, and who next when that failed."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from random import Random

import msgspec

from millicent.core.chunks import End, FinishReason
from millicent.core.clock import NS_PER_S, Clock
from millicent.core.errors import EngineCrashed, Forbidden, MillicentError, UpstreamError, UpstreamTimeout
from millicent.core.money import Money
from millicent.core.protocols import Run
from millicent.core.receipts import Role
from millicent.core.request import Request
from millicent.pipeline.answer import Answer
from millicent.pipeline.config import ModelPolicy
from millicent.pipeline.deployments import Deployment, Deployments, Lease, left_alone, may_run, not_allowed
from millicent.pipeline.estimates import Plan

# The first pause before the same deployment is asked again is up to this long; each further one up to twice as long.
_FIRST_PAUSE_S = 0.5
# Nobody waits longer than this within a request: who is told to wait longer is told so.
LONGEST_PAUSE_S = 30.0

Planner = Callable[[Request, Deployment], Awaitable[Plan]]
"""A request as one deployment would run it. Raises why it can't."""


class Leg(msgspec.Struct, frozen=True):
    """An attempt that may begin."""

    role: Role
    request: Request
    lease: Lease
    plan: Plan


class Journey:
    """`first`, then `following` after each attempt that failed. No more attempts than the model's retries, one for each
    fallback, and the first; all on placements that `allowed` holds.

    An error sends the request to where it wasn't yet. Only one that may pass (`retryable`) sends it to the same
    deployment again, after a pause: as long as that asks for, else jittered and growing. A request during which an
    engine ended isn't given to that engine again: it may be why.
    """

    def __init__(
        self, request: Request, deployments: Deployments, planner: Planner, clock: Clock, random: Random,
        allowed: frozenset[str] | None = None,
    ) -> None:  # fmt: skip
        self._request = request
        self._deployments = deployments
        self._planner = planner
        self._clock = clock
        self._random = random
        self._allowed = allowed
        policy = deployments.policy(request.model)
        self._pauses = 0
        self._failed: dict[Deployment, MillicentError] = {}  # of this model, with the latest error
        self._turn_to(request.model)
        self._ends_at_ns = None if policy.timeout_s is None else clock.monotonic_ns() + int(policy.timeout_s * NS_PER_S)

    @property
    def policy(self) -> ModelPolicy:
        """Of the model that is asked now."""
        return self._deployments.policy(self._model)

    @property
    def maximum(self) -> Money | None:
        return self._request.max_cost

    @property
    def left_s(self) -> float | None:
        """How much is left of the time for everything; None without a limit."""
        return None if self._ends_at_ns is None else (self._ends_at_ns - self._clock.monotonic_ns()) / NS_PER_S

    def began_earlier(self, by_ns: int) -> None:
        """So much of the time for everything had passed before there was anything to try."""
        if self._ends_at_ns is not None:
            self._ends_at_ns -= by_ns

    def _turn_to(self, model: str) -> None:
        """From now on it is this model that is asked, as its own policy says."""
        policy = self._deployments.policy(model)
        self._model = model
        # Vectors of different models can't be compared: nobody asked for another's.
        self._fallbacks = [] if self._request.embedding is not None else list(policy.fallbacks)
        self._retries_left = policy.retries
        self._failed.clear()

    def begun(self, answer: Answer, leg: Leg) -> None:
        """The attempt is durable, and about to run."""

    def concluded(self, answer: Answer, end: End) -> End:
        """The end of the answer, when no other attempt follows the one that ended like this."""
        del answer
        return end

    def notes(self) -> dict[str, str]:
        """What the receipt says of the way, beside its attempts."""
        return {}

    async def first(self) -> Leg:
        """Raises what a client should be told: nothing was spent."""
        why: MillicentError | None = None
        role = Role.INFERENCE
        while True:
            try:
                return await self._leg(role, self._request.max_cost)
            except MillicentError as error:
                why = why or error
                if not _another_may(error) or not self._fallbacks:
                    raise why from None
            self._model, role = self._fallbacks.pop(0), Role.FALLBACK

    async def following(self, answer: Answer, leg: Leg, end: End, left: Money | None) -> Leg | None:
        """None when that is the end of it. `left` is what the caller's maximum leaves for more."""
        error = end.error
        if error is None or answer.begun or answer.ending:
            return None
        if not error.retryable and not isinstance(error, UpstreamError):
            return None
        self._failed[leg.lease.deployment] = error
        if self._retries_left and (found := await self._retry(answer, left)) is not None:
            return found
        while self._fallbacks and not answer.ending and not self._is_late():
            self._model = self._fallbacks.pop(0)
            self._retries_left = 0
            self._failed.clear()
            try:
                return await self._leg(Role.FALLBACK, left)
            except MillicentError:  # it can't either; the error of who was asked is what the client is told
                continue
        return None

    async def _retry(self, answer: Answer, left: Money | None) -> Leg | None:
        others = [each for each in self._deployments.of(self._model) if each not in self._failed]
        found = await self._leg_among(others, left)
        if found is None and (asked_s := min(self._asked_s.values(), default=None)) is not None:
            longest_s = _FIRST_PAUSE_S * 2**self._pauses
            self._pauses += 1
            pause_s = asked_s + self._random.uniform(longest_s / 2, longest_s)
            if not self._is_late(pause_s) and await answer.pause(pause_s):
                again = [each for each, wait_s in self._asked_s.items() if wait_s <= asked_s]
                found = await self._leg_among(again, left)
        if found is not None:
            self._retries_left -= 1
        return found

    async def _leg_among(self, among: list[Deployment], left: Money | None) -> Leg | None:
        if not among or self._is_late():
            return None
        try:
            return await self._leg(Role.RETRY, left, among)
        except MillicentError:  # these can't be asked now; what went wrong before is what the client is told
            return None

    @property
    def _asked_s(self) -> dict[Deployment, int]:
        """Those that failed and may be asked again, with how long they ask to be left alone."""
        return {each: error.retry_after_s or 0 for each, error in self._failed.items() if _may_pass(error)}

    def _is_late(self, pause_s: float = 0.0) -> bool:
        left_s = self.left_s
        return pause_s > LONGEST_PAUSE_S or (left_s is not None and pause_s >= left_s)

    async def _leg(
        self, role: Role, left: Money | None, among: list[Deployment] | None = None, request: Request | None = None
    ) -> Leg:
        """The first that takes it. Raises why none does: rather that it may pass than that it can't be."""
        request = msgspec.structs.replace(request or self._request, model=self._model, max_cost=left)
        feature = request.attribution.feature
        refusals: list[MillicentError] = []
        quoted: list[tuple[Deployment, Plan]] = []
        cheapest = self.policy.balance == "cheapest"
        for deployment in self._deployments.in_order(self._model, self._allowed, feature, among, request):
            try:
                plan = await self._planner(request, deployment)
            except MillicentError as error:
                refusals.append(error)
                continue
            if not may_run(plan.call.placement, self._allowed):
                refusals.append(not_allowed(feature, self._allowed, self._model, [plan.call.placement]))
                continue
            if not cheapest and (lease := deployment.enter()) is not None:
                return Leg(role, request, lease, plan)
            quoted.append((deployment, plan))
        for deployment, plan in sorted(quoted, key=_dearness) if cheapest else ():
            if (lease := deployment.enter()) is not None:
                return Leg(role, request, lease, plan)
        if quoted:  # others were let in while this one was being looked at
            refusals.append(left_alone(self._model, [each for each, _ in quoted]))
        raise next((error for error in refusals if error.retryable), refusals[0])


class Watchdog:
    """Cancels a run that takes too long: in all, to its first chunk, or to the next. One timer, however many chunks."""

    def __init__(self, run: Run, policy: ModelPolicy, left_s: float | None) -> None:
        self._run = run
        self._policy = policy
        self._loop = asyncio.get_running_loop()
        self._ends_at = None if left_s is None else self._loop.time() + left_s
        self._heard_at = self._loop.time()
        self._heard = False
        self._timer: asyncio.TimerHandle | None = None
        self._expired: str | None = None
        self._watch()

    def heard(self) -> None:
        """A chunk has come."""
        self._heard_at = self._loop.time()
        if not self._heard:
            self._heard = True
            self._rearm()

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def verdict(self, end: End) -> End:
        """The end that the run gave, or that it took too long."""
        if self._expired is None or end.reason is not FinishReason.CANCELLED:
            return end
        return End(
            FinishReason.ERROR,
            end.usage,
            UpstreamTimeout(f"{self._expired}: retry, or allow more time."),
            served_model=end.served_model,
            reported_cost=end.reported_cost,
        )

    def _rearm(self) -> None:
        self.close()
        self._watch()

    def _limit(self) -> tuple[float, str] | None:
        """When the next limit is reached, and what to say then."""
        policy, limits = self._policy, []
        if self._ends_at is not None:
            limits.append(
                (self._ends_at, f"The answer took longer than [models] timeout_s = {policy.timeout_s or 0:g}")
            )
        if not self._heard and policy.first_token_timeout_s is not None:
            said = f"Nothing came within [models] first_token_timeout_s = {policy.first_token_timeout_s:g}"
            limits.append((self._heard_at + policy.first_token_timeout_s, said))
        if self._heard and policy.between_tokens_timeout_s is not None:
            said = f"Nothing more came within [models] between_tokens_timeout_s = {policy.between_tokens_timeout_s:g}"
            limits.append((self._heard_at + policy.between_tokens_timeout_s, said))
        return min(limits, default=None)

    def _watch(self) -> None:
        limit = self._limit()
        if limit is None:
            return
        at, said = limit
        if self._loop.time() >= at:
            self._expired = said
            self._run.cancel()
        else:
            self._timer = self._loop.call_at(at, self._watch)


def _may_pass(error: MillicentError) -> bool:
    return error.retryable and not isinstance(error, EngineCrashed)


def _another_may(error: MillicentError) -> bool:
    """Nobody could be asked; a fallback may do."""
    return error.retryable or isinstance(error, Forbidden | UpstreamError)


def _dearness(planned: tuple[Deployment, Plan]) -> tuple[bool, int]:
    """What nobody can price comes last."""
    cost = planned[1].quote.cost
    return (True, 0) if cost is None else (False, cost.expected.nanousd)
