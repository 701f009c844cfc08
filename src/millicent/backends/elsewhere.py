"""The backends of placements that are called over HTTP, as they are configured."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import msgspec

from millicent.backends.anthropic import AnthropicBackend
from millicent.backends.config import ModelConfig, UpstreamConfig
from millicent.backends.gemini import GeminiBackend
from millicent.backends.openai_compatible import OpenAIBackend
from millicent.core.clock import Clock
from millicent.core.errors import ConfigError


class Elsewhere(msgspec.Struct, frozen=True):
    """A placement that is called: how, whose it is (`provider`), at which prices (`service`), and each public model's
    name there. `tokenizers` are those models' that have one here."""

    placement: str
    config: UpstreamConfig
    provider: str | None
    service: str | None
    models: dict[str, str]
    tokenizers: dict[str, Path]


UpstreamBackend = OpenAIBackend | AnthropicBackend | GeminiBackend


def called(
    models: Mapping[str, ModelConfig],
    upstreams: Mapping[str, UpstreamConfig],
    charged: Mapping[str, tuple[str | None, str | None]],
    home: Path,
) -> list[Elsewhere]:
    """The placements at which a model is deployed. `charged` has every placement's provider and service; tokenizers'
    paths may be relative to `home`."""
    named: dict[str, dict[str, str]] = {}
    tokenizers: dict[str, dict[str, Path]] = {}
    for public, model in models.items():
        for deployment in model.deployed:
            named.setdefault(deployment.placement, {})[public] = deployment.model or public
            if model.tokenizer is not None:
                path = home / Path(model.tokenizer).expanduser()
                tokenizers.setdefault(deployment.placement, {})[public] = path
    return [
        Elsewhere(place, upstreams.get(place, UpstreamConfig()), *charged[place], there, tokenizers.get(place, {}))
        for place, there in named.items()
    ]


def open_backend(place: Elsewhere, clock: Clock) -> UpstreamBackend:
    """Raises ConfigError where something is missing to call it."""
    server = place.config.spoken(place.provider)
    if place.service == "batch":
        raise ConfigError(
            f'[placements.{place.placement}] service: batch prices are for batches, not for calls: use "standard"'
        )
    tier = place.service if place.service in {"flex", "priority"} else None
    if server == "anthropic":
        if tier == "flex":
            raise ConfigError(f'[placements.{place.placement}] service: Anthropic has no flex: use "standard"')
        return AnthropicBackend(place.placement, place.config, place.models, clock, priority=tier == "priority")
    if server == "gemini":
        if tier is not None:
            raise ConfigError(
                f'[placements.{place.placement}] service: Gemini is called at its standard prices only: use "standard"'
            )
        return GeminiBackend(place.placement, place.config, place.models, clock)
    return OpenAIBackend(
        place.placement, server, place.config, place.models, clock, service_tier=tier, tokenizers=place.tokenizers
    )
