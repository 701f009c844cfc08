"""`POST /tokenize` and `/detokenize`: text or a conversation to a model's tokens, and tokens to text. In the fields of
vLLM's and of llama.cpp's servers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import msgspec

from millicent.core.errors import InvalidRequest
from millicent.core.request import Request
from millicent.wire import openai_chat, openai_common, openai_completions
from millicent.wire.decoding import decode_body
from millicent.wire.openai_common import TokenId

_MOST_TOKENS = 1 << 20


class _Asked(msgspec.Struct, frozen=True):
    """What is ours of the body; the rest is a chat's or a completion's."""

    model: openai_common.ModelName | None = None
    content: str | None = None  # llama.cpp's name for a prompt
    add_special_tokens: bool | None = None
    add_special: bool | None = None  # the same
    return_token_strs: bool | None = None
    with_pieces: bool | None = None


class Encoding(msgspec.Struct, frozen=True):
    """A prompt as its model sees it; `pieces` are the tokens' own texts."""

    tokens: Sequence[int]
    pieces: Sequence[bytes]
    context_tokens: int


class ToEncode(msgspec.Struct, frozen=True):
    """`surrounded`: with what the model wants around a text. How the answer shows the tokens' texts."""

    request: Request
    surrounded: bool
    shows_texts: bool
    shows_pieces: bool

    def body(self, found: Encoding) -> dict[str, Any]:
        tokens: list[Any] = list(found.tokens)
        if self.shows_pieces:
            tokens = [{"id": token, "piece": _piece(piece)} for token, piece in zip(tokens, found.pieces, strict=True)]
        texts = [piece.decode("utf-8", "replace") for piece in found.pieces] if self.shows_texts else None
        return {
            "count": len(found.tokens),
            "max_model_len": found.context_tokens,
            "tokens": tokens,
            "token_strs": texts,
        }


def _piece(piece: bytes) -> str | list[int]:
    """Bytes where it is no whole character."""
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return list(piece)


_fields_decoder = msgspec.json.Decoder(dict[str, msgspec.Raw])
_asked_decoder = msgspec.json.Decoder(_Asked)


def decode(body: bytes, headers: Mapping[str, str], receipt_id: str, model: str) -> ToEncode:
    """`model` is meant where none is named. Raises InvalidRequest, naming the field."""
    asked = decode_body(body, _asked_decoder, _Asked.__struct_fields__)
    fields = decode_body(body, _fields_decoder, ())
    for field in ("content", "add_special_tokens", "add_special", "return_token_strs", "with_pieces"):
        fields.pop(field, None)
    fields["model"] = msgspec.Raw(msgspec.json.encode(asked.model or model))
    if asked.content is not None:
        fields.setdefault("prompt", msgspec.Raw(msgspec.json.encode(asked.content)))
    dialect = openai_chat if "messages" in fields else openai_completions
    request, _ = dialect.decode(msgspec.json.encode(fields), headers, receipt_id)
    if request.further_prompts:
        raise InvalidRequest("`prompt` holds more than one text: send them one by one.", param="prompt")
    surrounded = (asked.add_special_tokens, asked.add_special)
    return ToEncode(request, False not in surrounded, bool(asked.return_token_strs), bool(asked.with_pieces))


class ToDecode(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    tokens: Annotated[list[TokenId], msgspec.Meta(max_length=_MOST_TOKENS)]
    model: openai_common.ModelName | None = None


_decode_decoder = msgspec.json.Decoder(ToDecode)


def decode_tokens(body: bytes) -> ToDecode:
    """Raises InvalidRequest, naming the field."""
    return decode_body(body, _decode_decoder, ToDecode.__struct_fields__)


def text_body(text: str) -> dict[str, Any]:
    """Under both servers' names."""
    return {"prompt": text, "content": text}


def no_tokenizer(model: str) -> InvalidRequest:
    return InvalidRequest(
        f"model: {model[:100]} has no tokenizer on this machine; ask for a model that runs here", param="model"
    )
