"""Grammars from callers, compiled where they can do no harm before anything is spent on them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections import OrderedDict
from hashlib import blake2b

from millicent.core.errors import InvalidRequest, Unavailable

_COMMAND = (sys.executable, "-P", "-m", "millicent.text.grammar_check")
_DEADLINE_S = 30.0
_START_S = 60.0
_KEPT = 1024


class GrammarChecker:
    """One process that compiles one grammar at a time. It ends when one takes a second of processor time
    (`grammar_check.CPU_S`), and is killed where that takes longer than `deadline_s`.

    What it said is remembered: whoever uses the same schema again doesn't wait.
    """

    def __init__(self, deadline_s: float = _DEADLINE_S) -> None:
        self._deadline_s = deadline_s
        self._process: asyncio.subprocess.Process | None = None
        self._turn = asyncio.Lock()
        self._kept: OrderedDict[bytes, str | None] = OrderedDict()

    async def check(self, grammar: str, param: str) -> None:
        """Raises InvalidRequest, about `param`, when it cannot be used, Unavailable when too many are waiting."""
        key = blake2b(grammar.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        if key not in self._kept:
            await self._ask(key, grammar, param)
        self._kept.move_to_end(key)
        if (complaint := self._kept[key]) is not None:
            raise InvalidRequest(f"{param}: {complaint}", param=param)

    async def close(self) -> None:
        if self._process is not None:
            process, self._process = self._process, None
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    async def _ask(self, key: bytes, grammar: str, param: str) -> None:
        try:
            async with asyncio.timeout(self._deadline_s):
                await self._turn.acquire()
        except TimeoutError:
            raise Unavailable("other grammars are being compiled; retry in a moment", retry_after_s=1) from None
        try:
            if key in self._kept:
                return
            self._kept[key] = await self._compile(grammar)
            if len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        except (TimeoutError, OSError):
            raise InvalidRequest(
                f"{param}: the grammar is too complex to compile; simplify it, or bound its repetitions", param=param
            ) from None
        finally:
            self._turn.release()

    async def _compile(self, grammar: str) -> str | None:
        """What is wrong with it. Raises TimeoutError or OSError when the process, which is gone then, didn't say."""
        process = self._process or await self._start()
        assert process.stdin is not None
        try:
            async with asyncio.timeout(self._deadline_s):
                process.stdin.write(json.dumps(grammar).encode() + b"\n")
                await process.stdin.drain()
                return await _answer(process)
        except BaseException:  # an answer that comes after all would be taken for the next one's
            await self.close()
            raise

    async def _start(self) -> asyncio.subprocess.Process:
        pipe = asyncio.subprocess.PIPE
        self._process = process = await asyncio.create_subprocess_exec(*_COMMAND, stdin=pipe, stdout=pipe)
        try:
            async with asyncio.timeout(_START_S):
                await _answer(process)
        except BaseException as error:
            await self.close()
            if isinstance(error, TimeoutError | OSError):
                raise Unavailable("the process that compiles grammars doesn't start; see the server's log") from None
            raise
        return process


async def _answer(process: asyncio.subprocess.Process) -> str | None:
    assert process.stdout is not None
    line = await process.stdout.readline()
    if not line:
        raise ConnectionError("the process is gone")
    said: str | None = json.loads(line)
    return said
