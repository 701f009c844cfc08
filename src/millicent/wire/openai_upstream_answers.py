"""What an upstream that speaks OpenAI's dialect answers with, read chunk by chunk, or whole."""

from __future__ import annotations

import base64
import struct
from decimal import Decimal
from typing import Any

import msgspec

from millicent.core.chunks import CallPiece, Candidate, FinishReason, Text, TokenLogprob, Vector
from millicent.core.money import Money
from millicent.core.usage import Count, Leaf, Provenance, Usage

# English text in the tokenizers of the day: about four characters to a token.
CHARACTERS_PER_TOKEN = 4


class _InputDetails(msgspec.Struct, frozen=True):
    cached_tokens: int | None = None
    cache_write_tokens: int | None = None  # OpenRouter
    audio_tokens: int | None = None


class _OutputDetails(msgspec.Struct, frozen=True):
    reasoning_tokens: int | None = None
    audio_tokens: int | None = None


class _Usage(msgspec.Struct, frozen=True):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    total_tokens: int | None = None
    prompt_tokens_details: _InputDetails | None = None
    completion_tokens_details: _OutputDetails | None = None
    prompt_cache_hit_tokens: int | None = None  # DeepSeek
    cost: Decimal | None = None  # OpenRouter, Millicent


class _Function(msgspec.Struct, frozen=True):
    name: str | None = None
    arguments: str | dict[str, Any] | None = None


class _Call(msgspec.Struct, frozen=True):
    index: int | None = None
    id: str | None = None
    function: _Function | None = None


class _Delta(msgspec.Struct, frozen=True):
    content: str | list[Any] | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[_Call] | None = None


class _Choice(msgspec.Struct, frozen=True):
    """Of a chunk or of a whole answer, of chat or of text."""

    index: int = 0
    delta: _Delta | None = None
    message: _Delta | None = None
    text: str | None = None
    finish_reason: str | None = None
    logprobs: dict[str, Any] | None = None


class _Groq(msgspec.Struct, frozen=True):
    usage: _Usage | None = None


class _Chunk(msgspec.Struct, frozen=True):
    id: str | None = None
    model: str | None = None
    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    x_groq: _Groq | None = None
    error: Any = None


_decoder = msgspec.json.Decoder(_Chunk, strict=False)

_ENDS: dict[str, FinishReason] = {
    "length": FinishReason.LENGTH,
    "model_length": FinishReason.LENGTH,  # Mistral
    "max_tokens": FinishReason.LENGTH,
    "tool_calls": FinishReason.TOOL_CALLS,
    "function_call": FinishReason.TOOL_CALLS,
    "content_filter": FinishReason.CONTENT_FILTER,
}
# It ended, but not as an answer does.
_FAILURES = frozenset({"error", "abort", "insufficient_system_resource"})


class _ChoiceState:
    """What is known of one choice. Calls are told apart by their index, or by their identifier where there is none."""

    def __init__(self) -> None:
        self.reason: FinishReason | None = None
        self.refused = False
        self._calls: dict[int | str, int] = {}

    @property
    def called(self) -> bool:
        return bool(self._calls)

    def pieces(self, calls: list[_Call]) -> tuple[CallPiece, ...]:
        found = []
        for call in calls:
            key: int | str | None = call.index
            if key is None:
                key = call.id or (list(self._calls)[-1] if self._calls else 0)
            function = call.function or _Function()
            new = key not in self._calls
            if new:
                self._calls[key] = len(self._calls)
            arguments = function.arguments or ""
            if isinstance(arguments, dict):
                arguments = msgspec.json.encode(arguments).decode()
            name = function.name or "" if new else ""
            if name or arguments:
                found.append(CallPiece(self._calls[key], name, arguments))
        return tuple(found)


class AnswerReader:
    """Chunks, or one whole answer, to text. Raises msgspec.DecodeError for what isn't one.

    `failure` is a chunk that holds an error in place of an answer; `failed` a finish reason that is none.
    """

    def __init__(self) -> None:
        self.usage: Usage | None = None
        self.cost: Money | None = None
        self.served_model: str | None = None
        self.id: str | None = None
        self.failure: dict[str, Any] | None = None
        self.failed: str | None = None
        self._choices: dict[int, _ChoiceState] = {}
        self._pieces = 0
        self._characters = 0
        self._told = 0  # tokens that texts were said to have
        self._reported = 0

    @property
    def output_estimate(self) -> int:
        """Tokens of what came: hardly any server sends a piece of less than one, and English has four characters in
        each."""
        return max(self._pieces, -(-self._characters // CHARACTERS_PER_TOKEN))

    @property
    def reasons(self) -> tuple[FinishReason, ...]:
        """How each choice ended; stop where it wasn't said."""
        return tuple(self._reason(self._choices[index]) for index in sorted(self._choices)) or (FinishReason.STOP,)

    def ended(self, choices: int) -> bool:
        """Has every choice said how it ended?"""
        return len(self._choices) >= choices and all(each.reason is not None for each in self._choices.values())

    def take(self, data: bytes) -> list[Text]:
        chunk = _decoder.decode(data)
        if chunk.error:
            self.failure = {"error": chunk.error}
            return []
        if self.id is None:
            self.id = chunk.id
        if chunk.model:
            self.served_model = chunk.model
        usage = chunk.usage or (chunk.x_groq.usage if chunk.x_groq else None)
        if usage is not None and (found := usage_of(usage)) is not None:
            self.usage = found
            self._reported = found.output_tokens or 0
            self.cost = self.cost if usage.cost is None else Money.from_usd(usage.cost)
        texts = []
        for choice in chunk.choices or ():
            text = self._text(choice)
            if text is not None:
                texts.append(text)
        return texts

    def _reason(self, state: _ChoiceState) -> FinishReason:
        if state.refused:
            return FinishReason.CONTENT_FILTER
        reason = state.reason or FinishReason.STOP
        return FinishReason.TOOL_CALLS if state.called and reason is FinishReason.STOP else reason

    def _text(self, choice: _Choice) -> Text | None:
        state = self._choices.get(choice.index)
        if state is None:
            state = self._choices[choice.index] = _ChoiceState()
        if choice.finish_reason:
            if choice.finish_reason in _FAILURES:
                self.failed = choice.finish_reason
            state.reason = _ENDS.get(choice.finish_reason, FinishReason.STOP)
        delta = choice.delta or choice.message or _NOTHING
        text, reasoning = delta.content, delta.reasoning_content or delta.reasoning or ""
        if not isinstance(text, str):
            text, thinking = _content(text)
            reasoning = thinking + reasoning
        if choice.text:
            text = choice.text + text
        if delta.refusal:
            text += delta.refusal
            state.refused = True
        calls = state.pieces(delta.tool_calls) if delta.tool_calls else ()
        logprobs = _logprobs(choice.logprobs) if choice.logprobs else ()
        if not (text or reasoning or calls or logprobs):
            return None
        self._pieces += len(logprobs) or 1
        self._characters += len(text) + len(reasoning)
        for call in calls:
            self._characters += len(call.name) + len(call.arguments)
        tokens = (self._reported or self.output_estimate) - self._told
        if tokens > 0:
            self._told += tokens
        else:
            tokens = 0
        cached = None if self.usage is None else self.usage.tokens(Leaf.INPUT_CACHE_READ)
        return Text(text, tokens, choice.index, logprobs, cached, calls, reasoning)


_NOTHING = _Delta()


def _content(content: str | list[Any] | None) -> tuple[str, str]:
    """Text and thinking; Mistral's reasoning models answer in parts."""
    if content is None or isinstance(content, str):
        return content or "", ""
    text, thinking = "", ""
    for part in content:
        if isinstance(part, dict) and part.get("type") == "text":
            text += str(part.get("text") or "")
        elif isinstance(part, dict) and part.get("type") == "thinking":
            inner = part.get("thinking")
            thinking += inner if isinstance(inner, str) else _content(inner)[0]
    return text, thinking


def usage_of(usage: _Usage) -> Usage | None:
    """Disjoint leaves of overlapping totals; None where it says nothing. An explicit zero is a zero.

    Cached and written tokens are part of the prompt's. Reasoning is part of the completion's, unless the total says
    that it stands beside it.
    """
    read, written = usage.prompt_tokens, usage.completion_tokens
    if read is None and written is None:
        return None
    known = Provenance.REPORTED
    inputs, outputs = (
        usage.prompt_tokens_details or _InputDetails(),
        usage.completion_tokens_details or _OutputDetails(),
    )
    leaves: dict[Leaf, Count] = {}
    if read is not None:
        cached = inputs.cached_tokens if inputs.cached_tokens is not None else usage.prompt_cache_hit_tokens
        parts = {
            Leaf.INPUT_CACHE_READ: cached,
            Leaf.INPUT_CACHE_WRITE_5M: inputs.cache_write_tokens or None,
            Leaf.INPUT_AUDIO: inputs.audio_tokens or None,
        }
        rest = read - sum(count for count in parts.values() if count is not None)
        leaves[Leaf.INPUT_FRESH] = Count(max(0, rest), known)
        leaves |= {leaf: Count(count, known) for leaf, count in parts.items() if count is not None}
    if written is not None:
        reasoning, audio = outputs.reasoning_tokens or 0, outputs.audio_tokens or 0
        apart = reasoning > 0 and usage.total_tokens == (read or 0) + written + reasoning
        text = written - audio - (0 if apart else reasoning)
        leaves[Leaf.OUTPUT_TEXT] = Count(max(0, text), known)
        if reasoning:
            leaves[Leaf.OUTPUT_REASONING] = Count(reasoning, known)
        if audio:
            leaves[Leaf.OUTPUT_AUDIO] = Count(audio, known)
    return Usage(leaves)


def _logprobs(found: dict[str, Any]) -> tuple[TokenLogprob, ...]:
    """In chat's shape, or in that of text completions."""
    try:
        if content := found.get("content"):
            return tuple(
                TokenLogprob(_bytes(one), one["logprob"], tuple(map(_candidate, one.get("top_logprobs") or ())))
                for one in content
            )
        tokens, logprobs = found.get("tokens") or (), found.get("token_logprobs") or ()
        tops = found.get("top_logprobs") or [None] * len(tokens)
        return tuple(
            TokenLogprob(
                token.encode(),
                logprob,
                tuple(Candidate(other.encode(), value) for other, value in (top or {}).items()),
            )
            for token, logprob, top in zip(tokens, logprobs, tops, strict=True)
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise msgspec.DecodeError(f"log probabilities in no known shape ({type(error).__name__})") from None


def _candidate(one: dict[str, Any]) -> Candidate:
    return Candidate(_bytes(one), one["logprob"])


def _bytes(one: dict[str, Any]) -> bytes:
    exact = one.get("bytes")
    return bytes(exact) if exact is not None else str(one["token"]).encode()


class _Vector(msgspec.Struct, frozen=True):
    embedding: list[float] | str
    index: int = 0


class _Vectors(msgspec.Struct, frozen=True):
    data: list[_Vector]
    model: str | None = None
    usage: _Usage | None = None
    id: str | None = None


_vectors_decoder = msgspec.json.Decoder(_Vectors)


class VectorsReader:
    """A whole answer of embeddings. Raises msgspec.DecodeError for what isn't one, or isn't `inputs` vectors."""

    def __init__(self, body: bytes, inputs: int) -> None:
        found = _vectors_decoder.decode(body)
        if sorted(vector.index for vector in found.data) != list(range(inputs)):
            raise msgspec.DecodeError(f"{len(found.data)} vectors for {inputs} inputs, or with wrong numbers")
        self.served_model = found.model
        self.id = found.id
        self.usage = None if found.usage is None else usage_of(found.usage)
        self.cost = None if found.usage is None or found.usage.cost is None else Money.from_usd(found.usage.cost)
        self.vectors = [Vector(each.index, _floats(each.embedding), 0) for each in found.data]


def _floats(given: list[float] | str) -> bytes:
    """Little-endian float32."""
    if isinstance(given, str):
        try:
            return base64.b64decode(given, validate=True)
        except ValueError:
            raise msgspec.DecodeError("a vector that is not base64") from None
    return struct.pack(f"<{len(given)}f", *given)
