"""What an upstream that speaks OpenAI's dialect answers with, read chunk by chunk, or whole."""

from __future__ import annotations

import base64
import struct
from collections.abc import Sequence
from decimal import Decimal
from typing import Annotated, Any

import msgspec

from millicent.core.chunks import CallPiece, Candidate, FinishReason, Text, TokenLogprob, Vector
from millicent.core.usage import Count, Leaf, Provenance, Usage
from millicent.wire import upstream_answers
from millicent.wire.reported import cost_told, split, tokens_told


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


class _Detail(msgspec.Struct, frozen=True):
    """`reasoning.text` and `reasoning.summary`; what is encrypted shows nothing."""

    text: str | None = None
    summary: str | None = None


class _Delta(msgspec.Struct, frozen=True):
    content: str | list[Any] | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    reasoning_details: list[_Detail] | None = None  # OpenRouter
    tool_calls: list[_Call] | None = None


class _Likely(msgspec.Struct, frozen=True):
    token: str
    logprob: float
    bytes: list[Annotated[int, msgspec.Meta(ge=0, le=255)]] | None = None


class _Token(_Likely, frozen=True):
    top_logprobs: list[_Likely] | None = None


class _Logprobs(msgspec.Struct, frozen=True):
    """In chat's shape, or in that of text completions."""

    content: list[_Token] | None = None
    tokens: list[str] | None = None
    token_logprobs: list[float | None] | None = None
    top_logprobs: list[dict[str, float] | None] | None = None


class _Choice(msgspec.Struct, frozen=True):
    """Of a chunk or of a whole answer, of chat or of text."""

    index: int = 0
    delta: _Delta | None = None
    message: _Delta | None = None
    text: str | None = None
    finish_reason: str | None = None
    logprobs: _Logprobs | None = None


class _Groq(msgspec.Struct, frozen=True):
    usage: _Usage | None = None


class _Chunk(msgspec.Struct, frozen=True):
    id: str | None = None
    model: str | None = None
    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    x_groq: _Groq | None = None
    error: Any = None


# llama.cpp's streams of several prompts begin with a null.
_decoder = msgspec.json.Decoder(_Chunk | None, strict=False)
# No chunk is so short; the word that ends a stream is, with blanks around it.
_SHORTER_THAN_JSON = 16

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


class AnswerReader(upstream_answers.AnswerReader):
    """`over` with the word that ends a stream, after which nothing more need come."""

    def __init__(self, answers: int = 1, *, choices: int | None = None) -> None:
        """`choices` is set where each answer's usage comes by itself: then so many answers in a row are of one prompt,
        which counts once."""
        super().__init__()
        self._answers = answers
        self._each = choices
        self._prompts: set[int] = set()  # whose usage was told
        self._usage: Usage | None = None
        self._choices: dict[int, _ChoiceState] = {}
        self._told = 0  # tokens that texts were said to have
        self._reported = 0

    @property
    def usage(self) -> Usage | None:
        return self._usage

    @property
    def reasons(self) -> tuple[FinishReason, ...]:
        """Of those choices that came."""
        return tuple(self._reason(self._choices[index]) for index in sorted(self._choices)) or (FinishReason.STOP,)

    @property
    def ended(self) -> bool:
        """A server that ended its stream need not have said why."""
        if self.over and self._choices:
            return True
        return len(self._choices) == self._answers and all(each.reason is not None for each in self._choices.values())

    def take(self, data: bytes) -> list[Text]:
        if len(data) < _SHORTER_THAN_JSON and data.strip() == b"[DONE]":
            self.over = True
            return []
        chunk = _decoder.decode(data)
        if chunk is None:
            return []
        if chunk.error:
            self.failure = {"error": chunk.error}
            return []
        if self.id is None:
            self.id = chunk.id
        if chunk.model:
            self.served_model = chunk.model
        usage = chunk.usage or (chunk.x_groq.usage if chunk.x_groq else None)
        if usage is not None and (found := usage_of(usage)) is not None:
            self._usage = found if self._each is None else self._with(found, chunk.choices or (), self._each)
            self._reported = self._usage.output_tokens or 0
            self.cost = cost_told(usage.cost) or self.cost
        texts = []
        for choice in chunk.choices or ():
            text = self._text(choice)
            if text is not None:
                texts.append(text)
        return texts

    def _with(self, found: Usage, told: Sequence[_Choice], choices: int) -> Usage:
        """What was told before and that of another answer. A chunk that names none is of the one prompt of a chat."""
        prompt = told[0].index // choices if told else 0
        leaves = dict(self._usage.leaves if self._usage is not None else {})
        for leaf, count in found.leaves.items():
            if count.tokens is not None and not (leaf.is_input and prompt in self._prompts):
                before = leaves.get(leaf)
                leaves[leaf] = Count(count.tokens + (before.tokens or 0 if before else 0), count.provenance)
        self._prompts.add(prompt)
        return Usage(leaves)

    def _reason(self, state: _ChoiceState) -> FinishReason:
        if state.refused:
            return FinishReason.CONTENT_FILTER
        reason = state.reason or FinishReason.STOP
        return FinishReason.TOOL_CALLS if state.called and reason is FinishReason.STOP else reason

    def _text(self, choice: _Choice) -> Text | None:
        state = self._choices.get(choice.index)
        if state is None:
            if not 0 <= choice.index < self._answers:
                raise msgspec.DecodeError(f"a choice {choice.index} that nobody asked for")
            state = self._choices[choice.index] = _ChoiceState()
        if choice.finish_reason:
            if choice.finish_reason in _FAILURES:
                self.failed = choice.finish_reason
            state.reason = _ENDS.get(choice.finish_reason, FinishReason.STOP)
        delta = choice.delta or choice.message or _NOTHING
        text, reasoning = delta.content, delta.reasoning_content or delta.reasoning or ""
        if delta.reasoning_details and not reasoning:  # as a rule it is said in both ways
            reasoning = "".join(each.text or each.summary or "" for each in delta.reasoning_details)
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
        tokens = max(0, (self._reported or self.output_estimate) - self._told)
        self._told += tokens
        cached = None if self._usage is None else self._usage.tokens(Leaf.INPUT_CACHE_READ)
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
            thinking += _content(inner)[0] if isinstance(inner, str | list) else ""
    return text, thinking


def usage_of(usage: _Usage) -> Usage | None:
    """Disjoint leaves of overlapping totals; None where it says nothing that can be. An explicit zero is a zero.

    Cached and written tokens are part of the prompt's. Reasoning is part of the completion's, unless the total says
    that it stands beside it; or there is more of it, and the total doesn't say that there isn't. A total that goes
    beyond what it is told to consist of has reasoning in it that was left out: charged for there, and assumed here.
    """
    read, written = tokens_told(usage.prompt_tokens) or 0, tokens_told(usage.completion_tokens)
    inputs, outputs = (
        usage.prompt_tokens_details or _InputDetails(),
        usage.completion_tokens_details or _OutputDetails(),
    )
    cached = inputs.cached_tokens if inputs.cached_tokens is not None else usage.prompt_cache_hit_tokens
    leaves = split(
        usage.prompt_tokens,
        Leaf.INPUT_FRESH,
        {
            Leaf.INPUT_CACHE_READ: cached,
            Leaf.INPUT_CACHE_WRITE_5M: inputs.cache_write_tokens or None,
            Leaf.INPUT_AUDIO: inputs.audio_tokens or None,
        },
    )
    if written is not None:
        reasoning = tokens_told(outputs.reasoning_tokens) or 0
        within = read + written
        apart = usage.total_tokens == within + reasoning or (reasoning > written and usage.total_tokens != within)
        parts = {Leaf.OUTPUT_REASONING: reasoning or None, Leaf.OUTPUT_AUDIO: outputs.audio_tokens or None}
        leaves |= split(written + reasoning if apart else written, Leaf.OUTPUT_TEXT, parts)
        left_out = (tokens_told(usage.total_tokens) or 0) - within
        if left_out > 0 and not reasoning and usage.prompt_tokens is not None:
            leaves[Leaf.OUTPUT_REASONING] = Count(left_out, Provenance.ASSUMED)
    return Usage(leaves) if leaves else None


def _logprobs(found: _Logprobs) -> tuple[TokenLogprob, ...]:
    if found.content:
        return tuple(
            TokenLogprob(_bytes(one), one.logprob, tuple(map(_candidate, one.top_logprobs or ())))
            for one in found.content
        )
    tokens, logprobs = found.tokens or (), found.token_logprobs or ()
    tops = found.top_logprobs or [None] * len(tokens)
    if not len(tokens) == len(logprobs) == len(tops):
        raise msgspec.DecodeError("log probabilities of different lengths")
    return tuple(
        TokenLogprob(
            token.encode(), logprob, tuple(Candidate(other.encode(), value) for other, value in (top or {}).items())
        )
        for token, logprob, top in zip(tokens, logprobs, tops, strict=True)
    )


def _candidate(one: _Likely) -> Candidate:
    return Candidate(_bytes(one), one.logprob)


def _bytes(one: _Likely) -> bytes:
    return bytes(one.bytes) if one.bytes is not None else one.token.encode()


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
        self.cost = None if found.usage is None else cost_told(found.usage.cost)
        self.vectors = [Vector(each.index, _floats(each.embedding), 0) for each in found.data]


def _floats(given: list[float] | str) -> bytes:
    """Little-endian float32."""
    try:
        values = base64.b64decode(given, validate=True) if isinstance(given, str) else _packed(given)
    except (ValueError, OverflowError):
        raise msgspec.DecodeError("a vector that is neither base64 nor of 32-bit numbers") from None
    if not values or len(values) % 4:
        raise msgspec.DecodeError(f"a vector of {len(values)} bytes")
    return values


def _packed(values: list[float]) -> bytes:
    return struct.pack(f"<{len(values)}f", *values)
