"""The engine's encoder runner: what shares a pass, what is refused, what ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from millicent.core.clock import ManualClock
from millicent.core.steps import SequenceWork
from millicent.engine.config import EngineConfig
from millicent.engine.encoder_runner import EncoderRunner
from millicent.engine.protocol import Embed, Output

if TYPE_CHECKING:
    from numpy.typing import NDArray


class ScriptedEncoder:
    """A text's vector counts its tokens by their remainder; `before` is called with each batch."""

    name = "scripted"
    context_tokens = 20
    vocabulary_size = 97
    dimensions = 4
    weight_bytes = 10

    def __init__(self, before: Callable[[Sequence[Sequence[int]]], None] = lambda texts: None) -> None:
        self.batches: list[list[list[int]]] = []
        self._before = before

    def encode(self, texts: Sequence[Sequence[int]]) -> torch.Tensor:
        self._before(texts)
        self.batches.append([list(text) for text in texts])
        return torch.stack([torch.bincount(torch.tensor(text) % 4, minlength=4).float() for text in texts])


def runner(encoder: ScriptedEncoder, *, step_tokens: int = 16, deterministic: bool = False) -> EncoderRunner:
    return EncoderRunner(encoder, EngineConfig(step_tokens=step_tokens, deterministic=deterministic))


def embed(sequence: int, *tokens: int, dimensions: int = 0) -> Embed:
    return Embed(sequence, "scripted", tokens, dimensions)


def drain(subject: EncoderRunner) -> tuple[list[tuple[SequenceWork, ...]], dict[int, Output]]:
    """All steps there are: what each worked on, and every end."""
    steps, ends = [], {}
    while subject.busy:
        step = subject.step("cpu", 0, ManualClock())
        assert step.record is not None
        steps.append(step.record.sequences)
        ends.update({output.sequence: output for output in step.outputs})
    return steps, ends


def values(output: Output) -> NDArray[np.float32]:
    return np.frombuffer(output.vector, "<f4")


def test_texts_share_passes_of_as_many_rows_as_a_step_holds_in_order_of_arrival() -> None:
    encoder = ScriptedEncoder()
    subject = runner(encoder, step_tokens=16)
    for sequence, length in enumerate([6, 6, 4, 1, 20, 3]):
        assert subject.submit(embed(sequence, *range(length))) is None
    steps, ends = drain(subject)
    assert [[work.sequence for work in step] for step in steps] == [[0, 1, 2], [3], [4], [5]]
    assert steps[0][0] == SequenceWork(0, prefill_rows=6, decode_rows=0, sampled_rows=0, kv_read_tokens=6)
    assert {output.finish for output in ends.values()} == {"stop"}
    assert {output.tokens for output in ends.values()} == {0}
    assert values(ends[0]).tolist() == [2, 2, 1, 1]


def test_deterministic_gives_every_text_a_pass_of_its_own() -> None:
    encoder = ScriptedEncoder()
    subject = runner(encoder, deterministic=True)
    for sequence in range(3):
        subject.submit(embed(sequence, 1, 2))
    drain(subject)
    assert encoder.batches == [[[1, 2]]] * 3


def test_fewer_dimensions_are_the_first_ones_as_a_unit_vector() -> None:
    subject = runner(ScriptedEncoder())
    subject.submit(embed(1, 0, 0, 0, 1, 1, 1, 1, 2, dimensions=2))
    _, ends = drain(subject)
    np.testing.assert_allclose(values(ends[1]), [0.6, 0.8], rtol=1e-6)


@pytest.mark.parametrize(
    ("tokens", "message"), [((), "no tokens"), ((1,) * 21, "the model reads 20"), ((97,), "token 97"), ((-1,), "-1")]
)
def test_a_text_that_cannot_run_is_refused_alone(tokens: tuple[int, ...], message: str) -> None:
    subject = runner(ScriptedEncoder())
    subject.submit(embed(1, 5))
    refused = subject.submit(embed(2, *tokens))
    assert refused is not None
    assert (refused.sequence, refused.finish) == (2, "error")
    assert message in refused.error
    assert set(drain(subject)[1]) == {1}


def test_what_is_cancelled_is_never_computed() -> None:
    encoder = ScriptedEncoder()
    subject = runner(encoder)
    subject.submit(embed(1, 5))
    subject.submit(embed(2, 6))
    assert subject.cancel(1) == Output(1, 0, "", "cancelled")
    assert subject.cancel(1) is None
    drain(subject)
    assert encoder.batches == [[[6]]]


def test_unloading_ends_what_waits_with_the_reason() -> None:
    subject = runner(ScriptedEncoder())
    subject.submit(embed(1, 5))
    assert subject.abandon("gone") == (Output(1, 0, "", "error", "gone"),)
    assert not subject.busy


def test_a_pass_that_fails_ends_its_own_texts_and_the_next_one_runs() -> None:
    def fail(texts: Sequence[Sequence[int]]) -> None:
        if [13] in [list(text) for text in texts]:
            raise RuntimeError("unlucky")

    subject = runner(ScriptedEncoder(fail), deterministic=True)
    subject.submit(embed(1, 13))
    subject.submit(embed(2, 14))
    steps, ends = drain(subject)
    assert "RuntimeError: unlucky" in ends[1].error
    assert (ends[1].finish, ends[2].finish) == ("error", "stop")
    assert [work.prefill_rows for step in steps for work in step] == [1, 1]


def test_a_vector_that_is_not_a_number_is_an_error() -> None:
    class Broken(ScriptedEncoder):
        def encode(self, texts: Sequence[Sequence[int]]) -> torch.Tensor:
            return torch.full((len(texts), 4), torch.nan)

    subject = runner(Broken())
    subject.submit(embed(1, 5))
    _, ends = drain(subject)
    assert (ends[1].finish, ends[1].vector) == ("error", b"")
    assert "NaN" in ends[1].error
