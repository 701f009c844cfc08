"""The backends of placements that are called over HTTP, as they are configured."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from millicent.backends.config import Deployment, UpstreamConfig
from millicent.backends.openai_compatible import OpenAIBackend
from millicent.core.clock import Clock


class Elsewhere(msgspec.Struct, frozen=True):
    """A placement that is called: how, whose it is (`provider`), and each public model's name there."""

    placement: str
    config: UpstreamConfig
    provider: str | None
    models: dict[str, str]


UpstreamBackend = OpenAIBackend


def called(
    deployed: Mapping[str, tuple[Deployment, ...]],
    upstreams: Mapping[str, UpstreamConfig],
    providers: Mapping[str, str | None],
) -> list[Elsewhere]:
    """The placements at which a model is deployed. `providers` has every placement's."""
    models: dict[str, dict[str, str]] = {}
    for public, deployments in deployed.items():
        for deployment in deployments:
            models.setdefault(deployment.placement, {})[public] = deployment.model or public
    return [
        Elsewhere(placement, upstreams.get(placement, UpstreamConfig()), providers[placement], there)
        for placement, there in models.items()
    ]


def open_backend(place: Elsewhere, clock: Clock) -> UpstreamBackend:
    """Raises ConfigError where something is missing to call it."""
    server = place.config.spoken(place.provider)
    return OpenAIBackend(place.placement, server, place.config, place.models, clock)
