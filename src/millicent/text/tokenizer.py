"""One tokenizer per model, from a GGUF's own metadata or from a Hugging Face directory."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from millicent.core.clock import Clock, SystemClock
from millicent.core.errors import InvalidRequest, ModelError
from millicent.core.request import Message, Tool
from millicent.text.gguf import find_gguf, read_gguf_head
from millicent.text.grammars import vocabulary
from millicent.text.reasoning import reasons, without_reasoning
from millicent.text.templates import ChatTemplate, SpecialTokens
from millicent.text.tools import CALL_TOKENS, ToolFormat, message_entries, tool_entries, tool_format

if TYPE_CHECKING:
    import llguidance
    import tokenizers


class Tokenizer:
    """Text to tokens and back. Safe to share between threads.

    `vocabulary_size` counts the tokens that have a text; the model's output may be padded beyond them.
    `context_tokens` is the length the model was made for, None where its files don't say.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        template: ChatTemplate | None,
        eos_tokens: Iterable[int],
        context_tokens: int | None,
    ) -> None:
        added = sorted(backend.get_added_tokens_decoder().items())
        self._parsing = backend
        self._plain = _without_specials(backend)
        self._special_ids = frozenset(token for token, entry in added if entry.special)
        self._specials = SpecialTokens(
            {entry.content: token for token, entry in added if entry.special},
            {entry.content: (entry.lstrip, entry.rstrip) for _, entry in added},
        )
        self._added = {token: entry.content.encode() for token, entry in added}
        self._template = template
        self._bytes: list[bytes] | None = None
        self.eos_tokens = frozenset(eos_tokens)
        self.vocabulary_size: int = backend.get_vocab_size(with_added_tokens=True)
        self.context_tokens = context_tokens

    def encode(
        self, text: str, *, special: bool = False, limit: int | None = None, surrounded: bool = True
    ) -> list[int]:
        """Tokens of a text, with what the model wants around it (a first token, say) unless not `surrounded`.

        Unless `special`, text that looks like a control token (`<|im_end|>`) is plain text. A text with more than
        `limit` tokens loses its last ones; what goes around it stays.
        """
        backend = self._parsing if special else self._plain
        encoding = _encoding(backend, text)
        if limit is not None:
            encoding.truncate(max(limit - backend.num_special_tokens_to_add(is_pair=False), 0))
        tokens: list[int] = (backend.post_process(encoding) if surrounded else encoding).ids
        return tokens[:limit]

    @property
    def tool_format(self) -> ToolFormat:
        """How this model calls tools."""
        return tool_format(self._template.source if self._template else "")

    @property
    def reasons(self) -> bool:
        """Whether this model thinks before it answers."""
        return reasons(self._template.source if self._template else "")

    def encode_chat(
        self, messages: Sequence[Message], tools: Sequence[Tool] = (), *, thinking: bool = True
    ) -> list[int]:
        """Tokens of a conversation, up to where the assistant speaks. Only the template's own control tokens count.

        Without `thinking`, a model that thinks before it answers is made to answer at once.
        """
        if self._template is None:
            raise InvalidRequest(
                "messages: this model has no chat template; send its text to /v1/completions", param="messages"
            )
        form = self.tool_format
        entries = message_entries(messages, tools, form)
        told = tool_entries(tools) if form.in_template else []
        guard, (guarded, guarded_tools) = self._specials.guard((entries, told))
        text = self._template.render(guarded, guarded_tools, thinking=thinking)
        if not thinking and self.reasons:
            text = without_reasoning(text)
        if guard not in text:
            tokens: list[int] = _encoding(self._parsing, text).ids
            return tokens
        return self._specials.encode(text, lambda piece: self._encode_piece(piece.replace(guard, "")))

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of the tokens. Control tokens have none; bytes that aren't UTF-8 become U+FFFD."""
        return b"".join(map(self.token_bytes, tokens)).decode("utf-8", "replace")

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token adds to the text; none for a control token or one without text."""
        if self._bytes is None:
            self._bytes = self._make_token_bytes()
        return self._bytes[token] if token < len(self._bytes) else b""

    def difference(self, other: Tokenizer) -> str:
        """How its tokens differ from another's, in a few words; empty where none does."""
        if self.vocabulary_size != other.vocabulary_size:
            return f"{self.vocabulary_size} tokens, not {other.vocabulary_size}"
        for token in range(self.vocabulary_size):
            if self.label(token) != other.label(token):
                return f"token {token} is {self.label(token)!r}, not {other.label(token)!r}"
        return ""

    def label(self, token: int) -> bytes:
        """What to show where a token itself is meant: its bytes, or a control token's name."""
        return self.token_bytes(token) or self._added.get(token, b"")

    def grammar_vocabulary(self, size: int, ends: Iterable[int]) -> llguidance.LLTokenizer:
        """The vocabulary as grammars see it, padded to the `size` of the model's output."""
        tokens = range(size)
        return vocabulary([self.token_bytes(token) for token in tokens], [self.label(token) for token in tokens], ends)

    def _encode_piece(self, text: str) -> list[int]:
        tokens: list[int] = _encoding(self._plain, text).ids
        return tokens

    def _make_token_bytes(self) -> list[bytes]:
        to_bytes = _BYTES_OF[_text_form(self._parsing)]
        vocabulary = self._parsing.get_vocab(with_added_tokens=True)
        table = [b""] * (max(vocabulary.values(), default=-1) + 1)
        for text, token in vocabulary.items():
            if token not in self._special_ids or text in CALL_TOKENS:
                table[token] = self._added[token] if token in self._added else to_bytes(text)
        return table


def _encoding(backend: tokenizers.Tokenizer, text: str) -> tokenizers.Encoding:
    """As a batch of one: only for those does the library let other threads run, and a megabyte takes it a second."""
    return backend.encode_batch_fast([text], add_special_tokens=False)[0]


def load_tokenizer(path: Path, clock: Clock | None = None) -> Tokenizer:
    """The tokenizer of the model at `path`: a GGUF file, or a directory with one or with Hugging Face's files.

    `clock` tells templates the date. Raises ModelError where it is missing, damaged or of an unsupported kind.
    """
    clock = clock or SystemClock()
    gguf_path = find_gguf(path)
    if gguf_path is not None:
        from millicent.text.gguf_vocabulary import tokenizer_parts

        parts = tokenizer_parts(read_gguf_head(gguf_path))
        template = ChatTemplate(parts.template, parts.tokens, clock) if parts.template else None
        return Tokenizer(
            parts.backend, template=template, eos_tokens=parts.eos_tokens, context_tokens=parts.context_tokens
        )
    return _from_directory(path, clock)


def _from_directory(path: Path, clock: Clock) -> Tokenizer:
    import tokenizers

    file = path / "tokenizer.json"
    if not file.is_file():
        raise ModelError(f"{file}: missing; a model directory needs tokenizer.json or exactly one .gguf file")
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # noqa: BLE001 - the library raises bare Exception for anything it cannot parse
        raise ModelError(f"{file}: not a tokenizer ({error}); fetch the model again") from None
    backend.no_truncation()
    backend.no_padding()
    settings = _read_json(path / "tokenizer_config.json")
    config = _read_json(path / "config.json")
    tokens = {name: _token_text(settings[name]) for name in _NAMED_TOKENS if settings.get(name)}
    eos: set[int] = set()
    for found in (config.get("eos_token_id"), _read_json(path / "generation_config.json").get("eos_token_id")):
        eos.update([found] if isinstance(found, int) else found or [])
    if (named := backend.token_to_id(tokens.get("eos_token", ""))) is not None:
        eos.add(named)
    source = _template_source(path, settings)
    return Tokenizer(
        backend,
        template=ChatTemplate(source, tokens, clock) if source else None,
        eos_tokens=eos,
        context_tokens=config.get("max_position_embeddings"),
    )


_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


def _token_text(entry: str | dict[str, Any]) -> str:
    return entry if isinstance(entry, str) else str(entry["content"])


def _template_source(path: Path, settings: dict[str, Any]) -> str | None:
    """A file of its own wins; a list of named templates gives its default."""
    file = path / "chat_template.jinja"
    if file.is_file():
        return file.read_text("utf-8")
    source = settings.get("chat_template")
    if isinstance(source, list):
        source = {entry["name"]: entry["template"] for entry in source}.get("default")
    return source


def _read_json(file: Path) -> dict[str, Any]:
    """The object in `file`; empty where there is no such file."""
    try:
        found = json.loads(file.read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ModelError(f"{file}: not JSON ({error}); fetch the model again") from None
    if not isinstance(found, dict):
        raise ModelError(f"{file}: not a JSON object; fetch the model again")
    return found


def _without_specials(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """The same tokenizer, which takes control tokens' texts as plain text."""
    import tokenizers

    plain = tokenizers.Tokenizer.from_str(backend.to_str())
    plain.encode_special_tokens = True
    return plain


def _text_form(backend: tokenizers.Tokenizer) -> str:
    """How the vocabulary writes text: `bytes` (GPT-2's alphabet), `spaces` (SentencePiece) or `words` (WordPiece)."""
    decoder = json.loads(backend.decoder.__getstate__()) if backend.decoder else {}
    kinds = {decoder.get("type")} | {step.get("type") for step in decoder.get("decoders", ())}
    if "ByteLevel" in kinds:
        return "bytes"
    return "words" if "WordPiece" in kinds else "spaces"


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's: printable Latin-1 characters stand for themselves, the other bytes for characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + index): byte for index, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()


def _bytes_of_alphabet(text: str) -> bytes:
    try:
        return bytes([_BYTE_OF[character] for character in text])
    except KeyError:
        return text.encode()


def _bytes_of_spaces(text: str) -> bytes:
    if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
        return bytes([int(text[3:5], 16)])
    return text.replace("\u2581", " ").encode()


def _bytes_of_words(text: str) -> bytes:
    return text[2:].encode() if text.startswith("##") else f" {text}".encode()


_BYTES_OF = {"bytes": _bytes_of_alphabet, "spaces": _bytes_of_spaces, "words": _bytes_of_words}
