"""Recording passes as CUDA graphs, with PyTorch's rules for their memory in place of a GPU."""

from __future__ import annotations

import contextlib
import itertools
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch

from millicent.engine.cuda.device import CudaDevice


class Graphs:
    """A pool is there from its first graph on. Once its last graph is gone it takes no other: PyTorch's allocator
    insists (`use_count > 0 INTERNAL ASSERT FAILED`), and vLLM works around it too."""

    def __init__(self) -> None:
        self.living: dict[int, int] = {}
        self.recording = False

    class Graph:
        def __init__(self) -> None:
            self.replays = 0

        def replay(self) -> None:
            self.replays += 1

    @contextlib.contextmanager
    def record(self, graph: Graph, pool: int) -> Iterator[None]:
        assert self.living.get(pool, 1) > 0, "use_count > 0 INTERNAL ASSERT FAILED"
        self.living[pool] = self.living.get(pool, 0) + 1
        weakref.finalize(graph, self._lose, pool)
        self.recording = True
        yield
        self.recording = False

    def _lose(self, pool: int) -> None:
        self.living[pool] -= 1


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Graphs:
    found, handles = Graphs(), itertools.count()
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(handles))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graphs.Graph)
    monkeypatch.setattr(torch.cuda, "graph", found.record)
    return found


def runs(graphs: Graphs, ran: list[tuple[str, bool]]) -> list[Callable[[], None]]:
    return [lambda: ran.append(("large", graphs.recording)), lambda: ran.append(("small", graphs.recording))]


def test_a_pass_runs_once_before_it_is_recorded_so_that_nothing_is_compiled_meanwhile(graphs: Graphs) -> None:
    ran: list[tuple[str, bool]] = []
    recorded = object.__new__(CudaDevice).record(runs(graphs, ran))
    assert ran == [("large", False), ("large", True), ("small", False), ("small", True)]
    assert len(recorded) == 2


def test_one_models_passes_share_memory(graphs: Graphs) -> None:
    recorded = object.__new__(CudaDevice).record(runs(graphs, []))
    assert graphs.living == {0: len(recorded)}


def test_a_model_is_recorded_again_after_the_last_one_was_unloaded(graphs: Graphs) -> None:
    device = object.__new__(CudaDevice)
    recorded = device.record(runs(graphs, []))
    del recorded
    assert set(graphs.living.values()) == {0}
    assert len(device.record(runs(graphs, []))) == 2
