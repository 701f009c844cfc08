"""Events, however their bytes are cut."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millicent.core.errors import UpstreamError
from millicent.wire.server_sent_events import Event, EventReader


def read(*pieces: bytes) -> list[Event]:
    reader = EventReader()
    found = [event for piece in pieces for event in reader.feed(piece)]
    return found + reader.finish()


CASES = [
    (b"data: a\n\ndata: b\n\n", [Event(b"a"), Event(b"b")]),
    (b"data: a\r\n\r\ndata: b\r\n\r\n", [Event(b"a"), Event(b"b")]),
    (b"data: a\r\rdata: b\r\r", [Event(b"a"), Event(b"b")]),
    (b"data:a\n\n", [Event(b"a")]),
    (b"data:  a\n\n", [Event(b" a")]),
    (b"data: one\ndata: two\ndata\n\n", [Event(b"one\ntwo\n")]),
    (b": waiting\n\n: waiting\n\ndata: a\n\n", [Event(b"a")]),
    (b"event: ping\n\nevent: message_start\ndata: {}\n\ndata: x\n\n", [Event(b"{}", "message_start"), Event(b"x")]),
    (b"id: 7\nretry: 5\ndata: a\nunknown: b\n\n", [Event(b"a")]),
    ("data: Tōkyō 東京 🗼\n\n".encode(), [Event("Tōkyō 東京 🗼".encode())]),
    (b"\xef\xbb\xbfdata: a\n\n", [Event(b"a")]),
    (b"data: a\n\ndata: [DONE]", [Event(b"a"), Event(b"[DONE]")]),
    (b"data: a\n\ndata: [DONE]\n", [Event(b"a"), Event(b"[DONE]")]),
    (b"data: a\n\ndata: [DONE]\r", [Event(b"a"), Event(b"[DONE]")]),
    (b"data: a\r\n\rdata:b\ndata: a", [Event(b"a"), Event(b"b\na")]),
    (b"", []),
    (b"\n\n\r\n\r", []),
]


@pytest.mark.parametrize(("data", "events"), CASES)
def test_events_are_the_same_wherever_their_bytes_are_cut(data: bytes, events: list[Event]) -> None:
    assert read(data) == events
    assert read(*(data[at : at + 1] for at in range(len(data)))) == events
    for at in range(len(data)):
        assert read(data[:at], data[at:]) == events


@given(
    data=st.lists(st.sampled_from([b"data: a", b"data:b", b"event: e", b": c", b"\n", b"\r", b"\r\n", "é".encode()])),
    cuts=st.lists(st.integers(0, 60)),
)
def test_no_cut_changes_what_is_read(data: list[bytes], cuts: list[int]) -> None:
    whole = b"".join(data)
    places = sorted({0, len(whole), *(min(cut, len(whole)) for cut in cuts)})
    pieces = [whole[start:stop] for start, stop in itertools.pairwise(places)]
    assert read(*pieces) == read(whole)


@pytest.mark.parametrize(
    "pieces", [[b"data: " + b"x" * 200], [b"data: " + b"x" * 60 + b"\n"] * 3, [b"data: " + b"x" * 30, *[b"x" * 30] * 4]]
)
def test_an_event_that_is_too_long_is_refused(pieces: list[bytes]) -> None:
    reader = EventReader(max_event_bytes=100)
    with pytest.raises(UpstreamError, match="more than 100 bytes"):
        list(map(reader.feed, pieces))


def test_many_short_events_are_no_long_one() -> None:
    reader = EventReader(max_event_bytes=100)
    assert len([event for _ in range(100) for event in reader.feed(b"data: abc\n\n")]) == 100
