"""Embeddings as Gemini's `batchEmbedContents` takes and gives them, as its documentation of `v1beta` has it."""

from __future__ import annotations

import math
import struct
from typing import Any
from urllib.parse import quote

import msgspec

from millicent.core.chunks import Vector
from millicent.core.request import Request
from millicent.core.usage import Provenance, Usage
from millicent.wire.gemini_upstream import Sent
from millicent.wire.refusals import not_taken
from millicent.wire.reported import tokens_told

_encoder = msgspec.json.Encoder()

_MOST_INPUTS = 100


def encode(request: Request, model: str, who: str) -> Sent:
    """The call for this request. Raises InvalidRequest for what `who`, the upstream, can't do. What is longer than the
    model reads is cut there, whether that was asked for or not."""
    request.refuse_foreign()
    wanted = request.embedding
    assert wanted is not None
    if len(wanted.inputs) > _MOST_INPUTS:
        raise not_taken(request, who, "input", f"an `input` of more than {_MOST_INPUTS} texts")
    if wanted.truncate_tokens not in {None, -1}:
        raise not_taken(request, who, "truncate_prompt_tokens")
    name = "models/" + model.removeprefix("models/")
    requests = []
    for text in wanted.inputs:
        if not isinstance(text, str):
            raise not_taken(request, who, "input", "an `input` of token ids")
        body: dict[str, Any] = {"model": name, "content": {"parts": [{"text": text}]}}
        if wanted.dimensions is not None:
            body["outputDimensionality"] = wanted.dimensions
        requests.append(body)
    path = f"/models/{quote(model.removeprefix('models/'), safe='')}:batchEmbedContents"
    return Sent(path, _encoder.encode({"requests": requests}))


class _Values(msgspec.Struct, frozen=True):
    values: list[float]


class _Usage(msgspec.Struct, frozen=True, rename="camel"):
    prompt_token_count: int | None = None


class _Vectors(msgspec.Struct, frozen=True, rename="camel"):
    embeddings: list[_Values]
    usage_metadata: _Usage | None = None


_decoder = msgspec.json.Decoder(_Vectors)


class VectorsReader:
    """A whole answer. Raises msgspec.DecodeError for what isn't one, or isn't `inputs` vectors. They are made unit
    vectors, as OpenAI's are: shortened ones don't come as such."""

    served_model: str | None = None
    id: str | None = None
    cost = None

    def __init__(self, body: bytes, inputs: int) -> None:
        found = _decoder.decode(body)
        if len(found.embeddings) != inputs:
            raise msgspec.DecodeError(f"{len(found.embeddings)} vectors for {inputs} inputs")
        told = tokens_told(None if found.usage_metadata is None else found.usage_metadata.prompt_token_count)
        self.usage = None if told is None else Usage.of(Provenance.REPORTED, input_fresh=told)
        self.vectors = [Vector(i, _unit(each.values), 0) for i, each in enumerate(found.embeddings)]


def _unit(values: list[float]) -> bytes:
    """Little-endian float32."""
    length = math.hypot(*values)
    if not values or not math.isfinite(length):
        raise msgspec.DecodeError("a vector that is none")
    return struct.pack(f"<{len(values)}f", *(value / (length or 1.0) for value in values))
