"""Google's Gemini as a backend: one for each placement. Answers are always streamed from there."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping

import msgspec

from millicent.backends.config import UpstreamConfig
from millicent.backends.openai_compatible import estimated_usage, overall
from millicent.backends.upstream import Upstream, UpstreamRun, merged
from millicent.core.chunks import Chunk, End, FinishReason, Text
from millicent.core.clock import Clock
from millicent.core.errors import MillicentError, ModelNotFound
from millicent.core.request import Request
from millicent.core.usage import Usage
from millicent.wire.gemini_upstream import Sent, encode
from millicent.wire.gemini_upstream_answers import AnswerReader
from millicent.wire.reported import completed

_BASE_URL = "https://generativelanguage.googleapis.com/v1beta"


class GeminiBackend:
    """`models` are public names, and what each is called there."""

    name = "gemini"

    def __init__(self, placement: str, config: UpstreamConfig, models: Mapping[str, str], clock: Clock) -> None:
        """Raises ConfigError where the key is missing."""
        secret = config.secret(placement)
        headers = config.headers(placement)
        secrets = [*headers.values(), *([] if secret is None else [secret])]
        if secret is not None:
            headers["x-goog-api-key"] = secret
        self.placement = placement
        self.upstream = Upstream(
            f"Gemini (placement `{placement}`)",
            config.base_url or _BASE_URL,
            config,
            clock,
            headers=headers,
            secrets=secrets,
        )
        self._models = dict(models)

    def models(self) -> tuple[str, ...]:
        return tuple(self._models)

    async def prepare(self, request: Request) -> GeminiCall:
        model = self._models.get(request.model)
        if model is None:
            known = ", ".join(self._models) or "none"
            raise ModelNotFound(f"model: {request.model} is not at {self.upstream.who}: {known}", param="model")
        return GeminiCall(self, request, model, encode(request, model, self.upstream.who))

    async def close(self) -> None:
        await self.upstream.close()


class GeminiCall:
    """A request that is ready to be sent."""

    def __init__(self, backend: GeminiBackend, request: Request, model: str, sent: Sent) -> None:
        wanted = request.limits.max_tokens
        self.served_model = model
        self.placement = backend.placement
        self.sequences: tuple[int, ...] = ()
        self.input_tokens: int | None = None
        self.max_output_tokens: int | None = None if wanted is None else wanted * request.choices
        self._upstream = backend.upstream
        self._request = request
        self._sent = sent

    def start(self) -> GeminiRun:
        return GeminiRun(self._upstream, self._request, self._sent)


class GeminiRun(UpstreamRun):
    def __init__(self, upstream: Upstream, request: Request, sent: Sent) -> None:
        super().__init__(upstream, upstream.post(sent.path, sent.body))
        self._request = request
        self._reader = AnswerReader(request.choices)

    async def _chunks(self) -> AsyncIterator[Chunk]:
        """Until the answer is whole. Raises what went wrong. The last count comes with or after the end of the last
        choice, so that the stream is read until it ends."""
        kind = self._exchange.content_type
        if kind == "application/json":
            for chunk in self._take(await self._exchange.body()):
                yield chunk
        elif kind == "text/event-stream":
            async for events in self._exchange.events():
                chunks, error = merged(events, self._take)
                for chunk in chunks:
                    yield chunk
                if error is not None:
                    raise error
        else:
            raise self._upstream.garbled(f"answered with {kind} in place of an answer")
        if not self._reader.ended:
            raise self._upstream.garbled("ended its answer in the middle")

    def _take(self, data: bytes) -> Iterator[Text]:
        reader = self._reader
        try:
            texts = reader.take(data)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise self._upstream.garbled(f"sent what is no answer ({error})") from None
        if reader.failure is not None:
            raise self._upstream.complained(reader.failure) or self._upstream.garbled("sent an error")
        if texts:
            self._exchange.progressed()
            yield from texts
        if reader.failed is not None:
            raise self._upstream.garbled(f"gave up in the middle of its answer ({reader.failed})")

    def _end(self, error: MillicentError | None) -> End:
        reader = self._reader
        usage = completed(reader.usage, self._estimated)
        told = (reader.served_model, None, reader.id)
        if reader.ended and reader.failure is None and reader.failed is None:
            reasons = reader.reasons
            return End(overall(reasons), usage, None, reasons if len(reasons) > 1 else (), *told)
        if self._cancelled:
            return End(FinishReason.CANCELLED, usage, None, (), *told)
        return End(FinishReason.ERROR, usage, error, (), *told)

    def _estimated(self) -> Usage:
        """Nothing was counted there: from characters, or nothing where it can't have begun to work."""
        worked = self._exchange.worked
        return estimated_usage(self._request, self._reader.output_estimate) if worked else Usage()
