"""Replays for the pages: in a process of their own, so that whoever is being answered doesn't wait for them.

A replay keeps a processor busy for seconds. One runs at a time, at low priority; what it found is kept for a while.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from millicent.core.clock import NS_PER_S, Clock, iso_utc
from millicent.core.errors import InvalidRequest, Unavailable
from millicent.dashboard.selection import FILTERS, Selection

# The same question is answered from what was found for as long.
_KEPT_NS = 600 * NS_PER_S
_MOST_KEPT = 16
_MOST_WAITING = 4
_NICE = 10
# What the command line can filter by.
KNOWN = FILTERS - {"conversation", "run"}
_FIELDS = ("feature", "user", "team", "model", "key", "tier", "placement", "status")

Body = dict[str, Any]


@dataclass(frozen=True)
class _Found:
    at_ns: int
    task: asyncio.Task[Body]


class Replays:
    """`millicent plan COMMAND --json`, and what it said."""

    def __init__(self, command: str, clock: Clock, home: Path, *options: str) -> None:
        self._command = command
        self._clock = clock
        self._home = home
        self._options = options
        self._found: dict[tuple[tuple[str, str], ...], _Found] = {}
        self._turn = asyncio.Lock()

    def ask(self, selection: Selection, more: Mapping[str, str]) -> asyncio.Task[Body]:
        """It runs, or has run: its result is the command's JSON. `more` are options by name.

        Raises Unavailable when too many wait. The task raises InvalidRequest with what the command complained of.
        """
        key = tuple(sorted(selection.params.items()))
        now_ns = self._clock.now_ns()
        found = self._found.get(key)
        if found is None or not 0 <= now_ns - found.at_ns < _KEPT_NS:
            if sum(not each.task.done() for each in self._found.values()) >= _MOST_WAITING:
                raise Unavailable("too many replays wait for each other: try again in a minute", retry_after_s=60)
            done = [key for key, each in self._found.items() if each.task.done()]
            for old in done[: max(0, len(self._found) - _MOST_KEPT + 1)]:
                del self._found[old]
            arguments = [*_filters(selection), *(f"--{name}={value}" for name, value in more.items())]
            found = self._found[key] = _Found(now_ns, asyncio.create_task(self._run(arguments)))
        return found.task

    async def _run(self, arguments: Sequence[str]) -> Body:
        async with self._turn:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-c", f"import os; os.nice({_NICE}); from millicent.cli import main; main()"),
                *("plan", self._command, "--json", *self._options, *arguments),
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                env=os.environ | {"OMP_NUM_THREADS": "1", "MILLICENT_HOME": str(self._home)},
            )
            try:
                out, err = await process.communicate()
            finally:
                if process.returncode is None:
                    process.kill()
        if process.returncode:
            complaint = err.decode(errors="replace").strip().splitlines()[-1:]
            raise InvalidRequest((complaint or ["the replay ended without a word"])[0].removeprefix("error: "))
        body: Body = msgspec.json.decode(out)
        return body


def _filters(selection: Selection) -> list[str]:
    """The same filters, as the command line has them."""
    where = selection.where
    given = [f"--since={iso_utc(where.from_ns or 0)}"]
    if where.to_ns is not None:
        given.append(f"--until={iso_utc(where.to_ns)}")
    return [*given, *(f"--{name}={value}" for name in _FIELDS if (value := getattr(where, name)) is not None)]
