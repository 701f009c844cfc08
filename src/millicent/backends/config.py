"""`[models.NAME]` and the callable half of `[placements.NAME]`: how a model is run, and where."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal, get_args
from urllib.parse import urlsplit

import msgspec

from millicent.core.errors import ConfigError
from millicent.engine.protocol import Dtype, Quantization

ServerName = Literal[
    "openai",
    "anthropic",
    "gemini",
    "azure",
    "mistral",
    "groq",
    "deepseek",
    "openrouter",
    "vllm",
    "sglang",
    "tgi",
    "llama.cpp",
    "lmstudio",
    "mlx",
    "transformers",
    "ollama",
    "millicent",
    "compatible",
]

_Seconds = Annotated[float, msgspec.Meta(gt=0, le=86_400)]


class Deployment(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A model at a placement, where it is called `model` (as here, unless said). Calls are shared out by `weight`."""

    placement: str
    model: str | None = None
    weight: Annotated[int, msgspec.Meta(ge=0, le=1_000_000)] = 1


class ModelConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`path` is a GGUF file or a folder of safetensors; without it, NAME is a catalogue name or `org/name`.

    A model that nobody asks for is given back after `keep_alive_s`; None keeps it. `preload` loads it at the start
    instead of at its first use. `dtype` and `quantize` are this model's own, instead of those of [engine].
    `draft` is a smaller model with the same tokenizer, named like any other: it guesses what this one will say.

    A model that runs elsewhere has `deployments` at placements with a `base_url` or a known provider; `placement` and
    `model` are the short form for one. `tokenizer`, a GGUF file or a folder with tokenizer.json, counts what such a
    model is sent, and what came of an answer whose usage nobody told.
    """

    path: str | None = None
    keep_alive_s: Annotated[int, msgspec.Meta(ge=0)] | None = None
    preload: bool = False
    dtype: Dtype | None = None
    quantize: Quantization | None = None
    draft: str | None = None
    deployments: tuple[Deployment, ...] = ()
    placement: str | None = None
    model: str | None = None
    tokenizer: str | None = None

    @property
    def deployed(self) -> tuple[Deployment, ...]:
        """Where it runs elsewhere; empty for one of this machine."""
        return self.deployments if self.placement is None else (Deployment(self.placement, self.model),)

    def check(self, name: str) -> None:
        """Raises ConfigError where the settings don't go together."""
        at = f"[models.{name}]"
        if self.model is not None and self.placement is None:
            raise ConfigError(f"{at} model: goes with `placement`, which says where it is called that: set both")
        if self.placement is not None and self.deployments:
            raise ConfigError(f"{at} placement: is the short form of one of `deployments`: keep one of the two")
        if not self.deployed:
            if self.tokenizer is not None:
                raise ConfigError(f"{at} tokenizer: is for a model that runs elsewhere; this one has its own")
            return
        for field in ("path", "keep_alive_s", "preload", "dtype", "quantize", "draft"):
            if getattr(self, field):
                raise ConfigError(f"{at} {field}: is for a model that this machine runs, and this one runs elsewhere")
        places = [each.placement for each in self.deployed]
        if len(set(places)) < len(places):
            raise ConfigError(f"{at} deployments: name each placement once")


class UpstreamConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A placement that is called over HTTP. `base_url` is what `/chat/completions` is added to (`/v1/messages` for
    Anthropic, `/models/...` for Gemini); known providers have one. `server` says whose dialect is spoken there, by
    default the `provider`'s, else what all of them have in common.

    The key is in the environment variable `api_key_env` or the file `api_key_file`, never here; `headers_env` adds
    headers whose values are in the environment. `api_version` is Azure's, which then takes the model's name for a
    deployment's.

    Time limits are for the connection, from the call to the first token, from each token to the next, and for all of
    it. More calls than `max_connections` wait for each other, as many again; beyond that callers get 429.

    `prompt_caching`: at Anthropic marks for its cache are placed where they pay, at OpenAI a tenant's prompts that
    begin alike get one `prompt_cache_key`; what the caller set itself always stands.
    """

    base_url: str | None = None
    server: ServerName | None = None
    api_key_env: str | None = None
    api_key_file: str | None = None
    api_version: str | None = None
    headers_env: dict[str, str] = {}
    connect_timeout_s: _Seconds = 10
    first_token_timeout_s: _Seconds = 300
    between_tokens_timeout_s: _Seconds = 60
    timeout_s: _Seconds = 600
    max_connections: Annotated[int, msgspec.Meta(ge=1, le=10_000)] = 100
    prompt_caching: Literal["auto", "off"] = "auto"

    def spoken(self, provider: str | None) -> ServerName:
        """Whose dialect is spoken there."""
        if self.server is not None:
            return self.server
        provider = "gemini" if provider == "google" else provider
        return next((name for name in get_args(ServerName) if name == provider), "compatible")

    def check(self, placement: str) -> None:
        """Raises ConfigError naming the setting."""
        at = f"[placements.{placement}]"
        if self.api_key_env and self.api_key_file:
            raise ConfigError(f"{at} api_key_file: `api_key_env` is set too: keep one")
        if self.base_url is None:
            return
        try:
            url = urlsplit(self.base_url)
            host, _ = url.hostname, url.port
        except ValueError:
            url, host = urlsplit(""), None
        if url.scheme not in {"http", "https"} or not host or url.query or url.fragment or url.username is not None:
            raise ConfigError(f"{at} base_url: must be like https://host/v1, without a name, a password or a query")

    def secret(self, placement: str) -> str | None:
        """The key; None where there is none to be sent. Raises ConfigError where it can't be had."""
        at = f"[placements.{placement}]"
        if self.api_key_env:
            return _from_environment(self.api_key_env, f"{at} api_key_env")
        if self.api_key_file is None:
            return None
        try:
            key = Path(self.api_key_file).expanduser().read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{at} api_key_file: {self.api_key_file} can't be read ({error})") from None
        return _checked(key, f"{at} api_key_file: {self.api_key_file}")

    def headers(self, placement: str) -> dict[str, str]:
        """The extra headers. Raises ConfigError for a variable that isn't set."""
        at = f"[placements.{placement}] headers_env"
        return {name: _from_environment(variable, f"{at}.{name}") for name, variable in self.headers_env.items()}


def _from_environment(variable: str, where: str) -> str:
    value = os.environ.get(variable)
    if value is None:
        raise ConfigError(f"{where}: the environment variable {variable} is not set: set it before starting")
    return _checked(value.strip(), f"{where}: {variable}")


def _checked(value: str, where: str) -> str:
    if not value or not value.isascii() or not value.isprintable():
        raise ConfigError(f"{where} is empty, or holds more than one printable line: put the bare value there")
    return value
