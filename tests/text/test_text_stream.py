"""However tokens come, what is shown is the text of all of them, up to the first stop string."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from millicent.core.errors import InvalidRequest
from millicent.text import TextStream


class Pieces:
    """A vocabulary in which token n is the n-th piece of bytes."""

    def __init__(self, pieces: list[bytes]) -> None:
        self.pieces = pieces

    def token_bytes(self, token: int) -> bytes:
        return self.pieces[token]


def first_stop(text: str, stop: list[str]) -> int | None:
    """Where the text ends, by trying every end."""
    for end in range(1, len(text) + 1):
        lengths = [len(string) for string in stop if text[:end].endswith(string)]
        if lengths:
            return end - max(lengths)
    return None


def cut(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = sorted({0, *[at for at in cuts if at < len(data)], len(data)})
    return [data[start:stop] for start, stop in pairwise(edges)]


@settings(deadline=None)
@given(
    text=st.text(alphabet="ab\u00e9\U0001f642", max_size=30),
    stop=st.lists(st.text(alphabet="ab\u00e9", min_size=1, max_size=4), max_size=4),
    cuts=st.lists(st.integers(1, 60), max_size=20),
)
@example(text="abcd", stop=["abcd", "bc"], cuts=[1, 2, 3])
@example(text="aab", stop=["ab"], cuts=[1, 2])
@example(text="aaab", stop=["aab", "ab", "b"], cuts=[])
def test_what_is_shown_is_everything_before_the_first_stop(text: str, stop: list[str], cuts: list[int]) -> None:
    pieces = Pieces(cut(text.encode(), cuts))
    stream = TextStream(pieces, stop)
    end = first_stop(text, stop)
    expected = text if end is None else text[:end]
    shown = ""
    for token in range(len(pieces.pieces)):
        shown += stream.push(token)
        assert expected.startswith(shown)
    assert bool(stream.stop) == (end is not None)
    assert text[len(expected) :].startswith(stream.stop)
    assert not stream.stop or stream.stop in stop
    assert shown + stream.finish() == expected
    assert stream.finish() == ""


@settings(deadline=None)
@given(data=st.binary(max_size=40), cuts=st.lists(st.integers(1, 40), max_size=20))
def test_bytes_that_are_no_characters_come_out_as_decoding_them_at_once_would(data: bytes, cuts: list[int]) -> None:
    pieces = Pieces(cut(data, cuts))
    stream = TextStream(pieces)
    shown = "".join(stream.push(token) for token in range(len(pieces.pieces)))
    assert shown + stream.finish() == data.decode("utf-8", "replace")


def test_a_character_is_shown_when_its_last_byte_has_come() -> None:
    stream = TextStream(Pieces([bytes([byte]) for byte in "\U0001f642".encode()]))
    assert [stream.push(token) for token in range(4)] == ["", "", "", "\U0001f642"]


def test_what_may_become_a_stop_string_waits_and_comes_when_it_cannot() -> None:
    stream = TextStream(Pieces([b"One", b"\n", b"\n", b"two", b"\nUs", b"er:", b" x"]), ["\nUser:"])
    assert [stream.push(token) for token in range(4)] == ["One", "", "\n", "\ntwo"]
    assert [stream.push(token) for token in (4, 5, 6)] == ["", "", ""]
    assert stream.stop == "\nUser:"
    assert stream.finish() == ""


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="stop"):
        TextStream(Pieces([]), ["x", ""])


def test_stop_strings_that_are_not_heeded_yet_pass_and_later_ones_stop() -> None:
    stream = TextStream(Pieces([b"a", b"b", b"a", b"b"]), ["ab"])
    assert [stream.push(token, heed_stops=token >= 2) for token in range(4)] == ["a", "b", "", ""]
    assert stream.stop == "ab"
    assert stream.finish() == ""
