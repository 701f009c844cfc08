"""Where a model runs: its deployments, their health, and in which order they are asked."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from random import Random

import msgspec

from millicent.core.clock import NS_PER_S, Clock
from millicent.core.errors import Forbidden, MillicentError, ModelNotFound, RateLimited, Unavailable
from millicent.core.protocols import Backend
from millicent.core.receipts import Receipt
from millicent.core.request import Request
from millicent.pipeline.breaker import Breaker, State, Verdict, verdict_of
from millicent.pipeline.config import ModelPolicy
from millicent.pipeline.prompts import Affinity

# Beside the calls that a deployment takes at once, as many may wait for one of them to end.
_CALLS_PER_CONNECTION = 2
# A deployment that holds a conversation's beginning is passed over when it has so many more calls than twice the least
# busy's.
_MUCH_BUSIER = 4
_NO_POLICY = ModelPolicy()
# What a caller is told where nobody knows how long: a probe runs, or others' calls do.
_SOON_S = 1


class Place(msgspec.Struct, frozen=True):
    """A backend that has a model. `placement` None: only its calls say where they run. No share of the calls goes to a
    weight of 0 while others can be asked."""

    backend: Backend
    placement: str | None = None
    weight: int = 1
    max_connections: int | None = None


class DeploymentReport(msgspec.Struct, frozen=True):
    """One deployment as an operator sees it. `retry_after_s`: when an open breaker lets a call through."""

    model: str
    backend: str
    placement: str | None
    state: str
    running: int
    retry_after_s: int | None


class Deployment:
    """A model at a place. `running` counts the calls that were let in and haven't ended."""

    def __init__(self, model: str, place: Place, breaker: Breaker) -> None:
        self.model = model
        self.backend = place.backend
        self.placement = place.placement
        self.weight = place.weight
        self.running = 0
        self.breaker = breaker
        self._most = None if place.max_connections is None else place.max_connections * _CALLS_PER_CONNECTION

    @property
    def place(self) -> str:
        return self.placement or self.backend.name

    @property
    def is_full(self) -> bool:
        return self._most is not None and self.running >= self._most

    def enter(self) -> Lease | None:
        """Leave for one call; None where the breaker is open, or too many run."""
        ticket = None if self.is_full else self.breaker.enter()
        return None if ticket is None else Lease(self, ticket)

    def report(self) -> DeploymentReport:
        wait_ns = self.breaker.wait_ns()
        retry_after_s = _seconds(wait_ns) if self.breaker.state is State.OPEN else None
        return DeploymentReport(
            self.model, self.backend.name, self.placement, self.breaker.state.value, self.running, retry_after_s
        )


class Lease:
    """One call's leave. It ends once: with the call, or unused."""

    def __init__(self, deployment: Deployment, ticket: int) -> None:
        self.deployment = deployment
        self._ticket: int | None = ticket
        deployment.running += 1

    def end(self, error: MillicentError | None) -> None:
        """The call answered, or failed with this."""
        self._leave(verdict_of(error), None if error is None else error.retry_after_s)

    def give_back(self) -> None:
        """The call said nothing of the deployment: it never began, or whoever asked went away."""
        self._leave(Verdict.NEITHER, None)

    def _leave(self, verdict: Verdict, retry_after_s: int | None) -> None:
        ticket, self._ticket = self._ticket, None
        if ticket is not None:
            self.deployment.running -= 1
            self.deployment.breaker.leave(ticket, verdict, retry_after_s=retry_after_s)


class Deployments:
    """Every model that can be asked for. `places` are those that were configured; what else the backends have is theirs
    under its own name."""

    def __init__(
        self,
        backends: Sequence[Backend],
        clock: Clock,
        random: Random,
        places: Mapping[str, Sequence[Place]] | None = None,
        policies: Mapping[str, ModelPolicy] | None = None,
    ) -> None:
        self._backends = backends
        self._clock = clock
        self._random = random
        self._policies = policies or {}
        self._configured = dict(places or {})
        self._affinity = Affinity()
        self._known: dict[str, list[Deployment]] = {
            model: [self._deployment(model, place) for place in found] for model, found in self._configured.items()
        }

    def models(self) -> tuple[str, ...]:
        offered = (model for backend in self._backends for model in backend.models())
        return tuple(dict.fromkeys((*self._configured, *offered)))

    def offer(self, model: str, place: Place) -> None:
        """One more model, from now on."""
        self._configured[model] = (place,)
        self._known[model] = [self._deployment(model, place)]

    def policy(self, model: str) -> ModelPolicy:
        return self._policies.get(model, _NO_POLICY)

    def of(self, model: str) -> list[Deployment]:
        """Raises ModelNotFound, with a suggestion."""
        if model in self._configured:
            return self._known[model]
        known = self._known.setdefault(model, [])
        serving = [backend for backend in self._backends if model in backend.models()]
        for backend in serving:
            if all(each.backend is not backend for each in known):
                known.append(self._deployment(model, Place(backend)))
        if not serving:
            del self._known[model]
            raise self._not_found(model)
        return [each for each in known if each.backend in serving]

    def reports(self) -> list[DeploymentReport]:
        return [each.report() for model in self.models() for each in self.of(model)]

    def held(self, request: Request, deployment: Deployment) -> None:
        """The request was answered there."""
        if len(self._known[deployment.model]) > 1 and self.policy(deployment.model).prefix_affinity:
            self._affinity.held(deployment.model, request.attribution.key, request.hashed, deployment.place)

    def remember(self, receipts: Iterable[Receipt]) -> None:
        """Those of before the start, oldest first."""
        for each in receipts:
            if each.placement is not None and len(self._configured.get(each.model, ())) > 1:
                self._affinity.held(each.model, each.attribution.key, each.prompt, each.placement)

    def in_order(
        self,
        model: str,
        allowed: frozenset[str] | None,
        feature: str | None,
        among: Iterable[Deployment] | None = None,
        request: Request | None = None,
    ) -> list[Deployment]:
        """Those that may be asked now, the next one first; `among` narrows it, and the one that holds the beginning of
        `request` comes before others. Never empty.

        Raises ModelNotFound; Forbidden where the feature may use none of them; Unavailable where all that it may use
        are left alone after failures; RateLimited where they are full.
        """
        all_of_them = self.of(model)
        there = [each for each in all_of_them if may_run(each.placement, allowed)]
        if not there:
            raise not_allowed(feature, allowed, model, [each.placement or "" for each in all_of_them])
        if among is not None:
            chosen = set(among)
            there = [each for each in there if each in chosen]
        healthy = [each for each in there if each.breaker.wait_ns() == 0]
        if not healthy:
            raise left_alone(model, there)
        free = [each for each in healthy if not each.is_full]
        if not free:
            raise RateLimited(
                f"All deployments of `{model}` have as many calls as they take ([placements] max_connections, and as "
                "many waiting): retry in a moment.",
                code="deployments_full",
                retry_after_s=_SOON_S,
            )
        return self._held_first(model, self._ordered(model, free), request)

    def _held_first(self, model: str, ordered: list[Deployment], request: Request | None) -> list[Deployment]:
        if len(ordered) == 1 or request is None or not self.policy(model).prefix_affinity:
            return ordered
        place = self._affinity.holder(model, request.attribution.key, request.hashed)
        holder = next((each for each in ordered if each.place == place and each.weight), None)
        if holder is None or holder.running > 2 * min(each.running for each in ordered) + _MUCH_BUSIER:
            return ordered
        return [holder, *(each for each in ordered if each is not holder)]

    def _ordered(self, model: str, free: list[Deployment]) -> list[Deployment]:
        if len(free) == 1:
            return free
        shuffled = sorted(free, key=lambda each: self._lot(each.weight))
        if self.policy(model).balance == "least_busy":
            # As they came by lot where they are equally busy.
            return sorted(shuffled, key=lambda each: (each.weight == 0, (each.running + 1) / max(1, each.weight)))
        return shuffled

    def _lot(self, weight: int) -> float:
        """The earlier, the smaller: an exponential variable of rate `weight` is the smallest with the chance of its
        weight's share (Efraimidis and Spirakis, 2006)."""
        drawn = self._random.expovariate(1.0)
        return drawn / weight if weight else float("inf")

    def _deployment(self, model: str, place: Place) -> Deployment:
        return Deployment(model, place, Breaker(self.policy(model).breaker, self._clock))

    def _not_found(self, model: str) -> ModelNotFound:
        known = self.models()
        close = difflib.get_close_matches(model, known, n=1)
        advice = f"did you mean `{close[0]}`?" if close else f"this server has {', '.join(known) or 'none'}."
        return ModelNotFound(f"Model `{model[:100]}` is not served here: {advice}", param="model")


def may_run(placement: str | None, allowed: frozenset[str] | None) -> bool:
    return allowed is None or placement is None or placement in allowed


def not_allowed(
    feature: str | None, allowed: frozenset[str] | None, model: str, placements: Sequence[str]
) -> Forbidden:
    may, does = ", ".join(sorted(allowed or ())) or "no placement", ", ".join(sorted(filter(None, placements)))
    return Forbidden(
        f"Feature `{feature}` may run only on {may} ([features.{feature}] placements), and model `{model}` runs on "
        f"{does}: ask for another model, or allow the placement.",
        param="model",
        code="placement_not_allowed",
    )


def left_alone(model: str, deployments: Sequence[Deployment]) -> Unavailable:
    waits = [each.breaker.wait_ns() for each in deployments]
    known = [wait_ns for wait_ns in waits if wait_ns is not None]
    retry_after_s = max(_SOON_S, _seconds(min(known, default=0)) or 0)
    where = ", ".join(each.placement or each.backend.name for each in deployments)
    return Unavailable(
        f"Model `{model}` fails wherever it runs ({where}) and is left alone for now: retry in {retry_after_s} s.",
        code="deployments_unhealthy",
        retry_after_s=retry_after_s,
    )


def _seconds(ns: int | None) -> int | None:
    return None if ns is None else -(-ns // NS_PER_S)
