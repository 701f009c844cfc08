"""Embeddings through the local backend: one real engine process, an encoder and a model that makes text."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import millicent
from millicent.backends.local import LocalBackend, LocalModel, ModelState
from millicent.backends.local_embeddings import EmbeddingRun
from millicent.core.chunks import End, FinishReason, Vector
from millicent.core.clock import SystemClock
from millicent.core.errors import InvalidRequest, ModelError, Unavailable
from millicent.core.protocols import Run
from millicent.core.request import Embedding, Message, Request
from millicent.core.usage import Leaf, Provenance, Usage
from millicent.engine.config import EngineConfig
from millicent.engine.models import load_encoder
from millicent.engine.protocol import Embed, Output
from millicent.text import load_tokenizer
from support.observers import Notes
from support.tiny_encoders import HIDDEN, write_tiny_encoder
from support.tiny_models import write_tiny_model

TEXTS = ("the sun rises", "the moon sets.", "a b c, and sets!", "the sun")


def run(story: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(story, 120))


def request(*inputs: str | tuple[int, ...], model: str = "encoder", **wanted: Any) -> Request:
    return Request(id="r", dialect="test", model=model, embedding=Embedding(inputs, **wanted))


async def read(found: Run) -> tuple[dict[int, Vector], End]:
    vectors: dict[int, Vector] = {}
    async for chunk in found:
        if isinstance(chunk, End):
            return vectors, chunk
        assert isinstance(chunk, Vector)
        vectors[chunk.index] = chunk
    raise AssertionError("it ended without an End")


def floats(vector: Vector) -> list[float]:
    return [float(value) for value in np.frombuffer(vector.values, "<f4")]


def test_many_texts_are_one_call_with_one_measured_usage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(millicent.__file__).parents[1]))
    tiny = write_tiny_model(tmp_path / "tiny")
    directory = write_tiny_encoder(tmp_path / "encoder")
    encoder, tokenizer = load_encoder(directory, dtype="fp32", name="here"), load_tokenizer(directory)
    looked_up: list[str] = []

    def find() -> Path:
        looked_up.append("encoder")
        return directory

    def missing() -> Path:
        raise ModelError("gone: cannot be downloaded; check the network")

    async def story() -> None:
        notes = Notes()
        config = EngineConfig(threads=1, memory_gb=1.0)
        models = {
            "encoder": LocalModel(find, "home"),
            "tiny": LocalModel(tiny, "home"),
            "missing": LocalModel(missing, "home"),
        }
        subject = LocalBackend(config, models, notes, SystemClock(), tmp_path / "home")
        await subject.start()
        try:
            assert (looked_up, subject.status().models["encoder"]) == ([], ModelState.UNLOADED)
            call = await subject.prepare(request(*TEXTS))
            assert (looked_up, len(call.sequences)) == (["encoder"], len(TEXTS))
            vectors, end = await read(call.start())
            tokens = [tokenizer.encode(text) for text in TEXTS]
            count = sum(map(len, tokens))
            assert (end.reason, call.input_tokens, call.max_output_tokens) == (FinishReason.STOP, count, 0)
            assert end.usage == Usage.of(Provenance.MEASURED, input_fresh=count)
            expected = encoder.encode(tokens).numpy()
            for index, row in enumerate(expected):
                np.testing.assert_allclose(floats(vectors[index]), row, atol=1e-5)
            works = [work for step in notes.steps for work in step.sequences]
            assert sorted(work.sequence for work in works) == list(call.sequences)
            assert sum(work.prefill_rows for work in works) == count
            assert {(work.sampled_rows, work.decode_rows) for work in works} == {(0, 0)}

            given, _ = await read((await subject.prepare(request(tuple(tokens[0]), dimensions=8))).start())
            shorter = expected[0][:8] / np.linalg.norm(expected[0][:8])
            np.testing.assert_allclose(floats(given[0]), shorter, atol=1e-5)

            long = "the sun rises and " * 20
            with pytest.raises(InvalidRequest, match="82 tokens are more than the 40") as refused:
                await subject.prepare(request("a", long))
            assert (refused.value.param, refused.value.code) == ("input[1]", "context_length_exceeded")
            for limit, kept in ((-1, 40), (10, 10), (500, 40), (1, 1)):
                cut = await subject.prepare(request(long, truncate_tokens=limit))
                assert cut.input_tokens == kept

            with pytest.raises(InvalidRequest, match=f"100 are more than the {HIDDEN}"):
                await subject.prepare(request("a", dimensions=100))
            with pytest.raises(InvalidRequest, match="tokens are 0 to 19"):
                await subject.prepare(request((3, 20)))
            with pytest.raises(InvalidRequest, match="makes text, not embeddings"):
                await subject.prepare(request("a", model="tiny"))
            with pytest.raises(InvalidRequest, match="makes embeddings, not text"):
                await subject.prepare(Request(id="r", dialect="t", model="encoder", messages=(Message("user", "a"),)))
            with pytest.raises(Unavailable, match="cannot be downloaded"):
                await subject.prepare(request("a", model="missing"))
        finally:
            await subject.close()

    run(story())


def frames(*lengths: int) -> list[Embed]:
    return [Embed(number, "encoder", (1,) * length) for number, length in enumerate(lengths, 10)]


def test_the_engine_is_given_a_few_steps_of_work_at_a_time() -> None:
    subject = EmbeddingRun(frames(*[256] * 20), lambda _: None)
    sent = [frame.sequence for frame in subject.next_frames()]
    assert sent == list(range(10, 18))
    assert subject.next_frames() == []
    subject.take(Output(10, 0, "", "stop", vector=b"1234"))
    assert [frame.sequence for frame in subject.next_frames()] == [18]
    assert subject.unfinished == tuple(range(11, 19))


def test_one_text_that_fails_ends_the_call_once_the_others_in_the_engine_have_ended() -> None:
    async def story() -> None:
        subject = EmbeddingRun(frames(*[1000] * 5), lambda _: None)
        sent = subject.next_frames()
        assert len(sent) == 3
        subject.prefilled(10, 1000)
        subject.take(Output(10, 0, "", "error", "it broke"))
        assert subject.next_frames() == []
        subject.take(Output(11, 0, "", "stop", vector=b"1234"))
        assert not subject.ended
        subject.take(Output(12, 0, "", "stop", vector=b"1234"))
        _, end = await read(subject)
        assert (end.reason, str(end.error)) == (FinishReason.ERROR, "it broke")
        assert end.usage.tokens(Leaf.INPUT_FRESH) == 1000

    run(story())


def test_a_cancelled_call_sends_nothing_more_and_says_what_was_read() -> None:
    async def story() -> None:
        cancelled: list[EmbeddingRun] = []
        subject = EmbeddingRun(frames(*[1000] * 5), cancelled.append)
        subject.next_frames()
        subject.prefilled(10, 1000)
        subject.take(Output(10, 0, "", "stop", vector=b"1234"))
        subject.cancel()
        assert (cancelled, subject.next_frames()) == ([subject], [])
        for sequence in subject.unfinished:
            subject.take(Output(sequence, 0, "", "cancelled"))
        _, end = await read(subject)
        assert (end.reason, end.usage.tokens(Leaf.INPUT_FRESH)) == (FinishReason.CANCELLED, 1000)

    run(story())


def test_a_cancellation_that_comes_after_the_last_vector_changes_nothing() -> None:
    async def story() -> None:
        subject = EmbeddingRun(frames(5, 6), lambda _: None)
        subject.next_frames()
        subject.take(Output(10, 0, "", "stop", vector=b"1234"))
        subject.cancel()
        subject.take(Output(11, 0, "", "stop", vector=b"5678"))
        vectors, end = await read(subject)
        assert (sorted(vectors), end.reason) == ([0, 1], FinishReason.STOP)

    run(story())
