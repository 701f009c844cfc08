"""Servers that speak OpenAI's dialect as backends: one backend for each placement.

The answer is always streamed from there, so that a client that goes stops it and its time limits hold; a server that
answers whole all the same is understood.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

import msgspec

from millicent.backends.config import ServerName, UpstreamConfig
from millicent.backends.local_models import encode as encode_prompt
from millicent.backends.upstream import Upstream, UpstreamRun, merged
from millicent.core.chunks import Chunk, End, FinishReason, Text
from millicent.core.clock import Clock
from millicent.core.errors import ConfigError, MillicentError, ModelNotFound
from millicent.core.request import ImagePart, Request
from millicent.core.usage import Count, Leaf, Provenance, Usage
from millicent.wire.openai_servers import SERVERS
from millicent.wire.openai_upstream import Sent, encode
from millicent.wire.openai_upstream_answers import CHARACTERS_PER_TOKEN, AnswerReader, VectorsReader

if TYPE_CHECKING:
    from millicent.text import Tokenizer

# No chunk is so short; the word that ends a stream is, with blanks around it.
_SHORTER_THAN_JSON = 16
# What a chat template adds around each message, about.
_TOKENS_PER_MESSAGE = 4


class OpenAIBackend:
    """`models` are public names, and what each is called there; `tokenizers` where theirs lie, for those that have one
    here. `service_tier` is what the placement is charged at, where it isn't the usual."""

    def __init__(
        self,
        placement: str,
        name: ServerName,
        config: UpstreamConfig,
        models: Mapping[str, str],
        clock: Clock,
        *,
        service_tier: str | None = None,
        tokenizers: Mapping[str, Path] | None = None,
    ) -> None:
        """Raises ConfigError where the address or the key is missing."""
        server = SERVERS[name]
        base_url = config.base_url or server.base_url
        if base_url is None:
            raise ConfigError(f"[placements.{placement}] base_url: missing; {server.title} has none of its own")
        secret = config.secret(placement)
        headers = config.headers(placement)
        secrets = [*headers.values(), *([] if secret is None else [secret])]
        if secret is not None:
            headers[server.key_header] = secret if server.key_header == "api-key" else f"Bearer {secret}"
        self.name: str = name
        self.placement = placement
        self.upstream = Upstream(
            f"{server.title} (placement `{placement}`)", base_url, config, clock, headers=headers, secrets=secrets
        )
        self._server = server
        self._models = dict(models)
        self._azure_version = config.api_version
        self._service_tier = service_tier
        self._clock = clock
        self._paths = dict(tokenizers or {})
        self._tokenizers: dict[str, Tokenizer] = {}

    def models(self) -> tuple[str, ...]:
        return tuple(self._models)

    async def prepare(self, request: Request) -> OpenAICall:
        model = self._models.get(request.model)
        if model is None:
            known = ", ".join(self._models) or "none"
            raise ModelNotFound(f"model: {request.model} is not at {self.upstream.who}: {known}", param="model")
        cache_key = self.upstream.config.prompt_caching == "auto"
        sent = encode(request, model, self._server, self.upstream.who, self._service_tier, cache_key=cache_key)
        call = OpenAICall(self, request, model, sent)
        tokenizer = await self._tokenizer(request.model)
        if tokenizer is not None and request.embedding is None and not holds_images(request):
            call.tokenizer = tokenizer
            call.input_tokens = len(await encode_prompt(request, tokenizer))
        return call

    async def _tokenizer(self, model: str) -> Tokenizer | None:
        """Raises ModelError for one that isn't there, or is none."""
        path = self._paths.get(model)
        if path is not None and model not in self._tokenizers:
            self._tokenizers[model] = await asyncio.to_thread(load_tokenizer, path, self._clock)
        return self._tokenizers.get(model)

    async def close(self) -> None:
        await self.upstream.close()

    def path(self, sent: Sent, model: str) -> str:
        """Azure's addresses name the deployment, or are like OpenAI's since there is no version in them."""
        if self.name != "azure":
            return sent.path
        if self._azure_version is not None:
            return f"/openai/deployments/{quote(model, safe='')}{sent.path}?api-version={quote(self._azure_version)}"
        return sent.path if self.upstream.base_url.endswith("/openai/v1") else f"/openai/v1{sent.path}"


class OpenAICall:
    """A request that is ready to be sent."""

    def __init__(self, backend: OpenAIBackend, request: Request, model: str, sent: Sent) -> None:
        wanted = request.limits.max_tokens
        self.served_model = model
        self.placement = backend.placement
        self.sequences: tuple[int, ...] = ()
        self.input_tokens: int | None = None
        self.tokenizer: Tokenizer | None = None
        self.max_output_tokens: int | None = None if wanted is None else wanted * request.choices
        if request.embedding is not None:
            self.max_output_tokens = 0
        self._backend = backend
        self._request = request
        self._sent = sent

    def start(self) -> OpenAIRun:
        return OpenAIRun(self._backend, self._request, self._sent, self)


class OpenAIRun(UpstreamRun):
    def __init__(self, backend: OpenAIBackend, request: Request, sent: Sent, call: OpenAICall) -> None:
        path = backend.path(sent, call.served_model)
        super().__init__(backend.upstream, backend.upstream.post(path, sent.body))
        self._request = request
        self._call = call
        self._said: list[str] = []  # for the tokenizer, where there is one
        self._reader = AnswerReader()
        self._done = False
        self._vectors: VectorsReader | None = None

    async def _chunks(self) -> AsyncIterator[Chunk]:
        """Until the answer is whole. Raises what went wrong."""
        kind = self._exchange.content_type
        if kind == "text/event-stream":
            async for events in self._exchange.events():
                texts, error = merged(events, self._take)
                for text in texts:
                    yield text
                if error is not None:
                    raise error
                if self._done:
                    return
            if not self._reader.ended(self._request.choices):
                raise self._upstream.garbled("ended its answer in the middle")
            return
        if kind != "application/json":
            raise self._upstream.garbled(f"answered with {kind} in place of an answer")
        body = await self._exchange.body()
        if (complaint := self._upstream.complained(body)) is not None:
            raise complaint
        if self._request.embedding is None:
            for chunk in self._take(body):
                yield chunk
            if not self._reader.ended(self._request.choices):
                raise self._upstream.garbled("answered without an answer")
            return
        try:
            self._vectors = VectorsReader(body, len(self._request.embedding.inputs))
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise self._upstream.garbled(f"sent what are no embeddings ({error})") from None
        for vector in self._vectors.vectors:
            yield vector

    def _take(self, data: bytes) -> Iterable[Text]:
        reader = self._reader
        if self._done or (len(data) < _SHORTER_THAN_JSON and data.strip() == b"[DONE]"):
            self._done = True
            return ()
        try:
            texts = reader.take(data)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise self._upstream.garbled(f"sent what is no answer ({error})") from None
        if reader.failure is not None:
            raise self._upstream.complained(reader.failure) or self._upstream.garbled("sent an error")
        if texts:
            self._exchange.progressed()
            if self._call.tokenizer is not None and reader.usage is None:
                for each in texts:
                    self._said += [each.reasoning, each.text, *(call.name + call.arguments for call in each.calls)]
        return texts if reader.failed is None else self._given_up(texts, reader.failed)

    def _given_up(self, texts: Iterable[Text], failed: str) -> Iterator[Text]:
        yield from texts
        raise self._upstream.garbled(f"gave up in the middle of its answer ({failed})")

    def _end(self, error: MillicentError | None) -> End:
        reader = self._reader
        reasons = reader.reasons
        complete = error is None or reader.ended(self._request.choices)
        found = self._vectors or reader
        told = (found.served_model, found.cost, self._exchange.header("x-millicent-receipt") or found.id)
        if self._vectors is not None:
            return End(FinishReason.STOP, self._vectors.usage or self._estimated(), None, (), *told)
        usage = reader.usage if reader.usage is not None else self._estimated()
        if self._cancelled and not complete:
            return End(FinishReason.CANCELLED, usage, None, (), *told)
        if complete and reader.failure is None and reader.failed is None:
            choices = reasons if len(reasons) > 1 else ()
            return End(overall(reasons), usage, None, choices, *told)
        return End(FinishReason.ERROR, usage, error, (), *told)

    def _estimated(self) -> Usage:
        """Without a count from there: by a tokenizer, or from characters. Nothing where it can't have begun to work."""
        if not self._exchange.worked:
            return Usage()
        tokenizer, read = self._call.tokenizer, self._call.input_tokens
        if tokenizer is not None and read is not None:
            # Less what the model wants around any text.
            written = len(tokenizer.encode("".join(self._said))) - len(tokenizer.encode(""))
            return Usage.of(Provenance.COUNTED, input_fresh=read, output_text=written)
        return estimated_usage(self._request, self._reader.output_estimate)


def load_tokenizer(path: Path, clock: Clock) -> Tokenizer:
    """Raises ModelError."""
    from millicent.text import load_tokenizer as load

    return load(path, clock)


def estimated_input(request: Request) -> int:
    """Tokens of its text, at four characters each, with those around every message."""
    if request.embedding is not None:
        return sum(_estimated_text(text) for text in request.embedding.inputs)
    if request.messages is None:
        return _estimated_text(request.prompt or "")
    characters = sum(len(tool.name) + len(tool.description) + len(tool.parameters) for tool in request.tools)
    for message in request.messages:
        characters += len(message.text) + sum(len(call.name) + len(call.arguments) for call in message.tool_calls)
    return -(-characters // CHARACTERS_PER_TOKEN) + _TOKENS_PER_MESSAGE * len(request.messages)


def holds_images(request: Request) -> bool:
    contents = [message.content for message in request.messages or () if not isinstance(message.content, str)]
    return any(isinstance(part, ImagePart) for content in contents for part in content)


def _estimated_text(text: str | tuple[int, ...]) -> int:
    return len(text) if isinstance(text, tuple) else -(-len(text) // CHARACTERS_PER_TOKEN)


def estimated_usage(request: Request, output_tokens: int) -> Usage:
    """From characters, where nothing was counted there. What a picture takes nobody can say."""
    leaves = {Leaf.INPUT_FRESH: Count(estimated_input(request), Provenance.ESTIMATED)}
    if request.embedding is None:
        leaves[Leaf.OUTPUT_TEXT] = Count(output_tokens, Provenance.ESTIMATED)
    if holds_images(request):
        leaves[Leaf.INPUT_IMAGE] = Count(None, Provenance.UNKNOWN)
    return Usage(leaves)


def overall(reasons: tuple[FinishReason, ...]) -> FinishReason:
    """How an answer of several choices ended."""
    for reason in (FinishReason.LENGTH, FinishReason.CONTENT_FILTER, FinishReason.TOOL_CALLS):
        if reason in reasons:
            return reason
    return FinishReason.STOP
