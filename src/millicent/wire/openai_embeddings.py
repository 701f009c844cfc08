"""OpenAI embeddings: `POST /v1/embeddings`."""

from __future__ import annotations

import base64
import sys
from array import array
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec

from millicent.core.chunks import vector_lines
from millicent.core.errors import InvalidRequest
from millicent.core.receipts import Receipt
from millicent.core.request import Embedding, Request
from millicent.wire import openai_common as common
from millicent.wire.attribution import read_attribution
from millicent.wire.decoding import decode_with_extra

DIALECT = "openai.embeddings"


class EmbeddingBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`truncate_prompt_tokens` is vLLM's: longer inputs are cut to so many tokens, -1 to what the model reads."""

    model: common.ModelName
    input: str | list[Any]
    dimensions: Annotated[int, msgspec.Meta(ge=1, le=100_000)] | None = None
    encoding_format: Literal["float", "base64"] | None = None
    truncate_prompt_tokens: Annotated[int, msgspec.Meta(ge=-1)] | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None


class EmbeddingShape(common.StreamShape, frozen=True):
    """How vectors are written: as base64 of little-endian float32, or as numbers. They never stream."""

    base64: bool = False


_decoder = msgspec.json.Decoder(EmbeddingBody)
_KNOWN = frozenset(EmbeddingBody.__struct_fields__)


def decode(body: bytes, headers: Mapping[str, str], receipt_id: str) -> tuple[Request, EmbeddingShape]:
    """Raises InvalidRequest, naming the field."""
    found, extra = decode_with_extra(body, _decoder, _KNOWN)
    if found.truncate_prompt_tokens == 0:
        raise InvalidRequest(
            "`truncate_prompt_tokens` is 0, which leaves nothing: send 1 or more, or -1 for the model's length.",
            param="truncate_prompt_tokens",
        )
    request = Request(
        id=receipt_id,
        dialect=DIALECT,
        model=found.model,
        embedding=Embedding(_inputs(found.input), found.dimensions, found.truncate_prompt_tokens),
        attribution=read_attribution(headers, user=found.user, metadata=found.metadata),
        extra=extra,
    )
    return request, EmbeddingShape(base64=found.encoding_format == "base64")


def _inputs(given: str | list[Any]) -> tuple[str | tuple[int, ...], ...]:
    inputs = common.read_inputs(given, "input")
    if "" in inputs:
        where = f"input[{inputs.index('')}]" if len(inputs) > 1 else "input"
        raise InvalidRequest(f"`{where}` is an empty text: leave it out.", param=where)
    return inputs


def answer_body(receipt: Receipt, text: str, shape: common.StreamShape) -> dict[str, Any]:
    """A whole answer. `text` has a line for each vector (`core.chunks.Vector.line`)."""
    as_base64 = isinstance(shape, EmbeddingShape) and shape.base64
    usage = common.usage_body(receipt)
    told = ("prompt_tokens", "total_tokens", "prompt_tokens_details", "cost", "cost_details")
    return {
        "object": "list",
        "data": [
            {"object": "embedding", "index": index, "embedding": vector if as_base64 else _numbers(vector)}
            for index, vector in enumerate(vector_lines(text))
        ],
        "model": receipt.model,
        "usage": {name: usage[name] for name in told},
    }


def numbers_of(text: str) -> list[list[float]]:
    """The vectors of an answer's lines, in the order of the inputs."""
    return [_numbers(vector) for vector in vector_lines(text)]


def _numbers(vector: str) -> list[float]:
    numbers = array("f", base64.b64decode(vector))
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers.tolist()
