"""What is kept of a prompt: it comes back as it was written, and its lengths add up."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millicent.core.prompts import CHAIN_BYTES, KEPT_FIRST, KEPT_LAST, KINDS, Prompt, Segment, unpacked

SEGMENTS = st.builds(
    Segment,
    kind=st.sampled_from(KINDS),
    length=st.integers(0, 2**32 - 1),
    chain=st.binary(min_size=CHAIN_BYTES, max_size=CHAIN_BYTES),
)
PROMPTS = st.builds(
    Prompt,
    digest=st.binary(min_size=20, max_size=20),
    first=st.lists(SEGMENTS, max_size=KEPT_FIRST).map(tuple),
    omitted=st.integers(0, 2**16 - 1),
    omitted_length=st.integers(0, 2**32 - 1),
    last=st.lists(SEGMENTS, max_size=KEPT_LAST).map(tuple),
)


@given(PROMPTS)
def test_a_packed_prompt_is_unpacked_as_it_was(prompt: Prompt) -> None:
    packed = prompt.packed()
    assert unpacked(prompt.digest, packed) == prompt
    assert len(packed) == 8 + 13 * len(prompt.segments)


@given(PROMPTS, st.integers(0, 10**7))
def test_the_segments_tokens_are_at_most_the_prompts_and_all_of_them_where_none_was_left_out(
    prompt: Prompt, total: int
) -> None:
    parts = prompt.tokens(total)
    assert len(parts) == len(prompt.segments)
    assert 0 <= sum(parts) <= total
    if parts and not prompt.omitted_length:
        assert sum(parts) == total


def test_without_a_total_tokens_are_a_quarter_of_the_bytes_unless_they_came_as_tokens() -> None:
    text, tokens = Segment("user", 401, bytes(8)), Segment("tokens", 401, bytes(8))
    assert Prompt(b"", (text, tokens)).tokens(None) == (101, 401)


def test_ends_count_what_was_left_out() -> None:
    one, two, three = (Segment("user", length, bytes(8)) for length in (10, 20, 30))
    prompt = Prompt(b"", (one,), 2, 500, (two, three))
    assert prompt.ends() == [10, 530, 560]
    assert prompt.length == 560


def test_what_a_later_version_packed_is_refused() -> None:
    packed = Prompt(b"", (Segment("user", 1, bytes(8)),)).packed()
    with pytest.raises(ValueError, match="segments are of version 9"):
        unpacked(b"", b"\x09" + packed[1:])
