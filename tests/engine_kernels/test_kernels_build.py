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


@pytest.mark.parametrize(
    ("system", "python_is_for", "tag"),
    [
        ("darwin", "macosx-10.13-universal2", "macosx_14_0_arm64"),
        ("linux", "linux-aarch64", "linux_aarch64"),
    ],
)
def test_a_wheel_is_for_the_machine_that_its_library_was_built_on(
    system: str, python_is_for: str, tag: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.platform", system)
    monkeypatch.setattr("sysconfig.get_platform", lambda: python_is_for)
    monkeypatch.setattr("platform.mac_ver", lambda: ("14.5", ("", "", ""), "arm64"))
    monkeypatch.setattr("platform.machine", lambda: "arm64")
    assert build.platform_tag() == tag


def test_machines_that_share_a_checkout_never_use_each_others_library(
    native: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = set()
    for python_is_for in ("linux-x86_64", "linux-aarch64"):
        monkeypatch.setattr("sysconfig.get_platform", lambda found=python_is_for: found)
        names.add(build.library_name(native))
    assert len(names) == 2
