"""What backends of servers elsewhere share, whatever their dialect: the way to a server, a call that is ready, and the
answer as it is read. Answers are always streamed from there, so that a client that goes stops them and their time
limits hold; a server that answers whole all the same is understood.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Protocol

import msgspec

from millicent.backends.config import UpstreamConfig
from millicent.backends.upstream import Exchange, Upstream
from millicent.core.chunks import Chunk, End, FinishReason, Text, Vector, merge_texts
from millicent.core.clock import Clock
from millicent.core.errors import MillicentError, ModelNotFound
from millicent.core.guesses import guessed_text_tokens, pictures_in
from millicent.core.money import Money
from millicent.core.request import Request
from millicent.core.usage import Count, Leaf, Provenance, Usage
from millicent.wire.reported import completed
from millicent.wire.server_sent_events import Event
from millicent.wire.upstream_answers import AnswerReader

# What a reader raises for what is no answer.
_NO_ANSWER = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


class Provider:
    """One placement's server. `models` are public names, and what each is called there."""

    def __init__(
        self, placement: str, title: str, base_url: str, config: UpstreamConfig, models: Mapping[str, str],
        clock: Clock, *, key_header: str, headers: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        """`headers` go with every call, unless the configuration says otherwise. Raises ConfigError where the key is
        missing."""
        secret = config.secret(placement)
        given = config.headers(placement)
        sent = {**(headers or {}), **given}
        secrets = [*given.values(), *([] if secret is None else [secret])]
        if secret is not None:
            sent[key_header] = f"Bearer {secret}" if key_header == "Authorization" else secret
        self.placement = placement
        self.upstream = Upstream(
            f"{title} (placement `{placement}`)", base_url, config, clock, headers=sent, secrets=secrets
        )
        self._models = dict(models)

    def models(self) -> tuple[str, ...]:
        return tuple(self._models)

    def name_there(self, request: Request) -> str:
        """Raises ModelNotFound."""
        model = self._models.get(request.model)
        if model is None:
            known = ", ".join(self._models) or "none"
            raise ModelNotFound(f"model: {request.model} is not at {self.upstream.who}: {known}", param="model")
        return model

    async def close(self) -> None:
        await self.upstream.close()


class UpstreamCall:
    """A request that is ready to be sent."""

    def __init__(
        self, provider: Provider, request: Request, model: str, start: Callable[[], UpstreamRun],
        max_output_tokens: int | None = None,
    ) -> None:  # fmt: skip
        """`max_output_tokens`, where it is another than the request's."""
        wanted = request.limits.max_tokens
        self.served_model = model
        self.placement = provider.placement
        self.sequences: tuple[int, ...] = ()
        self.input_tokens: int | None = None
        self.max_output_tokens = max_output_tokens
        if request.embedding is not None:
            self.max_output_tokens = 0
        elif max_output_tokens is None and wanted is not None:
            self.max_output_tokens = wanted * request.answers
        self._start = start

    def start(self) -> UpstreamRun:
        return self._start()


class UpstreamRun:
    """One answer, read at the reader's pace: nothing is read ahead of it."""

    may_stream = True

    def __init__(self, upstream: Upstream, exchange: Exchange, request: Request, reader: AnswerReader) -> None:
        self._upstream = upstream
        self._exchange = exchange
        self._request = request
        self._reader = reader
        self._cancelled = False

    def cancel(self) -> None:
        self._cancelled = True
        self._exchange.interrupt(MillicentError("cancelled"))

    async def __aiter__(self) -> AsyncIterator[Chunk]:
        whole = False
        try:
            await self._exchange.open()
            streams = self.may_stream and self._exchange.content_type == "text/event-stream"
            while events := await self._exchange.events() if streams else [Event(await self._body())]:
                chunks, error = self._understood(events)
                for chunk in chunks:
                    yield chunk
                if error is not None:
                    raise error
                if self._reader.over or not streams:
                    break
            self._check_whole()
            whole = True
            end = self._end(None)
        except MillicentError as error:
            end = self._end(error)
        finally:
            self._exchange.close(whole=whole)
        yield end

    def _check_whole(self) -> None:
        """Nothing more comes. Raises what is wrong with that."""
        if not self._reader.ended:
            began = self._reader.output_estimate > 0
            raise self._upstream.garbled("ended its answer in the middle" if began else "answered without an answer")

    async def _body(self) -> bytes:
        """An answer that comes whole. Raises what stands in its place."""
        kind = self._exchange.content_type
        if kind != "application/json":
            raise self._upstream.garbled(f"answered with {kind} in place of an answer")
        body = await self._exchange.body()
        if (complaint := self._upstream.complained(body)) is not None:
            raise complaint
        return body

    def _understood(self, events: Sequence[Event]) -> tuple[Sequence[Chunk], MillicentError | None]:
        """What events that came together say, in as few pieces as can be; and what went wrong after that."""
        reader, texts = self._reader, list[Text]()
        wrong: MillicentError | None = None
        for event in events:
            try:
                found = reader.take(event.data)
            except _NO_ANSWER as error:
                wrong = self._upstream.garbled(f"sent what is no answer ({error})")
                break
            if reader.failure is not None:
                wrong = self._upstream.complained(reader.failure) or self._upstream.garbled("sent an error")
                break
            texts += found
            if reader.failed is not None:
                wrong = self._upstream.garbled(f"gave up in the middle of its answer ({reader.failed})")
            if wrong is not None or reader.over:
                break
        if texts:
            self._exchange.progressed()
            self._heard(texts)
        return merge_texts(texts, in_order=True), wrong

    def _heard(self, texts: Sequence[Text]) -> None:
        """What came, before it is handed on."""

    def _end(self, error: MillicentError | None) -> End:
        """An answer that was whole before something went wrong is one all the same."""
        reader = self._reader
        usage = completed(reader.usage, self._estimated)
        receipt = self._exchange.header("x-millicent-receipt")
        told = (reader.served_model, reader.cost, receipt or reader.id)
        if reader.ended and reader.failure is None and reader.failed is None:
            reasons = reader.reasons
            return End(_overall(reasons), usage, None, reasons if len(reasons) > 1 else (), *told)
        if self._cancelled:
            return End(FinishReason.CANCELLED, usage, None, (), *told)
        return End(FinishReason.ERROR, usage, error, (), *told)

    def _estimated(self) -> Usage:
        """Nothing was counted there: from characters, or nothing where it can't have begun to work."""
        worked = self._exchange.worked
        return estimated_usage(self._request, self._reader.output_estimate) if worked else Usage()


class Vectors(Protocol):
    """What was read of an answer with vectors."""

    @property
    def vectors(self) -> Sequence[Vector]: ...
    @property
    def usage(self) -> Usage | None: ...
    @property
    def cost(self) -> Money | None: ...
    @property
    def served_model(self) -> str | None: ...
    @property
    def id(self) -> str | None: ...


class VectorsRun(UpstreamRun):
    """The vectors of a request for embeddings, which never stream: `read` makes them of a body, for so many inputs."""

    may_stream = False

    def __init__(
        self, upstream: Upstream, exchange: Exchange, request: Request, reader: AnswerReader,
        read: Callable[[bytes, int], Vectors],
    ) -> None:  # fmt: skip
        super().__init__(upstream, exchange, request, reader)
        self._read = read
        self._found: Vectors | None = None

    def _understood(self, events: Sequence[Event]) -> tuple[Sequence[Chunk], MillicentError | None]:
        assert self._request.embedding is not None
        try:
            self._found = self._read(events[0].data, len(self._request.embedding.inputs))
        except _NO_ANSWER as error:
            return (), self._upstream.garbled(f"sent what are no embeddings ({error})")
        return self._found.vectors, None

    def _check_whole(self) -> None:
        """It was read in one piece."""

    def _end(self, error: MillicentError | None) -> End:
        found = self._found
        if found is None:
            return super()._end(error)
        receipt = self._exchange.header("x-millicent-receipt")
        told = (found.served_model, found.cost, receipt or found.id)
        return End(FinishReason.STOP, completed(found.usage, self._estimated), None, (), *told)


def estimated_usage(request: Request, output_tokens: int) -> Usage:
    """From its bytes, where nothing was counted there. What a picture takes nobody can say."""
    leaves = {Leaf.INPUT_FRESH: Count(guessed_text_tokens(request), Provenance.ESTIMATED)}
    if request.embedding is None:
        leaves[Leaf.OUTPUT_TEXT] = Count(output_tokens, Provenance.ESTIMATED)
    if pictures_in(request):
        leaves[Leaf.INPUT_IMAGE] = Count(None, Provenance.UNKNOWN)
    return Usage(leaves)


def _overall(reasons: tuple[FinishReason, ...]) -> FinishReason:
    """How an answer of several choices ended."""
    for reason in (FinishReason.LENGTH, FinishReason.CONTENT_FILTER, FinishReason.TOOL_CALLS):
        if reason in reasons:
            return reason
    return FinishReason.STOP
