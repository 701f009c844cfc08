"""What Gemini's `generateContent` answers with, read chunk by chunk, or whole."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from millicent.core.chunks import CallPiece, Candidate, FinishReason, Text, TokenLogprob
from millicent.core.usage import Count, Leaf, Provenance, Usage
from millicent.wire import upstream_answers
from millicent.wire.reported import split, tokens_told

_ENDS = {"STOP": FinishReason.STOP, "MAX_TOKENS": FinishReason.LENGTH}
_WITHHELD = frozenset(
    {
        "SAFETY",
        "RECITATION",
        "LANGUAGE",
        "BLOCKLIST",
        "PROHIBITED_CONTENT",
        "SPII",
        "IMAGE_SAFETY",
        "IMAGE_PROHIBITED_CONTENT",
        "IMAGE_RECITATION",
    }
)
_UNSAID = "FINISH_REASON_UNSPECIFIED"


class _Function(msgspec.Struct, frozen=True):
    name: str
    args: msgspec.Raw = msgspec.Raw(b"{}")


class _Part(msgspec.Struct, frozen=True, rename="camel"):
    text: str = ""
    thought: bool = False
    thought_signature: str = ""
    function_call: _Function | None = None


class _Content(msgspec.Struct, frozen=True):
    parts: list[_Part] = []


class _Token(msgspec.Struct, frozen=True, rename="camel"):
    token: str = ""
    log_probability: float = 0.0


class _Top(msgspec.Struct, frozen=True):
    candidates: list[_Token] = []


class _Logprobs(msgspec.Struct, frozen=True, rename="camel"):
    chosen_candidates: list[_Token] = []
    top_candidates: list[_Top] = []


class _Candidate(msgspec.Struct, frozen=True, rename="camel"):
    index: int = 0
    content: _Content = _Content()
    finish_reason: str | None = None
    logprobs_result: _Logprobs | None = None


class _Modality(msgspec.Struct, frozen=True, rename="camel"):
    modality: str = ""
    token_count: int = 0


class _Usage(msgspec.Struct, frozen=True, rename="camel"):
    """A count that is left out is 0: that is how the format writes it."""

    prompt_token_count: int = 0
    cached_content_token_count: int = 0
    candidates_token_count: int = 0
    thoughts_token_count: int = 0
    tool_use_prompt_token_count: int = 0
    prompt_tokens_details: list[_Modality] = []
    cache_tokens_details: list[_Modality] = []
    candidates_tokens_details: list[_Modality] = []
    tool_use_prompt_tokens_details: list[_Modality] = []


class _Feedback(msgspec.Struct, frozen=True, rename="camel"):
    block_reason: str | None = None


class _Chunk(msgspec.Struct, frozen=True, rename="camel"):
    candidates: list[_Candidate] = []
    prompt_feedback: _Feedback | None = None
    usage_metadata: _Usage | None = None
    model_version: str | None = None
    response_id: str | None = None
    error: Any = None


_decoder = msgspec.json.Decoder(_Chunk)


class _ChoiceState:
    def __init__(self) -> None:
        self.reason: FinishReason | None = None
        self.calls = 0


class AnswerReader(upstream_answers.AnswerReader):
    """Never `over` before the stream is: the last count may come after the end of the last choice."""

    def __init__(self, choices: int) -> None:
        super().__init__()
        self._told: _Usage | None = None
        self._choices = [_ChoiceState() for _ in range(choices)]

    @property
    def ended(self) -> bool:
        return all(choice.reason is not None for choice in self._choices)

    @property
    def reasons(self) -> tuple[FinishReason, ...]:
        return tuple(choice.reason or FinishReason.STOP for choice in self._choices)

    @property
    def usage(self) -> Usage | None:
        """An answer that broke off has its output from characters where that is more."""
        if self._told is None:
            return None
        usage = usage_of(self._told)
        if self.ended or (usage.output_tokens or 0) >= self.output_estimate:
            return usage
        thought = usage.tokens(Leaf.OUTPUT_REASONING) or 0
        left = Count(max(0, self.output_estimate - thought), Provenance.ESTIMATED)
        return Usage(usage.leaves | {Leaf.OUTPUT_TEXT: left})

    def take(self, data: bytes) -> list[Text]:
        chunk = _decoder.decode(data)
        if chunk.error:
            self.failure = {"error": chunk.error}
            return []
        self.id = self.id or chunk.response_id
        self.served_model = chunk.model_version or self.served_model
        self._told = chunk.usage_metadata or self._told
        if chunk.prompt_feedback is not None and chunk.prompt_feedback.block_reason:
            for choice in self._choices:
                choice.reason = FinishReason.CONTENT_FILTER
        return [text for candidate in chunk.candidates for text in self._texts(candidate)]

    def _texts(self, candidate: _Candidate) -> Iterator[Text]:
        if not 0 <= candidate.index < len(self._choices):
            raise msgspec.DecodeError(f"a candidate {candidate.index} that nobody asked for")
        choice = self._choices[candidate.index]
        logprobs = _logprobs(candidate.logprobs_result)
        for part in candidate.content.parts:
            if part.text and part.thought:
                yield self._text(candidate.index, len(part.text), reasoning=part.text)
            elif part.text:
                yield self._text(candidate.index, len(part.text), part.text, logprobs=logprobs)
                logprobs = ()
            if part.thought_signature:
                yield self._text(candidate.index, 0, signature=part.thought_signature)
            if (function := part.function_call) is not None:
                arguments = bytes(function.args).decode()
                call = CallPiece(choice.calls, function.name, "{}" if arguments == "null" else arguments)
                choice.calls += 1
                yield self._text(candidate.index, len(call.name) + len(call.arguments), calls=(call,))
        if logprobs:
            yield self._text(candidate.index, 0, logprobs=logprobs)
        self._end(choice, candidate.finish_reason)

    def _end(self, choice: _ChoiceState, said: str | None) -> None:
        if not said or said == _UNSAID:
            return
        if said in _WITHHELD:
            choice.reason = FinishReason.CONTENT_FILTER
        elif said in _ENDS:
            stopped = _ENDS[said]
            choice.reason = FinishReason.TOOL_CALLS if choice.calls and stopped is FinishReason.STOP else stopped
        else:
            self.failed = said

    def _text(self, choice: int, characters: int, text: str = "", **fields: Any) -> Text:
        tokens = self._counted(characters) if characters else 0
        cached = None if self._told is None else tokens_told(self._told.cached_content_token_count)
        return Text(text, tokens, choice, cached_tokens=cached, **fields)


def usage_of(usage: _Usage) -> Usage:
    """Disjoint leaves of overlapping totals. What is cached is part of the prompt's; what tools brought stands beside
    it, and thoughts beside what was said."""
    read = usage.prompt_token_count + usage.tool_use_prompt_token_count
    details = [*usage.prompt_tokens_details, *usage.tool_use_prompt_tokens_details]
    image = _count(details, "IMAGE") - _count(usage.cache_tokens_details, "IMAGE")
    audio = _count(details, "AUDIO") - _count(usage.cache_tokens_details, "AUDIO")
    leaves = split(
        read,
        Leaf.INPUT_FRESH,
        {
            Leaf.INPUT_CACHE_READ: usage.cached_content_token_count,
            Leaf.INPUT_IMAGE: max(0, image) or None,
            Leaf.INPUT_AUDIO: max(0, audio) or None,
        },
    )
    leaves |= split(
        usage.candidates_token_count,
        Leaf.OUTPUT_TEXT,
        {
            Leaf.OUTPUT_IMAGE: _count(usage.candidates_tokens_details, "IMAGE") or None,
            Leaf.OUTPUT_AUDIO: _count(usage.candidates_tokens_details, "AUDIO") or None,
        },
    )
    if thoughts := tokens_told(usage.thoughts_token_count):
        leaves[Leaf.OUTPUT_REASONING] = Count(thoughts, Provenance.REPORTED)
    return Usage(leaves)


def _count(details: list[_Modality], modality: str) -> int:
    return sum(each.token_count for each in details if each.modality == modality)


def _logprobs(found: _Logprobs | None) -> tuple[TokenLogprob, ...]:
    if found is None:
        return ()
    tops = found.top_candidates or [_Top()] * len(found.chosen_candidates)
    if len(tops) != len(found.chosen_candidates):
        raise msgspec.DecodeError("log probabilities of different lengths")
    return tuple(
        TokenLogprob(
            chosen.token.encode(),
            chosen.log_probability,
            tuple(Candidate(each.token.encode(), each.log_probability) for each in top.candidates),
        )
        for chosen, top in zip(found.chosen_candidates, tops, strict=True)
    )
