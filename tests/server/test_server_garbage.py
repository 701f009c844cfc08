"""The collector of cycles is out of a server's way, and still there."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest

from millicent.server.garbage import settle_collector


class Cycle:
    def __init__(self) -> None:
        self.itself = self


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    before = gc.get_threshold()
    yield
    gc.set_threshold(*before)
    gc.unfreeze()


def test_what_is_there_at_the_start_is_not_looked_through_again() -> None:
    settle_collector()
    assert gc.get_freeze_count() > 1000
    assert gc.get_threshold()[0] > 1000


def test_cycles_are_still_collected() -> None:
    settle_collector()
    seen = weakref.ref(Cycle())
    kept = [[number] for number in range(2 * gc.get_threshold()[0])]
    assert seen() is None
    assert len(kept) == 2 * gc.get_threshold()[0]
