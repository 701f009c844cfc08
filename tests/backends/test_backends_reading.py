"""What an answer's text is read as, choice by choice, and how its tokens are counted."""

import asyncio
from typing import Any

from millicent.backends.local_runs import LocalRun, Reading
from millicent.core.chunks import End, FinishReason, Text, merge_texts
from millicent.core.request import Limits, Sampling
from millicent.engine.protocol import Output, Submit
from millicent.text.tools import tool_format

THINKS_AND_CALLS = Reading(reasons=True, tools=tool_format("<tool_call> tools"), names=("now",))
CALL = '<tool_call>{"name": "now", "arguments": {"x": 1}}</tool_call>'


def read(reading: Reading | None, *said: list[str], finish: str = "stop") -> tuple[dict[int, Text], End]:
    """Each choice says its pieces, a token each."""
    submits = tuple(Submit(number, "m", (1, 2), Sampling(), Limits(max_tokens=9)) for number in range(len(said)))
    run = LocalRun(submits, lambda token: b"", [""], lambda run: None, reading=reading)

    async def collect() -> list[Any]:
        return [chunk async for chunk in run]

    for number, pieces in enumerate(said):
        for index, piece in enumerate(pieces):
            run.take(Output(number, 1, piece, finish if index == len(pieces) - 1 else ""))
    *texts, end = asyncio.run(collect())
    assert isinstance(end, End)
    return {text.choice: text for text in merge_texts(texts)}, end


def test_thought_answer_and_call_are_told_apart() -> None:
    texts, end = read(THINKS_AND_CALLS, ["<think>", "Well", ", so", "</think>", "\n", "Hm. ", CALL[:20], CALL[20:]])
    assert (texts[0].reasoning, texts[0].text) == ("Well, so", "Hm. ")
    assert [(call.name, call.arguments) for call in texts[0].calls] == [("now", '{"x": 1}')]
    assert end.reason is FinishReason.TOOL_CALLS
    assert (end.usage.leaves["output_reasoning"].tokens, end.usage.leaves["output_text"].tokens) == (4, 4)  # type: ignore[index]


def test_each_choice_is_read_on_its_own() -> None:
    texts, end = read(THINKS_AND_CALLS, ["<think>", "a</think>b"], ["c"], [CALL])
    assert [(text.reasoning, text.text, len(text.calls)) for text in texts.values()] == [
        ("a", "b", 0),
        ("", "c", 0),
        ("", "", 1),
    ]
    assert end.choices == (FinishReason.STOP, FinishReason.STOP, FinishReason.TOOL_CALLS)


def test_an_answer_that_is_cut_off_is_no_finished_call() -> None:
    texts, end = read(THINKS_AND_CALLS, [CALL[:-20]], finish="length")
    assert texts[0].calls[0].arguments.startswith("{")
    assert end.reason is FinishReason.LENGTH


def test_thinking_that_the_prompt_began_may_never_end() -> None:
    texts, end = read(Reading(reasons=True, thinks=True), ["on and", " on"], finish="length")
    assert (texts[0].reasoning, texts[0].text) == ("on and on", "")
    assert end.usage.output_tokens == 2
    assert "output_reasoning" in end.usage.leaves


def test_other_models_text_is_left_as_it_is() -> None:
    texts, end = read(None, ["<think>", "a</think>", CALL])
    assert (texts[0].text, texts[0].reasoning, texts[0].calls) == (f"<think>a</think>{CALL}", "", ())
    assert "output_reasoning" not in end.usage.leaves
