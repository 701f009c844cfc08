"""Servers that speak OpenAI's dialect as backends: one backend for each placement."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from millicent.backends.config import ServerName, UpstreamConfig
from millicent.backends.local_models import encode as encode_prompt
from millicent.backends.local_models import load_tokenizer
from millicent.backends.providers import Provider, UpstreamCall, UpstreamRun, VectorsRun
from millicent.core.chunks import Text
from millicent.core.clock import Clock
from millicent.core.errors import ConfigError
from millicent.core.guesses import pictures_in
from millicent.core.request import Request
from millicent.core.usage import Provenance, Usage
from millicent.wire.openai_servers import SERVERS
from millicent.wire.openai_upstream import Sent, encode
from millicent.wire.openai_upstream_answers import AnswerReader, VectorsReader

if TYPE_CHECKING:
    from millicent.text import Tokenizer


class OpenAIBackend(Provider):
    """`tokenizers` is where those of models lie that have one here. `service_tier` is what the placement is charged at,
    where it isn't the usual."""

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
        super().__init__(placement, server.title, base_url, config, models, clock, key_header=server.key_header)
        self.name: str = name
        self._server = server
        self._azure_version = config.api_version
        self._service_tier = service_tier
        self._clock = clock
        self._paths = dict(tokenizers or {})
        self._tokenizers: dict[str, Tokenizer] = {}

    async def prepare(self, request: Request) -> UpstreamCall:
        model = self.name_there(request)
        upstream, server = self.upstream, self._server
        cache_key = upstream.config.prompt_caching == "auto"
        sent = encode(request, model, server, upstream.who, self._service_tier, cache_key=cache_key)
        tokenizer = await self._tokenizer(request.model)
        input_tokens = None
        if tokenizer is not None and request.embedding is None and not pictures_in(request):
            input_tokens = sum(map(len, await encode_prompt(request, tokenizer)))

        def start() -> UpstreamRun:
            exchange = upstream.post(self._path(sent, model), sent.body)
            reader = AnswerReader(request.answers, choices=request.choices if server.usage_of_each else None)
            if request.embedding is not None:
                return VectorsRun(upstream, exchange, request, reader, VectorsReader)
            run = OpenAIRun(upstream, exchange, request, reader)
            if tokenizer is not None and input_tokens is not None:
                run.counted = CountedHere(tokenizer, input_tokens)
            return run

        call = UpstreamCall(self, request, model, start)
        call.input_tokens = input_tokens
        return call

    async def _tokenizer(self, model: str) -> Tokenizer | None:
        """Raises ModelError for one that isn't there, or is none."""
        path = self._paths.get(model)
        if path is not None and model not in self._tokenizers:
            self._tokenizers[model] = await asyncio.to_thread(load_tokenizer, path, self._clock)
        return self._tokenizers.get(model)

    def _path(self, sent: Sent, model: str) -> str:
        """Azure's addresses name the deployment, or are like OpenAI's since there is no version in them."""
        if self.name != "azure":
            return sent.path
        if self._azure_version is not None:
            return f"/openai/deployments/{quote(model, safe='')}{sent.path}?api-version={quote(self._azure_version)}"
        return sent.path if self.upstream.base_url.endswith("/openai/v1") else f"/openai/v1{sent.path}"


class CountedHere:
    """An answer's tokens by a tokenizer of this machine, for when the server doesn't tell them."""

    def __init__(self, tokenizer: Tokenizer, input_tokens: int) -> None:
        self._input_tokens = input_tokens
        self._tokenizer = tokenizer
        self._said: list[str] = []

    def hear(self, texts: Sequence[Text]) -> None:
        for each in texts:
            self._said += [each.reasoning, each.text, *(call.name + call.arguments for call in each.calls)]

    @property
    def usage(self) -> Usage:
        """Less what the model wants around any text."""
        encode = self._tokenizer.encode
        written = len(encode("".join(self._said))) - len(encode(""))
        return Usage.of(Provenance.COUNTED, input_fresh=self._input_tokens, output_text=written)


class OpenAIRun(UpstreamRun):
    counted: CountedHere | None = None

    def _heard(self, texts: Sequence[Text]) -> None:
        told = self._reader.usage
        if self.counted is not None and not (told and told.tells(of_input=False)):
            self.counted.hear(texts)

    def _estimated(self) -> Usage:
        if self.counted is None or not self._exchange.worked:
            return super()._estimated()
        return self.counted.usage
