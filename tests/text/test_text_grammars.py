"""Whatever a grammar lets through is what was asked for, and one that is too much is refused."""

from __future__ import annotations

import json
import random
import re
from typing import TYPE_CHECKING, Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from millicent.core.errors import InvalidRequest
from millicent.core.request import OutputFormat
from millicent.text.grammars import compile_grammar, format_grammar, vocabulary

if TYPE_CHECKING:
    import llguidance

END = 260
TOKENS = [*(bytes([byte]) for byte in range(256)), b'{"', b'": ', b"true", b"10", b"", b""]
NAMES = [b""] * 260 + [b"<end>", b""]


@pytest.fixture(scope="module")
def words() -> llguidance.LLTokenizer:
    return vocabulary(TOKENS, NAMES, [END])


def walk(form: OutputFormat, words: llguidance.LLTokenizer, seed: int, steps: int = 3000) -> str:
    """What a model that doesn't care would say. None of the tokens without a text may ever come."""
    matcher, chance, said = compile_grammar(format_grammar(form), words), random.Random(seed), b""
    for _ in range(steps):
        bits = matcher.compute_bitmask()
        token = chance.choice([i for i in range(len(TOKENS)) if bits[i // 8] >> i % 8 & 1])
        if token == END:
            break
        assert TOKENS[token]
        assert matcher.consume_token(token)
        said += TOKENS[token]
        if matcher.is_stopped():
            break
    else:
        raise AssertionError(f"no end: {said[:200]!r}")
    assert not matcher.is_error()
    return said.decode()


def schema(kind: dict[str, Any]) -> OutputFormat:
    return OutputFormat("json_schema", json.dumps(kind))


def of_properties(parts: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": parts, "required": sorted(parts)[::2], "additionalProperties": False}


LEAVES = st.sampled_from(
    [
        {"type": "string", "maxLength": 6},
        {"type": "string", "pattern": "^[a-f]{2,4}-[0-9]+x$", "maxLength": 12},
        {"type": "string", "format": "date"},
        {"type": "integer", "minimum": -3, "maximum": 1200},
        {"type": "number", "minimum": 0, "maximum": 1},
        {"type": "boolean"},
        {"type": "null"},
        {"enum": ["red", "green", 3, None, "sch\u00f6n \u2713"]},
        {"const": {"a": [1]}},
        {"$ref": "#/$defs/pair"},
    ]
)
SCHEMAS = st.recursive(
    LEAVES,
    lambda inner: (
        st.dictionaries(st.sampled_from(["a", "b b", "\u00e9", 'q"']), inner, max_size=3).map(of_properties)
        | st.lists(inner, min_size=1, max_size=3).map(lambda kinds: {"anyOf": kinds})
        | st.tuples(inner, st.integers(0, 3), st.integers(0, 3)).map(
            lambda parts: {"type": "array", "items": parts[0], "minItems": min(parts[1:]), "maxItems": max(parts[1:])}
        )
    ),
    max_leaves=6,
)
DEFINED = {
    "pair": {"type": "array", "prefixItems": [{"enum": [1]}, {"enum": ["x", "y"]}], "minItems": 2, "items": False}
}


@given(SCHEMAS, st.integers(0, 2**32))
def test_what_a_schema_lets_through_is_valid(kind: dict[str, Any], seed: int) -> None:
    wanted = {"type": "object", "properties": {"it": kind}, "required": ["it"], "additionalProperties": False}
    wanted |= {"$defs": DEFINED}
    jsonschema.validate(json.loads(walk(schema(wanted), vocabulary(TOKENS, NAMES, [END]), seed)), wanted)


@pytest.mark.parametrize("seed", range(5))
def test_expressions_and_grammars_are_followed(words: llguidance.LLTokenizer, seed: int) -> None:
    assert re.fullmatch(r"[ab]{3}/\\?[^/\n]\n", walk(OutputFormat("regex", "[ab]{3}/\\\\?[x-z]\n"), words, seed))
    lark = 'start: "yes" | "no" tail\ntail: /[!?]/'
    assert walk(OutputFormat("lark", lark), words, seed) in {"yes", "no!", "no?"}


def test_text_that_looks_like_a_control_token_is_text(words: llguidance.LLTokenizer) -> None:
    assert walk(OutputFormat("lark", 'start: "<end>"'), words, 1) == "<end>"


DEEP = '{"items":' * 3000 + "{}" + "}" * 3000


@pytest.mark.parametrize(
    ("form", "about"),
    [
        (schema({"type": "strin"}), "Invalid type: strin"),
        (schema({"type": "array", "uniqueItems": True}), "uniqueItems"),
        (schema({"$ref": "https://example.com/schema.json"}), "example.com"),
        (schema({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}), "no text satisfies it"),
        (schema({"type": "object", "properties": {"a": False}, "required": ["a"]}), "unsatisfiable"),
        (schema({"enum": [f"value {i}" for i in range(60_000)]}), "too big"),
        (schema({"type": "string", "pattern": "^(a{1000}){1000}$"}), "too many"),
        (OutputFormat("json_schema", DEEP), "recursion"),
        (OutputFormat("json_schema", "[]"), "not an object"),
        (OutputFormat("regex", "(((a{100}){100}){100}){100}"), "too many"),
        (OutputFormat("regex", "("), "unclosed group"),
        (OutputFormat("regex", "(" * 2000 + "a" + ")*" * 2000), "regex"),
        (OutputFormat("lark", "start: " + "(" * 5000), "nested"),
        (OutputFormat("lark", "no"), "Expected"),
    ],
)
def test_what_cannot_be_used_is_refused_in_a_line(
    words: llguidance.LLTokenizer, form: OutputFormat, about: str
) -> None:
    with pytest.raises(InvalidRequest, match=about) as refused:
        compile_grammar(format_grammar(form), words)
    assert "\n" not in refused.value.message
    assert len(refused.value.message) < 400
