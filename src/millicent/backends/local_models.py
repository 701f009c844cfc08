"""The models of a local backend: what each is, and what the gateway knows of its state."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from millicent.core.clock import Clock
from millicent.core.errors import InvalidRequest
from millicent.core.request import Request
from millicent.engine.protocol import Draft, Dtype, Load, Quantization

if TYPE_CHECKING:
    from millicent.text import Tokenizer

# Longer prompts than this are encoded on another thread: some 5 ms of the event loop's time.
_INLINE_CHARACTERS = 20_000


class DraftModel(msgspec.Struct, frozen=True):
    """A smaller model that is loaded beside another and guesses for it. Fields as in LocalModel."""

    name: str
    path: Path
    dtype: Dtype | None = None
    quantize: Quantization | None = None


class LocalModel(msgspec.Struct, frozen=True):
    """A model on this machine. `keep_alive_s` without use and it is unloaded; None keeps it, 0 unloads it at once.

    `dtype` and `quantize` None are the engine's. `path` can be what finds the model, or fetches
    it, at its first use: called on a thread of its own. `makes_vectors` says what can't be seen before it is loaded.
    """

    path: Path | Callable[[], Path]
    placement: str
    keep_alive_s: float | None = None
    preload: bool = False
    dtype: Dtype | None = None
    quantize: Quantization | None = None
    makes_vectors: bool = False
    draft: DraftModel | None = None


class ModelState(StrEnum):
    LOADING = "loading"
    LOADED = "loaded"
    UNLOADED = "unloaded"
    FAILED = "failed"


class EngineState(StrEnum):
    STARTING = "starting"
    READY = "ready"
    RESTARTING = "restarting"
    FAILED = "failed"
    STOPPED = "stopped"


class EngineStatus(msgspec.Struct, frozen=True):
    """What `/ready` shows of one engine. `message` is empty when there is nothing to say."""

    device: str
    pid: int | None
    state: EngineState
    models: dict[str, ModelState]
    message: str


class HeldModel:
    """One model's state, as the gateway sees it."""

    def __init__(self, name: str, spec: LocalModel) -> None:
        self.name = name
        self.spec = spec
        self.state = ModelState.UNLOADED
        self.wanted = spec.preload  # load it again after a crash
        self.message = ""
        self.path: Path | None = None  # once it is here
        self.context_tokens = 0
        self.dimensions = 0  # of its vectors; a model without makes text
        self.running = 0  # calls that haven't ended
        self.awaited = 0  # calls that wait for it to be loaded
        self.gives_way_to: asyncio.Task[None] | None = None  # another's loading, which waits until this one is idle
        self.settled_ns = 0  # until then it needn't give way
        self.leaving = False  # somebody asked for it to be unloaded once it is idle
        self.expected_ns: deque[int] = deque()  # until when each call that was prepared may begin
        self.used_ns = 0
        self.failed_ns = 0
        self.loading: asyncio.Task[None] | None = None
        self.unload_timer: asyncio.TimerHandle | None = None
        self.tokenizer: Tokenizer | None = None

    @property
    def keep_alive_s(self) -> float | None:
        return 0.0 if self.leaving else self.spec.keep_alive_s

    def in_use(self, now_ns: int) -> bool:
        """Whether there are calls that must find it loaded."""
        self._drop_late(now_ns)
        return bool(self.running or self.awaited or self.expected_ns)

    def expect(self, now_ns: int, until_ns: int) -> None:
        """A call was prepared, and may begin until then."""
        self._drop_late(now_ns)
        self.expected_ns.append(until_ns)

    def _drop_late(self, now_ns: int) -> None:
        while self.expected_ns and self.expected_ns[0] <= now_ns:
            self.expected_ns.popleft()

    def begin(self) -> None:
        """A call that was prepared has begun."""
        self.running += 1
        if self.expected_ns:
            self.expected_ns.popleft()
        self.keep()

    def keep(self) -> None:
        """It is in use: no unloading for now."""
        if self.unload_timer is not None:
            self.unload_timer.cancel()
            self.unload_timer = None


def load_frame(model: HeldModel, path: Path, dtype: Dtype, calibrates: Callable[[str], bool]) -> Load:
    spec = model.spec
    load = Load(model.name, str(path), spec.dtype or dtype, calibrates(model.name), spec.quantize)
    if (draft := spec.draft) is None:
        return load
    how = Draft(draft.name, str(draft.path), draft.dtype or dtype, calibrates(draft.name), draft.quantize)
    return msgspec.structs.replace(load, draft=how)


def check_taken_here(request: Request) -> None:
    """Raises InvalidRequest for what no model of this machine takes."""
    seed = request.sampling.seed
    if seed is not None and not -(2**63) <= seed < 2**64:
        raise InvalidRequest(f"seed: {seed} doesn't fit 64 bits; use a smaller number", param="seed")
    request.refuse_foreign()
    request.refuse_thinking()
    request.refuse_images()


def check_does(request: Request, model: HeldModel) -> None:
    """Raises InvalidRequest where text is asked of a model that makes vectors, or the reverse, or longer vectors."""
    embedding = request.embedding
    if embedding is None and model.dimensions:
        raise InvalidRequest(
            f"model: {model.name} makes embeddings, not text; send its input to /v1/embeddings", param="model"
        )
    if embedding is not None and not model.dimensions:
        raise InvalidRequest(
            f"model: {model.name} makes text, not embeddings; ask an embedding model (minilm, say)", param="model"
        )
    if embedding is not None and (embedding.dimensions or 0) > model.dimensions:
        raise InvalidRequest(
            f"dimensions: {embedding.dimensions} are more than the {model.dimensions} of {model.name}; ask for fewer",
            param="dimensions",
        )


def load_tokenizer(path: Path, clock: Clock) -> Tokenizer:
    """Raises ModelError."""
    from millicent.text import load_tokenizer as load

    return load(path, clock)


async def encode(request: Request, tokenizer: Tokenizer, *, surrounded: bool = True) -> list[tuple[int, ...]]:
    """Each of the request's prompts as tokens; a text with what the model wants around it. Raises InvalidRequest."""
    if request.messages is not None:
        messages = request.messages
        tools = () if request.tool_choice == "none" else request.tools
        thinking = request.thinking is None or request.thinking.effort != "none"
        characters = sum(len(message.text) for message in messages) + sum(len(tool.parameters) for tool in tools)
        if characters > _INLINE_CHARACTERS:
            return [tuple(await asyncio.to_thread(tokenizer.encode_chat, messages, tools, thinking=thinking))]
        return [tuple(tokenizer.encode_chat(messages, tools, thinking=thinking))]
    if sum(len(prompt) for prompt in request.prompts if isinstance(prompt, str)) > _INLINE_CHARACTERS:
        return await asyncio.to_thread(_encode_prompts, request, tokenizer, surrounded=surrounded)
    return _encode_prompts(request, tokenizer, surrounded=surrounded)


def _encode_prompts(request: Request, tokenizer: Tokenizer, *, surrounded: bool) -> list[tuple[int, ...]]:
    encoded = []
    for prompt in request.prompts:
        if isinstance(prompt, str):
            encoded.append(tuple(tokenizer.encode(prompt, surrounded=surrounded)))
        else:
            check_known(prompt, tokenizer.vocabulary_size, "prompt")
            encoded.append(prompt)
    return encoded


def truncate(request: Request, tokens: tuple[int, ...], context_tokens: int) -> tuple[int, ...]:
    """The last of the prompt's tokens, as many as the request wants kept."""
    keep = request.truncate_prompt_tokens
    if keep is None:
        return tokens
    if keep == -1:
        keep = max(1, context_tokens - max(1, request.limits.max_tokens or 1))
    return tokens[-keep:]


def check_tokens(request: Request, vocabulary_size: int) -> None:
    """Raises InvalidRequest for a token that the model hasn't got."""
    check_known(request.sampling.logit_bias, vocabulary_size, "logit_bias")
    check_known(request.limits.stop_tokens, vocabulary_size, "stop_token_ids")


def check_known(tokens: Iterable[int], vocabulary_size: int, param: str) -> None:
    for token in tokens:
        if not 0 <= token < vocabulary_size:
            raise InvalidRequest(
                f"{param}: token {token} is not one of this model's, which are 0 to {vocabulary_size - 1}", param=param
            )


def check_fits(request: Request, input_tokens: int, context_tokens: int) -> int:
    """How many output tokens the request can have at most. Raises InvalidRequest if there is no room for one."""
    param = "prompt" if request.messages is None else "messages"
    if input_tokens == 0:
        raise InvalidRequest(f"{param}: the prompt has no tokens; send at least one", param=param)
    room = context_tokens - input_tokens
    if room < 1:
        raise InvalidRequest(
            f"{param}: {input_tokens} tokens leave no room for output in the context of {context_tokens} tokens;"
            f" shorten the input to at most {context_tokens - 1}",
            param=param,
            code="context_length_exceeded",
        )
    wanted = request.limits.max_tokens
    return room if wanted is None else min(wanted, room)
