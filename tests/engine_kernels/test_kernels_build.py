"""Building the library: once for given sources, and in one line what is wrong where it can't be."""

from __future__ import annotations

from pathlib import Path

import pytest

from millicent.engine.kernels import build

NATIVE = Path(__file__).parents[2] / "native"


@pytest.fixture
def native(tmp_path: Path) -> Path:
    copied = tmp_path / "native"
    copied.mkdir()
    for source in NATIVE.iterdir():
        (copied / source.name).write_bytes(source.read_bytes())
    return copied


def test_without_a_compiler_the_reason_is_one_line_that_says_what_to_install(
    native: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", str(tmp_path / "none"))
    with pytest.raises(build.BuildError, match=r"^no C\+\+ compiler was found; install g\+\+") as caught:
        build.build(native, tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_a_compiler_that_fails_is_quoted_in_one_line(
    native: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "compiler"
    broken.write_text("#!/bin/sh\necho 'x.cpp:1: error: no such flag' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    with pytest.raises(build.BuildError, match="error: no such flag") as caught:
        build.build(native, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_library_of_these_sources_is_used_as_it_is_and_one_of_others_is_replaced(
    native: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stand-in for a compiler writes down that it ran."""
    fake = tmp_path / "compiler"
    fake.write_text('#!/bin/sh\nfor last; do :; done\nwhile [ "$1" != "-o" ]; do shift; done\necho built > "$2"\n')
    fake.chmod(0o755)
    monkeypatch.setenv("CXX", str(fake))
    first = build.build(native, tmp_path / "out")
    monkeypatch.setenv("CXX", str(tmp_path / "none"))
    assert build.build(native, tmp_path / "out") == first
    monkeypatch.setenv("CXX", str(fake))
    (native / "pool.cpp").write_text("// changed")
    second = build.build(native, tmp_path / "out")
    assert second != first
    assert [path.name for path in (tmp_path / "out").iterdir()] == [second.name]
