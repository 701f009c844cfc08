"""What Anthropic's Messages answer with, read event by event, or whole."""

from __future__ import annotations

from typing import Any

import msgspec

from millicent.core.chunks import CallPiece, FinishReason, Text
from millicent.core.usage import Count, Leaf, Provenance, Usage
from millicent.wire import upstream_answers
from millicent.wire.reported import split, tokens_told

_ENDS = {
    "max_tokens": FinishReason.LENGTH,
    "model_context_window_exceeded": FinishReason.LENGTH,
    "tool_use": FinishReason.TOOL_CALLS,
    "refusal": FinishReason.CONTENT_FILTER,
}


class _CacheCreation(msgspec.Struct, frozen=True):
    ephemeral_5m_input_tokens: int | None = None
    ephemeral_1h_input_tokens: int | None = None


class _OutputDetails(msgspec.Struct, frozen=True):
    thinking_tokens: int | None = None


class _Usage(msgspec.Struct, frozen=True):
    input_tokens: int | None = None
    output_tokens: int | None = None
    cache_read_input_tokens: int | None = None
    cache_creation_input_tokens: int | None = None
    cache_creation: _CacheCreation | None = None
    output_tokens_details: _OutputDetails | None = None


class _Block(msgspec.Struct, frozen=True):
    """Of a whole answer, of an event that begins one, or what an event adds to one."""

    type: str = ""
    text: str = ""
    thinking: str = ""
    signature: str = ""
    data: str = ""
    name: str = ""
    input: msgspec.Raw = msgspec.Raw(b"{}")
    partial_json: str = ""


class _Message(msgspec.Struct, frozen=True):
    id: str | None = None
    model: str | None = None
    content: list[_Block] = []
    stop_reason: str | None = None
    stop_sequence: str | None = None
    usage: _Usage | None = None


class _Delta(_Block, frozen=True):
    stop_reason: str | None = None
    stop_sequence: str | None = None


class _Event(_Message, frozen=True):
    """A whole answer is an event of the type `message`."""

    type: str = ""
    index: int = 0
    message: _Message | None = None
    content_block: _Block | None = None
    delta: _Delta | None = None
    error: Any = None


_decoder = msgspec.json.Decoder(_Event)


class AnswerReader(upstream_answers.AnswerReader):
    """`over` with the last of its events."""

    def __init__(self) -> None:
        super().__init__()
        self._reason = FinishReason.STOP
        self._told = _Usage()
        self._final = False  # whether the output's count is
        self._calls: dict[int, bool] = {}  # by block: whether arguments came

    @property
    def ended(self) -> bool:
        return self.over

    @property
    def reasons(self) -> tuple[FinishReason, ...]:
        return (self._reason,)

    @property
    def usage(self) -> Usage | None:
        """An answer that broke off has its output from characters."""
        told, output = self._told, tokens_told(self._told.output_tokens)
        if tokens_told(told.input_tokens) is None and output is None:
            return None
        written = told.cache_creation or _CacheCreation()
        short, long = written.ephemeral_5m_input_tokens, written.ephemeral_1h_input_tokens
        if short is None and long is None:
            short = told.cache_creation_input_tokens
        counts = {
            Leaf.INPUT_FRESH: told.input_tokens,
            Leaf.INPUT_CACHE_READ: told.cache_read_input_tokens,
            Leaf.INPUT_CACHE_WRITE_5M: short,
            Leaf.INPUT_CACHE_WRITE_1H: long,
        }
        leaves = {
            leaf: Count(tokens, Provenance.REPORTED)
            for leaf, said in counts.items()
            if (tokens := tokens_told(said)) is not None
        }
        if output is None or not self._final:
            output = max(self.output_estimate, output or 0)
            return Usage(leaves | {Leaf.OUTPUT_TEXT: Count(output, Provenance.ESTIMATED)})
        thought = (told.output_tokens_details or _OutputDetails()).thinking_tokens
        return Usage(leaves | split(output, Leaf.OUTPUT_TEXT, {Leaf.OUTPUT_REASONING: thought or None}))

    @property
    def _cached(self) -> int | None:
        return tokens_told(self._told.cache_read_input_tokens)

    def take(self, data: bytes) -> list[Text]:
        event = _decoder.decode(data)
        match event.type:
            case "message_start" if event.message is not None:
                self._begin(event.message)
            case "content_block_start" if event.content_block is not None:
                return self._texts(event.index, event.content_block, begins=True)
            case "content_block_delta" if event.delta is not None:
                return self._texts(event.index, event.delta, begins=False)
            case "content_block_stop" if self._calls.get(event.index) is False:
                return [self._piece(event.index, "", "{}")]
            case "message_delta" if event.delta is not None:
                self._use(event.usage, final=True)
                return self._finish(event.delta.stop_reason, event.delta.stop_sequence)
            case "message_stop":
                self.over = True
            case "error":
                self.failure = {"error": event.error}
            case "message":
                return self._whole(event)
        return []

    def _begin(self, message: _Message, *, final: bool = False) -> None:
        self.id, self.served_model = message.id, message.model
        self._use(message.usage, final=final)

    def _use(self, usage: _Usage | None, *, final: bool) -> None:
        """Counts are of all so far: later ones stand in for earlier, where they are told again."""
        if usage is None:
            return
        later = {name: value for name in usage.__struct_fields__ if (value := getattr(usage, name)) is not None}
        self._told = msgspec.structs.replace(self._told, **later)
        self._final = self._final or final

    def _whole(self, event: _Event) -> list[Text]:
        self._begin(event, final=True)
        texts = []
        for index, block in enumerate(event.content):
            texts += self._texts(index, block, begins=True)
            if block.type == "tool_use":
                texts.append(self._piece(index, "", bytes(block.input).decode()))
        self.over = True
        return texts + self._finish(event.stop_reason, event.stop_sequence)

    def _texts(self, index: int, block: _Block, *, begins: bool) -> list[Text]:
        if begins and block.type == "tool_use":
            self._calls[index] = False
            return [self._piece(index, block.name, "")]
        if block.partial_json:
            return [self._piece(index, "", block.partial_json)] if index in self._calls else []
        if not (block.text or block.thinking or block.signature or block.data):
            return []
        return [self._text(block.text, block.thinking, block.signature, block.data)]

    def _text(self, text: str, reasoning: str, signature: str, sealed: str) -> Text:
        tokens = self._counted(len(text) + len(reasoning)) if text or reasoning else 0
        return Text(text, tokens, cached_tokens=self._cached, reasoning=reasoning, signature=signature, sealed=sealed)

    def _piece(self, index: int, name: str, arguments: str) -> Text:
        self._calls[index] = self._calls[index] or bool(arguments)
        call = CallPiece(list(self._calls).index(index), name, arguments)
        return Text("", self._counted(len(name) + len(arguments)), cached_tokens=self._cached, calls=(call,))

    def _finish(self, reason: str | None, stop: str | None) -> list[Text]:
        self._reason = _ENDS.get(reason or "", FinishReason.STOP)
        return [Text("", 0, cached_tokens=self._cached, stop=stop)] if stop else []
