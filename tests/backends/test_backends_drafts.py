"""Guessing, from the gateway's side: the engine is told what steps take, and a model may have a draft beside it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path

import pytest

import millicent
from millicent.backends.local import LocalBackend, LocalModel
from millicent.backends.local_models import DraftModel
from millicent.core.chunks import End, Text
from millicent.core.clock import SystemClock
from millicent.core.errors import Unavailable
from millicent.core.request import Limits, Request, Sampling
from millicent.engine.protocol import Coefficients, EngineConfig
from support.observers import Notes
from support.tiny_models import TinyLlama, write_tiny_model

CONFIG = EngineConfig(dtype="fp32", threads=1, memory_gb=1.0, step_tokens=64)
FREE_ROWS = Coefficients(0, 1e6, 0, 0, 0, 0)
CHEAP = Coefficients(0, 1e4, 0, 0, 0, 0)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny", TinyLlama(context_tokens=2048))


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engine processes import the package from where we did."""
    monkeypatch.setenv("PYTHONPATH", str(Path(millicent.__file__).parents[1]))


def answers(
    models: dict[str, LocalModel], home: Path, costs: Callable[[str, str], Coefficients | None] | None
) -> tuple[dict[str, tuple[str, End]], Notes]:
    """What each model says to the same prompt."""

    async def test() -> dict[str, tuple[str, End]]:
        subject = LocalBackend(CONFIG, models, notes, SystemClock(), home, costs=costs)
        await subject.start()
        found: dict[str, tuple[str, End]] = {}
        try:
            for model in models:
                wanted = Request(
                    id="r",
                    dialect="test",
                    model=model,
                    prompt="on the other in the inner " * 3,
                    sampling=Sampling(temperature=0.8, seed=11),
                    limits=Limits(max_tokens=60, ignore_eos=True),
                )
                text = ""
                async for chunk in (await subject.prepare(wanted)).start():
                    if isinstance(chunk, Text):
                        text += chunk.text
                    elif isinstance(chunk, End):
                        found[model] = (text, chunk)
        finally:
            await subject.close()
        return found

    notes = Notes()
    return asyncio.run(asyncio.wait_for(test(), 120)), notes


def test_a_draft_models_passes_are_the_requests_own_and_its_prompt_is_counted_once(tiny: Path, tmp_path: Path) -> None:
    """The draft has the same weights here, so all it says is right."""
    models = {
        "alone": LocalModel(tiny, "home"),
        "pair": LocalModel(tiny, "home", draft=DraftModel("small", tiny)),
    }
    known = {"pair": FREE_ROWS, "small": CHEAP}
    found, notes = answers(models, tmp_path, lambda device, model: known.get(model))
    assert found["pair"][0] == found["alone"][0]
    assert found["pair"][1].usage == found["alone"][1].usage
    assert (found["pair"][1].usage.input_tokens or 0) > 20
    works = {name: [work for step in notes.steps if step.model == name for work in step.sequences] for name in known}
    assert {work.sequence for work in works["small"]} == {work.sequence for work in works["pair"]}
    assert sum(work.accepted_tokens for work in works["pair"]) > 40
    assert len(works["pair"]) < 20
    # Only what nobody knows was calibrated.
    assert {overhead.model for overhead in notes.overheads if overhead.steps} == {"alone"}


def test_a_draft_with_another_tokenizer_is_refused_with_the_reason(tiny: Path, tmp_path: Path) -> None:
    other = write_tiny_model(tmp_path / "other", TinyLlama(context_tokens=2048))
    file = other / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]
    file.write_text(json.dumps(content))
    models = {"pair": LocalModel(tiny, "home", draft=DraftModel("small", other))}
    with pytest.raises(
        Unavailable, match=r"pair: draft = 'small' has another tokenizer \(token \d+ is b'B', not b'A'\)"
    ):
        answers(models, tmp_path, None)
