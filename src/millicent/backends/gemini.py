"""Google's Gemini as a backend: one for each placement."""

from __future__ import annotations

from collections.abc import Mapping

from millicent.backends.config import UpstreamConfig
from millicent.backends.providers import Provider, UpstreamCall, UpstreamRun, VectorsRun
from millicent.core.clock import Clock
from millicent.core.request import Request
from millicent.wire import gemini_embeddings
from millicent.wire.gemini_upstream import encode
from millicent.wire.gemini_upstream_answers import AnswerReader

_BASE_URL = "https://generativelanguage.googleapis.com/v1beta"


class GeminiBackend(Provider):
    name = "gemini"

    def __init__(self, placement: str, config: UpstreamConfig, models: Mapping[str, str], clock: Clock) -> None:
        base_url = config.base_url or _BASE_URL
        super().__init__(placement, "Gemini", base_url, config, models, clock, key_header="x-goog-api-key")

    async def prepare(self, request: Request) -> UpstreamCall:
        model = self.name_there(request)
        upstream = self.upstream
        embeds = request.embedding is not None
        sent = (gemini_embeddings.encode if embeds else encode)(request, model, upstream.who)

        def start() -> UpstreamRun:
            exchange = upstream.post(sent.path, sent.body)
            reader = AnswerReader(request.choices)
            if embeds:
                return VectorsRun(upstream, exchange, request, reader, gemini_embeddings.VectorsReader)
            return UpstreamRun(upstream, exchange, request, reader)

        return UpstreamCall(self, request, model, start)
