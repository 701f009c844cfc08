"""`make serve`, as far as it can be told without installing anything."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from source_tree import ROOT

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def make(*arguments: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = {
        name: value for name, value in os.environ.items() if name not in {"HOST", "PORT", "MODEL", "MAKEFLAGS"}
    }
    return subprocess.run(
        ["make", *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """The project as make sees it, with a python that only notes how it was called."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    python = tmp_path / "python"
    python.write_text(
        "#!/bin/sh\n"
        f'echo "$@" >> {tmp_path}/calls\n'
        'if [ "$2" = venv ]; then mkdir -p .venv/bin; cp "$0" .venv/bin/python; fi\n'
        f'if [ "$2" = pip ] && [ -e {tmp_path}/broken ]; then exit 1; fi\n'
    )
    python.chmod(0o755)
    return tmp_path


def calls(bare: Path) -> list[str]:
    made = (bare / "calls").read_text().splitlines() if (bare / "calls").exists() else []
    (bare / "calls").unlink(missing_ok=True)
    return [" ".join(call.split()[1:3]) for call in made if call.startswith("-m")]


def test_host_port_and_model_are_passed_on() -> None:
    shown = make("--dry-run", "--assume-old=.venv/serve.stamp", "serve", "HOST=::1", "PORT=9", "MODEL=a b")
    assert "millicent serve --host ::1 --port 9 a b" in shown.stdout


def test_an_installation_is_made_once_and_again_when_versions_change(bare: Path) -> None:
    assert make("PYTHON=./python", ".venv/test.stamp", folder=bare).returncode == 0
    assert calls(bare) == ["venv --clear", "pip install", "pip install"]
    assert make("PYTHON=./python", ".venv/test.stamp", folder=bare).returncode == 0
    assert calls(bare) == []
    later = (bare / ".venv/serve.stamp").stat().st_mtime + 10
    os.utime(bare / "constraints.txt", (later, later))
    assert make("PYTHON=./python", ".venv/serve.stamp", folder=bare).returncode == 0
    assert calls(bare) == ["pip install"]


def test_an_installation_that_was_cut_off_is_made_anew(bare: Path) -> None:
    (bare / "broken").touch()
    assert make("PYTHON=./python", ".venv/serve.stamp", folder=bare).returncode != 0
    assert not (bare / ".venv/serve.stamp").exists()
    (bare / "broken").unlink()
    calls(bare)
    assert make("PYTHON=./python", ".venv/serve.stamp", folder=bare).returncode == 0
    assert calls(bare) == ["venv --clear", "pip install"]


def test_without_a_python_that_is_new_enough_it_says_so(bare: Path) -> None:
    done = make("PYTHON=", ".venv/serve.stamp", folder=bare)
    assert done.returncode != 0
    assert "error: Python 3.11 or later was not found" in done.stdout
