"""Grammars are compiled where one that takes for ever harms nobody."""

import asyncio
import os
import signal
import sys

import pytest

from millicent.backends import grammar_checks
from millicent.backends.grammar_checks import GrammarChecker
from millicent.core.errors import InvalidRequest

HARD = "start: /(((a{100}){100}){100}){100}/"


async def complaint(checker: GrammarChecker, grammar: str) -> str:
    try:
        await checker.check(grammar, "response_format")
    except InvalidRequest as error:
        return error.message
    return ""


def test_it_says_what_is_wrong_and_remembers() -> None:
    async def scenario() -> None:
        checker = GrammarChecker(deadline_s=60)
        assert await complaint(checker, 'start: "x"') == ""
        first = await complaint(checker, "start: y")
        assert first.startswith("response_format: the grammar cannot be used")
        await checker.close()
        assert await complaint(checker, "start: y") == first
        assert await complaint(checker, 'start: "z"') == ""
        await checker.close()

    asyncio.run(scenario())


def test_one_that_takes_too_long_is_refused_and_the_next_is_not() -> None:
    async def scenario() -> None:
        checker = GrammarChecker(deadline_s=60)
        assert await complaint(checker, 'start: "x"') == ""
        checker._deadline_s = 0.001
        assert "too complex" in await complaint(checker, HARD)
        checker._deadline_s = 60
        assert await complaint(checker, 'start: "y"') == ""
        await checker.close()

    asyncio.run(scenario())


def test_one_that_takes_too_much_of_the_processor_is_refused_and_the_next_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    little = "from millicent.text import grammar_check; grammar_check.CPU_S = 0.02; grammar_check.main()"
    monkeypatch.setattr(grammar_checks, "_COMMAND", (sys.executable, "-c", little))

    async def scenario() -> None:
        checker = GrammarChecker(deadline_s=60)
        assert "too complex" in await complaint(checker, HARD)
        assert await complaint(checker, 'start: "y"') == ""
        await checker.close()

    asyncio.run(scenario())


def test_how_long_it_takes_on_a_busy_machine_makes_no_difference() -> None:
    async def scenario() -> None:
        checker = GrammarChecker()
        assert await complaint(checker, 'start: "x"') == ""
        assert checker._process is not None
        os.kill(checker._process.pid, signal.SIGSTOP)
        asked = asyncio.create_task(complaint(checker, 'start: "y"'))
        await asyncio.sleep(1.2)  # longer than it may take of the processor
        os.kill(checker._process.pid, signal.SIGCONT)
        assert await asked == ""
        await checker.close()

    asyncio.run(scenario())


def test_a_caller_that_leaves_takes_nobody_elses_answer_along() -> None:
    async def scenario() -> None:
        checker = GrammarChecker(deadline_s=60)
        assert await complaint(checker, 'start: "x"') == ""
        assert checker._process is not None
        os.kill(checker._process.pid, signal.SIGSTOP)  # so that it can't answer before
        left = asyncio.create_task(complaint(checker, HARD))
        await asyncio.sleep(0.01)
        left.cancel()
        with pytest.raises(asyncio.CancelledError):
            await left
        assert await complaint(checker, 'start: "y"') == ""
        assert "cannot be used" in await complaint(checker, HARD)
        await checker.close()

    asyncio.run(scenario())


def test_a_process_that_dies_is_started_again() -> None:
    async def scenario() -> None:
        checker = GrammarChecker(deadline_s=60)
        assert await complaint(checker, 'start: "x"') == ""
        assert checker._process is not None
        checker._process.kill()
        assert "too complex" in await complaint(checker, 'start: "y"')
        assert await complaint(checker, 'start: "y"') == ""
        await checker.close()

    asyncio.run(scenario())
