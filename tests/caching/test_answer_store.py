"""What is kept: found as it was, bounded, expiring, purged for good, and never the reason that a request fails."""

from __future__ import annotations

import sqlite3
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millicent.caching.store import FILE_NAME, LARGEST_PART, AnswerStore, CachedAnswer, Entry
from millicent.core.chunks import CallPiece, Candidate, FinishReason, Text, TokenLogprob
from millicent.core.money import Money
from millicent.core.usage import Provenance, Usage

NOW = 1_000
ANSWER = CachedAnswer(
    receipt="rcpt_1",
    created_at_ns=NOW,
    texts=(
        Text("Hm", 2, reasoning="Let me think", signature="sealed", logprobs=(TokenLogprob(b"\xff", -0.5),)),
        Text("", 1, choice=1, calls=(CallPiece(0, "weather", '{"city":"Bern"}'),)),
        Text("x", 1, logprobs=(TokenLogprob(b"x", None, (Candidate(b"y", -1.5),)),), stop="END"),
    ),
    reasons=(FinishReason.STOP, FinishReason.TOOL_CALLS),
    usage=Usage.of(Provenance.REPORTED, input_fresh=3, output_text=4),
    finish_reason="stop",
    served_model="big-2026",
    list_price=Money(12),
    saved_by_routing=Money(-3),
)


def entry(
    key: bytes, answer: CachedAnswer = ANSWER, *, expires_at_ns: int = NOW + 100, user: str | None = None
) -> Entry:
    return Entry(key, answer, expires_at_ns, "mk_1", user, "fake")


@contextmanager
def opened(path: Path | None = None, *, max_bytes: int = 1 << 20, max_entries: int = 100) -> Iterator[AnswerStore]:
    store = AnswerStore(path, max_bytes=max_bytes, max_entries=max_entries)
    try:
        yield store
    finally:
        store.close()


def test_an_answer_is_found_as_it_was_kept_and_after_a_restart(tmp_path: Path) -> None:
    path = tmp_path / FILE_NAME
    with opened(path) as store:
        store.keep([entry(b"a")], NOW)
        assert store.find(b"a", NOW) == ANSWER
        assert store.find(b"b", NOW) is None
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with opened(path) as store:
        assert store.find(b"a", NOW) == ANSWER
        assert store.standing(NOW).hits == 2


def test_how_often_answers_were_given_is_written_down_whoever_closes_the_file(tmp_path: Path) -> None:
    store = AnswerStore(tmp_path / FILE_NAME, max_bytes=1 << 20, max_entries=100)
    store.keep([entry(b"a")], NOW)
    assert store.find(b"a", NOW) == ANSWER
    with ThreadPoolExecutor(1) as another:
        another.submit(store.close).result()
    with opened(tmp_path / FILE_NAME) as store:
        assert store.standing(NOW).hits == 1


def test_what_has_expired_is_not_found_and_is_taken_out() -> None:
    with opened() as store:
        store.keep([entry(b"a"), entry(b"b", expires_at_ns=NOW + 200)], NOW)
        assert store.find(b"a", NOW + 99) is not None
        assert store.find(b"a", NOW + 100) is None
        store.expire(NOW + 100)
        assert store.standing(NOW + 100).entries == 1
        assert store.find(b"a", NOW) is None


def test_the_later_of_two_answers_under_one_key_stays() -> None:
    with opened() as store:
        store.keep([entry(b"a"), entry(b"a", CachedAnswer("rcpt_2", NOW, (), (), Usage()))], NOW)
        found = store.find(b"a", NOW)
        assert found is not None
        assert found.receipt == "rcpt_2"
        assert store.standing(NOW).entries == 1


def test_the_one_used_least_recently_goes_first() -> None:
    with opened(max_entries=3) as store:
        for moment, key in enumerate((b"a", b"b", b"c")):
            store.keep([entry(key, expires_at_ns=NOW * 9)], NOW + moment)
        assert store.find(b"a", NOW + 10) is not None
        store.keep([entry(b"d", expires_at_ns=NOW * 9)], NOW + 20)
        assert [key for key in (b"a", b"b", b"c", b"d") if store.find(key, NOW + 30)] == [b"a", b"c", b"d"]


def test_an_answer_that_would_take_a_large_part_of_the_room_is_not_kept() -> None:
    with opened(max_bytes=LARGEST_PART * 1000) as store:
        store.keep([entry(b"a", CachedAnswer("rcpt_1", NOW, (Text("x" * 900, 1),), (), Usage()))], NOW)
        assert store.find(b"a", NOW) is None
        assert store.standing(NOW).entries == 0


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 3000), st.integers(1, 50)), max_size=40))
def test_the_bounds_hold_whatever_is_kept(asked: list[tuple[int, int, int]]) -> None:
    with opened(max_bytes=40_000, max_entries=5) as store:
        for moment, (key, length, ttl) in enumerate(asked):
            answer = CachedAnswer("rcpt_1", NOW, (Text("x" * length, 1),), (), Usage())
            store.keep([entry(bytes([key]), answer, expires_at_ns=moment + ttl)], moment)
            counted = store._writer.execute("SELECT count(*), coalesce(sum(bytes), 0) FROM answers").fetchone()
            standing = store._writer.execute("SELECT entries, bytes FROM size").fetchone()
            assert counted == standing
            assert counted[0] <= 5
            assert counted[1] <= 40_000


def test_purged_answers_are_gone_from_the_file_too(tmp_path: Path) -> None:
    path = tmp_path / FILE_NAME
    secret = CachedAnswer("rcpt_1", NOW, (Text("a-secret-of-anns", 1),), (), Usage())
    with opened(path) as store:
        store.keep([entry(b"a", secret, user="ann"), entry(b"b", user="bob"), entry(b"c")], NOW)
        with opened(path) as beside:  # the command line, say
            assert beside.purge(user="ann") == 1
            assert beside.purge(user="nobody") == 0
        assert [key for key in (b"a", b"b", b"c") if store.find(key, NOW)] == [b"b", b"c"]
        left = b"".join(each.read_bytes() for each in tmp_path.iterdir())
        assert b"a-secret-of-anns" not in left
        assert store.purge(model="another") == 0
        assert store.purge() == 2


@pytest.mark.parametrize("content", [b"not a database at all" * 100, b""])
def test_a_file_that_is_damaged_or_of_another_version_is_begun_anew(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / FILE_NAME
    if content:
        path.write_bytes(content)
    else:
        connection = sqlite3.connect(path)
        connection.execute("CREATE TABLE answers (other TEXT)")
        connection.execute("PRAGMA user_version = 999")
        connection.close()
    with opened(path) as store:
        store.keep([entry(b"a")], NOW)
        assert store.find(b"a", NOW) == ANSWER
