"""Calls are found in text wherever it is cut, and what isn't a call stays content."""

from __future__ import annotations

import itertools
import json
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millicent.core.chunks import CallPiece, merge_pieces
from millicent.core.errors import InvalidRequest
from millicent.core.request import Message, OutputFormat, Request, Tool, ToolCall
from millicent.text.grammars import compile_grammar, vocabulary
from millicent.text.tools import ToolCallParser, ToolFormat, answer_grammar, message_entries, tool_format

TAGGED = tool_format("{% if tools %}<tool_call>{% endif %}")
TOLD = tool_format("{{ messages }}")
BARE = tool_format('{% if tools %}{"name": x, "parameters": y}{% endif %}')
LISTED = tool_format("{% if tools %}[TOOL_CALLS] [{% endif %}")
WEATHER = Tool(
    "weather",
    "Looks out of the window.",
    '{"type":"object","properties":{"city":{"type":"string","maxLength":5},"days":{"enum":[1,2]}},'
    '"required":["city"],"additionalProperties":false}',
)
CLOCK = Tool("clock-1", "", '{"type":"object","properties":{},"additionalProperties":false}')
NAMES = ("weather", "clock-1")


def whole(form: ToolFormat, text: str, cuts: list[int] | None = None) -> tuple[str, tuple[CallPiece, ...], bool]:
    parser, content = ToolCallParser(form, NAMES), ""
    pieces: list[CallPiece] = []
    edges = [0, *sorted(cut % (len(text) + 1) for cut in cuts or []), len(text)]
    for start, stop in itertools.pairwise(edges):
        said, found = parser.feed(text[start:stop])
        content, pieces = content + said, [*pieces, *found]
    said, found = parser.finish()
    return content + said, merge_pieces([*pieces, *found]), bool(parser.calls)


def tagged(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


ROME, NOW = '{"city": "R\\"}\\u00f6me{"}', "{}"


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        (tagged("weather", ROME), "", [("weather", ROME)]),
        (f"Let me see. {tagged('weather', ROME)}", "Let me see. ", [("weather", ROME)]),
        (f"{tagged('weather', ROME)}\n{tagged('clock-1', NOW)}\n", "", [("weather", ROME), ("clock-1", NOW)]),
        (f"{tagged('clock-1', NOW)} and so on <", " and so on <", [("clock-1", NOW)]),
        ('<tool_call>{"name":"clock-1","arguments":{"a":[{"b":1}]}}</tool_call>', "", [("clock-1", '{"a":[{"b":1}]}')]),
        ("plain text < tool_call>", "plain text < tool_call>", []),
        (tagged("unknown", NOW), tagged("unknown", NOW), []),
        ("<tool_call>weather</tool_call> then", "<tool_call>weather</tool_call> then", []),
        ("<tool_call>{}</tool_call>", "<tool_call>{}</tool_call>", []),
        ('<tool_call>{"name": "weather"}</tool_call>', '<tool_call>{"name": "weather"}</tool_call>', []),
        ("<tool_call><tool_call>", "<tool_call><tool_call>", []),
        ("  \n", "  \n", []),
        ('<tool_call>{"name": "weather", "argum', '<tool_call>{"name": "weather", "argum', []),
        ('<tool_call>{"name": "weather", "arguments": {"ci', "", [("weather", '{"ci')]),
        ('<tool_call>{"name": "weather", "arguments": {}} oops', " oops", [("weather", "{}")]),
        (f'<tool_call>{{"name": "clock-1", "arguments": {{}}\n{tagged("weather", ROME)}', "",
         [("clock-1", "{}"), ("weather", ROME)]),
    ],
)  # fmt: skip
def test_tagged_calls(text: str, content: str, calls: list[tuple[str, str]]) -> None:
    found = whole(TAGGED, text)
    assert found == (content, tuple(CallPiece(i, *call) for i, call in enumerate(calls)), bool(calls))


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ('{"name": "weather", "parameters": {"city": "Rome"}}', "", [("weather", '{"city": "Rome"}')]),
        ('\n{"name":"clock-1","parameters":{}}\n', "", [("clock-1", "{}")]),
        ('{"city": "Rome"}', '{"city": "Rome"}', []),
        ("It is sunny.", "It is sunny.", []),
        ('See {"name": "clock-1", "parameters": {}}', 'See {"name": "clock-1", "parameters": {}}', []),
    ],
)
def test_bare_calls(text: str, content: str, calls: list[tuple[str, str]]) -> None:
    assert whole(BARE, text)[:2] == (content, tuple(CallPiece(i, *call) for i, call in enumerate(calls)))


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        (f'[TOOL_CALLS] [{{"name": "weather", "arguments": {ROME}}}]', "", [("weather", ROME)]),
        (f'[TOOL_CALLS][{{"name":"weather","arguments":{ROME}}}, {{"name": "clock-1", "arguments": {{}}}}]', "",
         [("weather", ROME), ("clock-1", "{}")]),
        ('Sure. [TOOL_CALLS] [{"name": "clock-1", "arguments": {}}] done', "Sure.  done", [("clock-1", "{}")]),
        ('[TOOL_CALLS] [{"name": "clock-1", "arguments": {"a', "", [("clock-1", '{"a')]),
        ('[TOOL_CALLS] [{"name": "no", "arguments": {}}]', '[TOOL_CALLS] [{"name": "no", "arguments": {}}]', []),
        ("[TOOL_CALLS] none", "[TOOL_CALLS] none", []),
        ("[TOOL_CALLS] [[", "[TOOL_CALLS] [[", []),
        ("[TOOL_", "[TOOL_", []),
        ('[TOOL_CALLS] [{"name": "clock-1", "arguments": {}} oops', " oops", [("clock-1", "{}")]),
        ('[TOOL_CALLS] [{"name": "clock-1", "arguments": {}}, oops', "}, oops", [("clock-1", "{}")]),
    ],
)  # fmt: skip
def test_listed_calls(text: str, content: str, calls: list[tuple[str, str]]) -> None:
    assert whole(LISTED, text)[:2] == (content, tuple(CallPiece(i, *call) for i, call in enumerate(calls)))


PIECES = st.sampled_from(
    [tagged("weather", ROME), tagged("clock-1", NOW), tagged("no", NOW), "<tool_call>", "</tool_call>", "<tool", "hi ",
     "\n", "{", "}", "[TOOL_CALLS] [", ', {"name": "clock-1", "arguments": {}}', "]",
     '{"name": "weather", "arguments": {', '{"name": "clock-1", "parameters": {}}', '"', "\\", "\u00e9"]
)  # fmt: skip


@given(
    st.lists(PIECES, max_size=8), st.lists(st.integers(0, 400), max_size=12), st.sampled_from([TAGGED, BARE, LISTED])
)
def test_where_the_text_is_cut_changes_nothing(parts: list[str], cuts: list[int], form: ToolFormat) -> None:
    text = "".join(parts)
    assert whole(form, text, cuts) == whole(form, text) == whole(form, text, list(range(len(text))))


@given(st.text(alphabet='<tol_ca>{}"name: \n', max_size=60))
def test_text_without_a_call_comes_out_as_it_went_in(text: str) -> None:
    content, calls, _ = whole(TAGGED, text)
    assert (content, calls) == (text, ())


def request(choice: Any = "auto", name: str | None = None, **fields: Any) -> Request:
    return Request("r", "d", "m", messages=(), tools=(WEATHER, CLOCK), tool_choice=choice, tool_name=name, **fields)


TOKENS = [*(bytes([byte]) for byte in range(256)), b"<tool_call>", b"</tool_call>", b"<too", b"l_call>\n{", b""]
END = len(TOKENS) - 1


def walk(grammar: str, seed: int, begin: str = "") -> str:
    matcher = compile_grammar(grammar, vocabulary(TOKENS, [b""] * END + [b"<end>"], [END]))
    chance, said = random.Random(seed), begin.encode()
    assert matcher.consume_tokens(list(said))
    for _ in range(600):
        bits = matcher.compute_bitmask()
        allowed = [i for i in range(len(TOKENS)) if bits[i // 8] >> i % 8 & 1]
        token = END if END in allowed and chance.random() < 0.5 else chance.choice(allowed)
        if token == END:
            break
        assert matcher.consume_token(token)
        said += TOKENS[token]
        if matcher.is_stopped():
            break
    return said.decode("utf-8", "replace")


def check_call(call: CallPiece) -> None:
    arguments = json.loads(call.arguments)
    assert call.name in NAMES
    assert set(arguments) <= {"city", "days"}
    assert (call.name == "weather") == ("city" in arguments)


@pytest.mark.parametrize("form", [TAGGED, TOLD, BARE, LISTED])
@pytest.mark.parametrize("seed", range(6))
def test_a_required_call_is_made_whatever_the_model(form: ToolFormat, seed: int) -> None:
    content, calls, _ = whole(form, walk(answer_grammar(request("required"), form), seed))
    assert content == ""
    assert calls
    for call in calls:
        check_call(call)
    content, calls, _ = whole(form, walk(answer_grammar(request("required", "clock-1"), form), seed))
    assert {call.name for call in calls} == {"clock-1"}


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("form", [TAGGED, LISTED])
def test_only_one_call_is_made_without_parallel_calls(form: ToolFormat, seed: int) -> None:
    wanted = request("required", parallel_tool_calls=False)
    assert len(whole(form, walk(answer_grammar(wanted, form), seed))[1]) == 1


def test_a_list_of_calls_may_hold_several() -> None:
    grammar = answer_grammar(request("required"), LISTED)
    assert max(len(whole(LISTED, walk(grammar, seed))[1]) for seed in range(20)) > 1


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    ("form", "said", "begin"),
    [
        (TAGGED, "Well, ", "Well, <tool_call>"),
        (LISTED, "Well, ", "Well, [TOOL_CALLS]"),
        (BARE, "", '{"name": "weather", "parameters": '),
    ],
)
def test_a_model_left_free_to_call_is_held_to_the_form_once_it_begins(
    form: ToolFormat, said: str, begin: str, seed: int
) -> None:
    for several in (True, False):
        grammar = answer_grammar(request(parallel_tool_calls=several), form)
        content, calls, _ = whole(form, walk(grammar, seed, begin))
        assert content.startswith(said)
        assert calls
        for call in calls:
            check_call(call)
        for free in ("Nothing to call", '{"name": "Rome", "param'):
            assert whole(form, walk(grammar, seed, free))[0].startswith(free)


@pytest.mark.parametrize("seed", range(6))
def test_with_a_format_the_answer_is_a_call_or_in_the_format(seed: int) -> None:
    wanted = request(output_format=OutputFormat("json_schema", '{"enum": ["yes", "no"]}'))
    content, calls, _ = whole(TAGGED, walk(answer_grammar(wanted, TAGGED), seed))
    assert content in {'"yes"', '"no"'} if not calls else content == ""


def test_no_call_is_enforced_where_none_is_wanted() -> None:
    assert answer_grammar(request("none"), TAGGED) == ""
    with pytest.raises(InvalidRequest, match="a grammar doesn't go with `tools`"):
        answer_grammar(request(output_format=OutputFormat("regex", "x")), TAGGED)


TALK = (
    Message("system", "Be brief."),
    Message("user", "Rome?"),
    Message("assistant", "", tool_calls=(ToolCall("call_1", "weather", '{"city": "Rome"}'),)),
    Message("tool", "sunny", tool_call_id="call_1"),
)


def test_a_template_that_knows_tools_gets_them_as_they_are() -> None:
    entries = message_entries(TALK, (WEATHER,), TAGGED)
    assert entries[2]["tool_calls"][0]["function"] == {"name": "weather", "arguments": {"city": "Rome"}}
    assert entries[3] == {"role": "tool", "content": "sunny", "tool_call_id": "call_1"}


def test_a_template_that_takes_short_identifiers_only_gets_those() -> None:
    entries = message_entries(TALK, (WEATHER,), LISTED)
    short = entries[2]["tool_calls"][0]["id"]
    assert short.isalnum()
    assert len(short) == 9
    assert entries[3]["tool_call_id"] == short


def test_newer_forms_of_mistral_are_told_in_words() -> None:
    assert not tool_format("{% if tools %}[TOOL_CALLS]name[ARGS]{% endif %}").in_template


def test_a_template_that_knows_none_gets_them_written_out() -> None:
    system, _, called, result = message_entries(TALK, (WEATHER,), TOLD)
    assert system["content"].startswith("Be brief.\n\nYou may call functions")
    assert '"name": "weather"' in system["content"]
    assert called == {"role": "assistant", "content": tagged("weather", '{"city": "Rome"}')}
    assert result == {"role": "user", "content": "<tool_response>\nsunny\n</tool_response>"}
    assert message_entries(TALK[1:2], (WEATHER,), TOLD)[0]["role"] == "system"
    assert message_entries(TALK[1:2], (), TOLD) == [{"role": "user", "content": "Rome?"}]
