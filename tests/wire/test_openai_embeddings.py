"""`POST /v1/embeddings`, both ways."""

from __future__ import annotations

import base64
import json
import struct
from typing import Any

import msgspec
import pytest

from millicent.core.chunks import Vector
from millicent.core.errors import InvalidRequest
from millicent.core.request import Embedding
from millicent.core.usage import Provenance, Usage
from millicent.wire.openai_embeddings import EmbeddingShape, answer_body, decode
from support.receipts import settled


def decoded(**body: Any) -> tuple[Embedding, EmbeddingShape]:
    request, shape = decode(json.dumps({"model": "m", **body}).encode(), {}, "rcpt_1")
    assert request.embedding is not None
    assert (request.messages, request.prompt, request.stream) == (None, None, False)
    return request.embedding, shape


@pytest.mark.parametrize(
    ("given", "inputs"),
    [
        ("one", ("one",)),
        (["one", "two"], ("one", "two")),
        ([1, 2, 3], ((1, 2, 3),)),
        ([[1, 2], [3]], ((1, 2), (3,))),
        (["text", [3]], ("text", (3,))),
    ],
)
def test_every_shape_of_input_is_a_list_of_texts_or_tokens(given: Any, inputs: tuple[Any, ...]) -> None:
    assert decoded(input=given)[0].inputs == inputs


def test_what_else_can_be_asked_is_carried() -> None:
    embedding, shape = decoded(input="a", dimensions=8, encoding_format="base64", truncate_prompt_tokens=-1)
    assert (embedding.dimensions, embedding.truncate_tokens, shape.base64) == (8, -1, True)
    assert decoded(input="a", encoding_format="float")[1] == decoded(input="a")[1] == EmbeddingShape(base64=False)


def test_the_user_field_is_whom_the_receipt_is_for() -> None:
    request, _ = decode(b'{"model": "m", "input": "a", "user": "ada"}', {}, "rcpt_1")
    assert request.attribution.user == "ada"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "input"),
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": ["a", ""]}, "input[1]"),
        ({"input": [[]]}, "input"),
        ({"input": ["a", 5]}, "input[1]"),
        ({"input": [1, "a"]}, "input"),
        ({"input": [1, -1]}, "input"),
        ({"input": [True]}, "input"),
        ({"input": ["a"] * 2049}, "input"),
        ({"input": None}, "input"),
        ({"input": "a", "dimensions": 0}, "dimensions"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format"),
        ({"input": "a", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"input": "a", "truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
        ({"input": "a", "temperature": 1}, "temperature"),
    ],
)
def test_what_makes_no_sense_is_refused_by_the_field_s_name(body: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        decode(json.dumps({"model": "m", **body}).encode(), {}, "rcpt_1")[0].refuse_foreign()
    assert refused.value.param == param


def test_an_answer_lists_vectors_by_input_with_usage_and_cost() -> None:
    vectors = [Vector(1, struct.pack("<2f", 0.25, -1), 5), Vector(0, struct.pack("<2f", 0.5, 2), 4)]
    text = "".join(vector.line for vector in vectors)
    receipt = msgspec.structs.replace(settled(), usage=Usage.of(Provenance.MEASURED, input_fresh=9))
    body = answer_body(receipt, text, EmbeddingShape(base64=False))
    assert body["data"] == [
        {"object": "embedding", "index": 0, "embedding": [0.5, 2.0]},
        {"object": "embedding", "index": 1, "embedding": [0.25, -1.0]},
    ]
    assert (body["object"], body["model"]) == ("list", receipt.model)
    usage = body["usage"]
    assert (usage["prompt_tokens"], usage["total_tokens"]) == (9, 9)
    assert usage["prompt_tokens_details"]["cached_tokens"] == 0
    assert receipt.total is not None
    assert usage["cost"] == receipt.total.usd
    assert "completion_tokens" not in usage
    packed = answer_body(receipt, text, EmbeddingShape(base64=True))["data"][1]["embedding"]
    assert base64.b64decode(packed) == vectors[0].values
