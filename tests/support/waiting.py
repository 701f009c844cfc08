"""Waiting for what will be true: for as long as a slow machine may take, and no longer than it takes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TypeVar

LIMIT_S = 60
_PAUSE_S = 0.02

Found = TypeVar("Found")


def until(look: Callable[[], Found | None], what: str = "it never came true") -> Found:
    """What `look` finds, once that is true."""
    deadline_s = time.monotonic() + LIMIT_S
    while not (found := look()):
        assert time.monotonic() < deadline_s, what
        time.sleep(_PAUSE_S)
    return found


async def until_it(look: Callable[[], Found], what: str = "it never came true") -> Found:
    """The same, while the event loop goes on."""
    deadline_s = time.monotonic() + LIMIT_S
    while not (found := look()):
        assert time.monotonic() < deadline_s, what
        await asyncio.sleep(_PAUSE_S)
    return found
