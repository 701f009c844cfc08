"""Grammars: what an answer may be, token by token, in the Lark dialect of llguidance, which computes the masks.

A grammar comes from a stranger. Its limits here bound what compiling it and what each mask can cost, and whoever takes
one from a caller has `grammar_check` compile it first, in a process that can be killed.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from millicent.core.errors import InvalidRequest
from millicent.core.request import OutputFormat

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import llguidance

# JSON is written one way, so that a model that likes white space cannot go on with it for ever.
_JSON_OPTIONS = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def format_grammar(form: OutputFormat) -> str:
    """Raises InvalidRequest where a schema isn't a JSON object."""
    match form.kind:
        case "json_object":
            return "start: " + json_term({"type": "object"})
        case "json_schema":
            return "start: " + json_term(parse_schema(form.source))
        case "regex":
            return f"start: /{_SLASHES.sub(_escape, form.source)}/"
        case "lark":
            return _lark(form.source)


def _lark(source: str) -> str:
    """A grammar in llama.cpp's form, GBNF, as Lark; one in Lark as it is."""
    if "::=" not in source:
        return source
    from llguidance.gbnf_to_lark import gbnf_to_lark, is_lark_syntax

    if is_lark_syntax(source):
        return source
    if len(source) > _MOST_GBNF:
        raise _not_gbnf(f"it has {len(source)} characters, and at most {_MOST_GBNF} are read; send Lark, or less")
    try:
        lark: str = gbnf_to_lark(source)
    except Exception as error:  # noqa: BLE001 - the library raises bare Exception for a rule that isn't there
        raise _not_gbnf(" ".join(str(error).split())[:300]) from None
    return lark


def _not_gbnf(reason: str) -> InvalidRequest:
    return InvalidRequest(
        f"response_format: the grammar is not GBNF that can be used: {reason}", param="response_format"
    )


_MOST_GBNF = 32_000  # it is read here, on the event loop
_SLASHES = re.compile(r"\\.|/|\n", re.DOTALL)


def _escape(match: re.Match[str]) -> str:
    return {"/": r"\/", "\n": r"\n"}.get(match[0], match[0])


def parse_schema(source: str) -> dict[str, Any]:
    try:
        schema = json.loads(source)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"the JSON schema cannot be read ({error}); send one JSON object") from None
    if not isinstance(schema, dict):
        raise InvalidRequest("the JSON schema is not an object; send one JSON object")
    return schema


def json_term(schema: dict[str, Any]) -> str:
    """JSON that the schema describes, as a term of a rule."""
    return "%json " + json.dumps(schema | {"x-guidance": _JSON_OPTIONS})


def vocabulary(tokens: Sequence[bytes], controls: Sequence[bytes], ends: Iterable[int]) -> llguidance.LLTokenizer:
    """The tokens' bytes, none for a control token, which has its name in `controls`; and those that end an answer."""
    import llguidance

    # The library's mark of a control token is a byte that no UTF-8 has.
    marked = [text or (b"\xff" + name if name else b"") for text, name in zip(tokens, controls, strict=True)]
    ends = sorted(ends)
    wrapped = llguidance.TokenizerWrapper(_Vocabulary(marked, ends[0]))
    return llguidance.LLTokenizer(wrapped, n_vocab=len(marked), eos_token=ends)


class _Vocabulary:
    """What the library wants to know. Text is never forced, so it need not be cut into the model's own tokens."""

    bos_token_id = None

    def __init__(self, tokens: list[bytes], end: int) -> None:
        self.tokens = tokens
        self.eos_token_id = end
        self.special_token_ids = [index for index, token in enumerate(tokens) if token.startswith(b"\xff")]
        self._single = {token: index for index, token in enumerate(tokens) if len(token) == 1}

    def __call__(self, text: bytes) -> list[int]:
        return [self._single[bytes([byte])] for byte in text if bytes([byte]) in self._single]


def compile_grammar(source: str, words: llguidance.LLTokenizer) -> llguidance.LLMatcher:
    """Ready for the first token, whose mask is computed too: that is where most that is too complex shows.

    Raises InvalidRequest. Lets other threads run meanwhile.
    """
    import llguidance

    limits = llguidance.LLParserLimits(
        initial_lexer_fuel=300_000,
        step_lexer_fuel=200_000,
        step_max_items=10_000,
        max_items_in_row=200,
        max_lexer_states=50_000,
        max_grammar_size=500_000,
        verbose_errors=False,
    )
    matcher = llguidance.LLMatcher(words, source, log_level=0, limits=limits)
    for one in (matcher.deep_copy(), matcher):  # they share a lexer: what the first runs into, the second tells of
        if not matcher.is_error():
            one.compute_bitmask()
    if matcher.is_error():
        raise InvalidRequest(f"the grammar cannot be used: {_reason(matcher.get_error())}")
    return matcher


_EXCERPT = re.compile(r"\n\s*\d+ \||<non-verbose/>")  # of the grammar, which is long


def _reason(complaint: str) -> str:
    if complaint.startswith("NoExtension"):
        return "no text satisfies it"
    said = _EXCERPT.split(complaint, maxsplit=1)[0]
    return " ".join(said.split())[:300]
