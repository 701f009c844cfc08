"""Anthropic as a backend: one for each placement. Answers are always streamed from there."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping

import msgspec

from millicent.backends.config import UpstreamConfig
from millicent.backends.openai_compatible import estimated_usage
from millicent.backends.upstream import Upstream, UpstreamRun, merged
from millicent.core.chunks import Chunk, End, FinishReason, Text
from millicent.core.clock import Clock
from millicent.core.errors import MillicentError, ModelNotFound
from millicent.core.request import Request
from millicent.core.usage import Usage
from millicent.wire.anthropic_upstream import Sent, counting, encode, read_count
from millicent.wire.anthropic_upstream_answers import AnswerReader
from millicent.wire.reported import completed

_BASE_URL = "https://api.anthropic.com"
_PATH = "/v1/messages"
# The version whose requests take the most: `temperature` and the like, where a model still does.
_VERSION = "2023-06-01"


class AnthropicBackend:
    """`models` are public names, and what each is called there. Capacity that was bought apart is used with `priority`,
    as the placement is charged."""

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
        """Raises ConfigError where the key is missing."""
        secret = config.secret(placement)
        given = config.headers(placement)
        headers = {"anthropic-version": _VERSION} | given
        secrets = [*given.values(), *([] if secret is None else [secret])]
        if secret is not None:
            headers["x-api-key"] = secret
        base_url = (config.base_url or _BASE_URL).rstrip("/").removesuffix("/v1")
        self.placement = placement
        self.upstream = Upstream(
            f"Anthropic (placement `{placement}`)", base_url, config, clock, headers=headers, secrets=secrets
        )
        self._models = dict(models)
        self._priority = priority

    def models(self) -> tuple[str, ...]:
        return tuple(self._models)

    async def prepare(self, request: Request) -> AnthropicCall:
        model = self._models.get(request.model)
        if model is None:
            known = ", ".join(self._models) or "none"
            raise ModelNotFound(f"model: {request.model} is not at {self.upstream.who}: {known}", param="model")
        return AnthropicCall(self, request, model, self._encoded(request, model))

    def _encoded(self, request: Request, model: str) -> Sent:
        return encode(request, model, self.upstream.who, priority=self._priority)

    async def close(self) -> None:
        await self.upstream.close()


class AnthropicCall:
    """A request that is ready to be sent."""

    def __init__(self, backend: AnthropicBackend, request: Request, model: str, sent: Sent) -> None:
        self.served_model = model
        self.placement = backend.placement
        self.sequences: tuple[int, ...] = ()
        self.input_tokens: int | None = None
        self.max_output_tokens: int | None = sent.max_tokens
        self._upstream = backend.upstream
        self._request = request
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

    def start(self) -> AnthropicRun:
        return AnthropicRun(self._upstream, self._request, self._sent)


class AnthropicRun(UpstreamRun):
    def __init__(self, upstream: Upstream, request: Request, sent: Sent) -> None:
        super().__init__(upstream, upstream.post(_PATH, sent.body, sent.headers))
        self._request = request
        self._reader = AnswerReader()

    async def _chunks(self) -> AsyncIterator[Chunk]:
        """Until the answer is whole. Raises what went wrong."""
        kind = self._exchange.content_type
        if kind == "application/json":
            body = await self._exchange.body()
            if (complaint := self._upstream.complained(body)) is not None:
                raise complaint
            for chunk in self._take(body):
                yield chunk
        elif kind == "text/event-stream":
            async for events in self._exchange.events():
                texts, error = merged(events, self._take)
                for text in texts:
                    yield text
                if error is not None:
                    raise error
                if self._reader.ended:
                    return
        else:
            raise self._upstream.garbled(f"answered with {kind} in place of an answer")
        if not self._reader.ended:
            raise self._upstream.garbled("ended its answer in the middle")

    def _take(self, data: bytes) -> Iterator[Text]:
        reader = self._reader
        if reader.ended:
            return
        try:
            texts = reader.take(data)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, KeyError) as error:
            raise self._upstream.garbled(f"sent what is no answer ({error})") from None
        if reader.failure is not None:
            raise self._upstream.complained(reader.failure) or self._upstream.garbled("sent an error")
        if texts:
            self._exchange.progressed()
            yield from texts

    def _end(self, error: MillicentError | None) -> End:
        reader = self._reader
        usage = completed(reader.usage, self._estimated)
        told = (reader.served_model, None, reader.id)
        if reader.ended:
            return End(reader.reason, usage, None, (), *told)
        if self._cancelled:
            return End(FinishReason.CANCELLED, usage, None, (), *told)
        return End(FinishReason.ERROR, usage, error, (), *told)

    def _estimated(self) -> Usage:
        """Nothing was counted there: from characters, or nothing where it can't have begun to work."""
        return estimated_usage(self._request, 0) if self._exchange.worked else Usage()
