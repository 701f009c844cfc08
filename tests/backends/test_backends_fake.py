from __future__ import annotations

import asyncio
from typing import Any

import pytest

from millicent.backends.fake import FakeAnswer, FakeBackend
from millicent.core.chunks import Chunk, End, FinishReason, Text
from millicent.core.clock import NS_PER_S, ManualClock
from millicent.core.errors import InvalidRequest, ModelNotFound, RateLimited, Unavailable
from millicent.core.protocols import Backend
from millicent.core.request import Limits, Request
from millicent.core.usage import Leaf, Provenance, Usage
from support.observers import Notes


def request(max_tokens: int | None = None, model: str = "fake") -> Request:
    return Request(id="r", dialect="test", model=model, prompt="hi", limits=Limits(max_tokens=max_tokens))


def answers(backend: Backend, *requests: Request) -> list[list[Chunk]]:
    async def one(wanted: Request) -> list[Chunk]:
        return [chunk async for chunk in (await backend.prepare(wanted)).start()]

    async def everyone() -> list[list[Chunk]]:
        return list(await asyncio.gather(*map(one, requests)))

    return asyncio.run(everyone())


def end_of(chunks: list[Chunk]) -> End:
    assert isinstance(chunks[-1], End)
    return chunks[-1]


def test_it_says_what_it_is_told_and_counts_it() -> None:
    backend = FakeBackend()
    (chunks,) = answers(backend, request())
    assert chunks[:2] == [Text("Hello", 1), Text(" world", 1)]
    usage = Usage.of(Provenance.MEASURED, input_fresh=5, input_cache_read=0, output_text=2)
    assert end_of(chunks) == End(FinishReason.STOP, usage)
    assert (len(backend.requests), backend.running) == (1, 0)


def test_errors_come_after_what_was_said_and_refusals_before() -> None:
    failing = FakeBackend(FakeAnswer(error=Unavailable("gone; retry")))
    end = end_of(answers(failing, request())[0])
    assert (end.reason, str(end.error), end.usage.output_tokens) == (FinishReason.ERROR, "gone; retry", 2)
    with pytest.raises(RateLimited):
        answers(FakeBackend(FakeAnswer(refusal=RateLimited("later"))), request())
    with pytest.raises(ModelNotFound, match="available: fake"):
        answers(FakeBackend(), request(model="x"))
    with pytest.raises(InvalidRequest) as refused:
        answers(FakeBackend(FakeAnswer(input_tokens=10, context_tokens=10)), request())
    assert refused.value.code == "context_length_exceeded"


def test_max_tokens_cuts_the_script_short() -> None:
    (chunks,) = answers(FakeBackend(), request(max_tokens=1))
    end = end_of(chunks)
    assert (len(chunks), end.reason, end.usage.tokens(Leaf.OUTPUT_TEXT)) == (2, FinishReason.LENGTH, 1)


def test_steps_fill_the_time_one_after_another_and_come_before_their_text() -> None:
    clock, notes = ManualClock(), Notes()

    async def sleep(delay_s: float) -> None:
        clock.advance(int(delay_s * NS_PER_S))
        await asyncio.sleep(0)

    backend = FakeBackend(FakeAnswer(delay_s=0.5), observer=notes, clock=clock, sleep=sleep)
    answers(backend, request(), request())
    assert [(record.start_ns, record.wall_ns) for record in notes.steps] == [
        (index * NS_PER_S // 2, NS_PER_S // 2) for index in range(4)
    ]
    works = [work for record in notes.steps for work in record.sequences if work.sequence == 1]
    assert [(work.prefill_rows, work.decode_rows, work.kv_read_tokens) for work in works] == [(5, 0, 5), (0, 1, 6)]


@pytest.mark.parametrize("observer", [None, Notes()])
def test_cancelling_wakes_it_from_its_delay_and_counts_only_what_was_said(observer: Notes | None) -> None:
    async def test() -> None:
        delays = iter([0.0, 3600.0])
        backend = FakeBackend(FakeAnswer(), observer=observer, sleep=lambda _: asyncio.sleep(next(delays)))
        run = (await backend.prepare(request())).start()
        seen: list[Any] = []
        async for chunk in run:
            seen.append(chunk)
            asyncio.get_running_loop().call_soon(run.cancel)
        assert seen[0] == Text("Hello", 1)
        assert (seen[-1].reason, seen[-1].usage.output_tokens) == (FinishReason.CANCELLED, 1)

    asyncio.run(asyncio.wait_for(test(), 60))


def test_an_answer_can_depend_on_the_request_and_hide_its_usage() -> None:
    backend = FakeBackend(lambda wanted: FakeAnswer((Text(str(wanted.prompt), 1),), provenance=Provenance.UNKNOWN))
    (chunks,) = answers(backend, request())
    assert chunks == [Text("hi", 1), End(FinishReason.STOP, Usage())]
