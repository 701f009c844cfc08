"""What was thought is told from what is answered, wherever the text is cut."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millicent.text.reasoning import ReasoningSplitter, opens_reasoning, reasons, without_reasoning


def whole(text: str, *, begun: bool = False, cuts: list[int] | None = None) -> tuple[str, str]:
    splitter, edges = (
        ReasoningSplitter(begun=begun),
        [0, *sorted(cut % (len(text) + 1) for cut in cuts or []), len(text)],
    )
    news = [splitter.feed(text[start:stop]) for start, stop in itertools.pairwise(edges)]
    news.append(splitter.finish())
    return "".join(reasoning for reasoning, _ in news), "".join(answer for _, answer in news)


@pytest.mark.parametrize(
    ("text", "begun", "reasoning", "answer"),
    [
        ("<think>\nSo, 2 and 2.\n</think>\n\nFour.\n", False, "So, 2 and 2.", "Four.\n"),
        ("\nSo </th ink>.\n</think>\n\nFour.", True, "So </th ink>.", "Four."),
        ("<think>\n\n</think>\n\nFour.", False, "", "Four."),
        (" <think>cut off </thi", False, "cut off </thi", ""),
        ("<think> a\n\n b </think> c <think>d</think>", False, "a\n\n b", "c <think>d</think>"),
        ("Four <think>?</think>", False, "", "Four <think>?</think>"),
        ("\n Four.", False, "", "\n Four."),
        ("<thi", False, "", "<thi"),
        ("", False, "", ""),
        ("", True, "", ""),
    ],
)
def test_reasoning_comes_first_and_alone(text: str, begun: bool, reasoning: str, answer: str) -> None:
    assert whole(text, begun=begun) == (reasoning, answer)


PIECES = st.sampled_from(["<think>", "</think>", "<thi", "</th", "\n", " ", "a", "b c", "\u00e9", "<", ">"])


@given(st.lists(PIECES, max_size=10), st.booleans(), st.lists(st.integers(0, 100), max_size=8))
def test_where_the_text_is_cut_changes_nothing(parts: list[str], begun: bool, cuts: list[int]) -> None:
    text = "".join(parts)
    found = whole(text, begun=begun)
    assert whole(text, begun=begun, cuts=cuts) == found == whole(text, begun=begun, cuts=list(range(len(text))))


@given(st.text(alphabet="<think>/ ab\n", max_size=40))
def test_an_answer_that_does_not_begin_with_the_tag_is_left_as_it_is(text: str) -> None:
    if not text.lstrip().startswith("<think>"):
        assert whole(text) == ("", text)


def test_templates_and_prompts_say_whether_a_model_thinks() -> None:
    assert reasons("{{ content.split('</think>')[-1] }}")
    assert not reasons("{{ content }}")
    assert opens_reasoning("<assistant><think>\n")
    assert not opens_reasoning("<think>\n\n</think>\n\n")


@pytest.mark.parametrize(
    ("prompt", "closed"),
    [
        ("<assistant>\n", "<assistant>\n<think>\n\n</think>\n\n"),
        ("<assistant>\n<think>\n", "<assistant>\n<think>\n\n\n</think>\n\n"),
        ("<assistant>\n<think>\n\n</think>\n\n", "<assistant>\n<think>\n\n</think>\n\n"),
    ],
)
def test_a_thought_is_closed_before_it_begins_once(prompt: str, closed: str) -> None:
    assert without_reasoning(prompt) == closed
    assert without_reasoning(closed) == closed
