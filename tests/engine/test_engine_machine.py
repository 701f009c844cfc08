"""What a machine, or a container on it, has to give."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from millicent.engine import machine
from millicent.engine.config import EngineConfig

GIB = 1 << 30


@pytest.fixture
def container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A control group with a name as systemd allows it, within another."""
    own = tmp_path / "groups" / "büro.slice" / "unser.service"
    own.mkdir(parents=True)
    (tmp_path / "own").write_text("0::/büro.slice/unser.service\n", encoding="utf-8")
    monkeypatch.setattr(machine, "_CGROUPS", tmp_path / "groups")
    monkeypatch.setattr(machine, "_OWN_CGROUPS", tmp_path / "own")
    return own


def test_a_containers_memory_and_processor_quota_bound_what_is_used(container: Path) -> None:
    (container / "memory.max").write_text("max\n")
    (container.parent / "memory.max").write_text(f"{2 * GIB}\n")
    (container / "cpu.max").write_text("150000 100000\n")
    assert machine.memory_budget_bytes(EngineConfig()) == GIB
    assert machine.usable_cores(EngineConfig()) == 1


def test_where_there_are_no_control_groups_nor_affinities_the_machine_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "_OWN_CGROUPS", tmp_path / "none")
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 10)
    assert machine.usable_cores(EngineConfig()) == 10
