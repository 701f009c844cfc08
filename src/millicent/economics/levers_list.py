"""All levers there are, in the order in which they are replayed."""

from __future__ import annotations

from millicent.economics.levers import Replayed
from millicent.economics.levers_caches import (
    batch_prices,
    batching,
    engine_prefixes,
    provider_prefixes,
    response_cache,
)
from millicent.economics.levers_models import another_place, other_apis, quantization, routing, shorter, smaller_models

LEVERS: tuple[Replayed, ...] = (
    response_cache,
    engine_prefixes,
    provider_prefixes,
    batching,
    batch_prices,
    smaller_models,
    other_apis,
    quantization,
    routing,
    shorter,
    another_place,
)
