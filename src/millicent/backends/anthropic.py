"""Anthropic as a backend: one for each placement."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from millicent.backends.config import UpstreamConfig
from millicent.backends.providers import Provider, UpstreamCall, UpstreamRun
from millicent.core.clock import Clock
from millicent.core.request import Request
from millicent.wire.anthropic_upstream import Sent, counting, encode, read_count
from millicent.wire.anthropic_upstream_answers import AnswerReader

_BASE_URL = "https://api.anthropic.com"
_PATH = "/v1/messages"
# The version whose requests take the most: `temperature` and the like, where a model still does.
_VERSION = "2023-06-01"


class AnthropicBackend(Provider):
    """Capacity that was bought apart is used with `priority`, as the placement is charged."""

    name = "anthropic"

    def __init__(
        self,
        placement: str,
        config: UpstreamConfig,
        models: Mapping[str, str],
        clock: Clock,
        *,
        priority: bool = False,
    ) -> None:
        base_url = (config.base_url or _BASE_URL).rstrip("/").removesuffix("/v1")
        headers = {"anthropic-version": _VERSION}
        super().__init__(
            placement, "Anthropic", base_url, config, models, clock, key_header="x-api-key", headers=headers
        )
        self._priority = priority

    async def prepare(self, request: Request) -> AnthropicCall:
        model = self.name_there(request)
        sent = encode(request, model, self.upstream.who, priority=self._priority)
        return AnthropicCall(self, request, model, sent)


class AnthropicCall(UpstreamCall):
    def __init__(self, backend: AnthropicBackend, request: Request, model: str, sent: Sent) -> None:
        upstream = backend.upstream

        def start() -> UpstreamRun:
            exchange = upstream.post(_PATH, sent.body, sent.headers)
            return UpstreamRun(upstream, exchange, request, AnswerReader())

        super().__init__(backend, request, model, start, sent.max_tokens)
        self._upstream = upstream
        self._sent = sent

    async def count_input(self) -> int:
        exchange = self._upstream.post(f"{_PATH}/count_tokens", counting(self._sent), self._sent.headers)
        whole = False
        try:
            await exchange.open()
            body = await exchange.body()
            whole = True
            return read_count(body)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise self._upstream.garbled(f"counted tokens in a way that can't be read ({error})") from None
        finally:
            exchange.close(whole=whole)
