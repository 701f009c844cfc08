"""What a request would take and cost, wherever it may run. Nothing is spent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from millicent.core.clock import Clock
from millicent.core.errors import InvalidRequest, MillicentError
from millicent.core.protocols import CountsInput
from millicent.core.quotes import Quote
from millicent.core.request import Request
from millicent.core.usage import Provenance
from millicent.meter.placements import Placement
from millicent.meter.quotes import Asked
from millicent.pipeline.deployments import Deployments, may_run, not_allowed
from millicent.pipeline.estimates import Estimates
from millicent.pipeline.features import Features
from millicent.pipeline.routes import Look
from millicent.routing.policies import Policies


class Quotes:
    """`look` is how one deployment sees a request."""

    def __init__(
        self,
        policies: Policies,
        deployments: Deployments,
        placements: Mapping[str, Placement],
        features: Features,
        estimates: Estimates,
        look: Look,
        clock: Clock,
    ) -> None:
        self._policies = policies
        self._deployments = deployments
        self._placements = placements
        self._features = features
        self._estimates = estimates
        self._look = look
        self._clock = clock

    async def quotes(self, request: Request, models: Sequence[str]) -> list[Quote]:
        """What the request would be on each of these models, wherever one is placed. Nothing is spent, though a model
        may have to be loaded for its tokenizer. Raises as `Pipeline.admit` does."""
        prepared: list[Asked] = []
        allowed = self._features.placements(request.attribution.feature)
        places = [place for place in self._placements.values() if may_run(place.name, allowed)]
        models = list(dict.fromkeys(model for name in models for model in self._policies.models_of(name)))
        for model in models:
            elsewhere = any(model in place.models for place in places)
            if not elsewhere or model in (*self._deployments.models(), *self._policies.names()):
                wanted = msgspec.structs.replace(request, model=model)
                prepared += await self._prepared(wanted, allowed, needed=not elsewhere)
        asked: list[Asked] = []
        for model in models:
            wanted = msgspec.structs.replace(request, model=model)
            asked += [each for each in prepared if each.model == model]
            for place in places:
                if model in place.models and all(
                    each.placement.name != place.name for each in asked if each.model == model
                ):
                    asked.append(self._estimates.asked_elsewhere(wanted, place, prepared, self._clock.now_ns()))
        return [self._estimates.quote(each) for each in asked]

    async def count(self, request: Request) -> int:
        """The request's input in tokens. Nothing is spent. Raises as `Pipeline.admit` does, and InvalidRequest where
        nobody can count them."""
        allowed = self._features.placements(request.attribution.feature)
        request = msgspec.structs.replace(request, model=self._policies.models_of(request.model)[-1])
        for asked in await self._prepared(request, allowed, needed=True):
            if asked.input_provenance is Provenance.COUNTED:
                return asked.input_tokens
        for each in self._deployments.of(request.model):
            if may_run(each.placement, allowed):
                call = await each.backend.prepare(request)
                if isinstance(call, CountsInput):
                    return await call.count_input()
        raise InvalidRequest(
            f"Nobody here can count tokens for model `{request.model}`: ask its provider.",
            param="model",
            code="unsupported_parameter",
        )

    async def _prepared(self, request: Request, allowed: frozenset[str] | None, *, needed: bool) -> list[Asked]:
        """As each deployment would run it that may and can. Raises why none can, where one is `needed`."""
        found: list[Asked] = []
        why: MillicentError | None = None
        deployments = self._deployments.of(request.model)
        for each in deployments:
            if may_run(each.placement, allowed):
                try:
                    found.append(await self._look(request, each))
                except MillicentError as error:
                    why = why or error
        if found or not needed:
            return found
        where = [each.placement or "" for each in deployments]
        raise why or not_allowed(request.attribution.feature, allowed, request.model, where)
