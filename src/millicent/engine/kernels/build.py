"""Compiles `native/` into a shared library. Standard library only: the build hook loads this file by its path."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

_FLAGS = ("-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-ffp-contract=off")
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni")
_COMMON_UNITS: dict[str, tuple[str, ...]] = {
    "decoder.cpp": (),
    "dispatch.cpp": (),
    "pack.cpp": (),
    "pool.cpp": (),
    "kernels_portable.cpp": (),
}
_X86_UNITS: dict[str, tuple[str, ...]] = {
    "kernels_avx2.cpp": _AVX2,
    "kernels_avx512.cpp": _AVX512,
    "kernels_avx512bf16.cpp": (*_AVX512, "-mavx512bf16"),
}
_ARM_UNITS: dict[str, tuple[str, ...]] = {"kernels_neon.cpp": ("-march=armv8.2-a+dotprod",)}


class BuildError(Exception):
    """One line: what is missing or what the compiler said."""


def library_name(native: Path) -> str:
    """Holds a digest of the sources and of what they are built for, so that a library is never used with sources it was
    not built from, nor, in a folder that several machines share, on one that it is not for."""
    digest = hashlib.sha256(platform_tag().encode())
    for source in sorted(native.glob("*.*")):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return f"millicent_kernels.{digest.hexdigest()[:16]}.so"


def compiler() -> str | None:
    """The C++ compiler to use: $CXX, or the first of c++, g++ and clang++ on the path."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return next((found for name in names if (found := shutil.which(name))), None)


def platform_tag() -> str:
    """What a wheel with the library in it says of the machines that it is for."""
    if sys.platform == "darwin":
        # Python tells for how many architectures, and how old systems, it was itself built; the library is for ours.
        return f"macosx_{platform.mac_ver()[0].partition('.')[0]}_0_{platform.machine()}"
    return sysconfig.get_platform().replace("-", "_").replace(".", "_")


def build(native: Path, folder: Path) -> Path:
    """The library in `folder`, compiled unless it is there; earlier builds in it are removed.

    Raises BuildError where there is no compiler or it fails.
    """
    target = folder / library_name(native)
    if target.exists():
        return target
    command = compiler()
    if command is None:
        raise BuildError("no C++ compiler was found; install g++ or clang++, or set CXX")
    with tempfile.TemporaryDirectory() as scratch:
        objects = _compile(command, native, Path(scratch))
        library = Path(scratch) / target.name
        _run([command, "-shared", *map(str, objects), "-o", str(library), "-pthread"])
        try:
            _place(library, target)
        except OSError as error:
            raise BuildError(f"{target} cannot be written: {error.strerror}") from None
    return target


def _compile(command: str, native: Path, scratch: Path) -> list[Path]:
    units = {**_COMMON_UNITS, **_units_of_this_machine()}

    def compile_unit(unit: str) -> Path:
        output = scratch / f"{unit}.o"
        _run([command, *_FLAGS, *units[unit], "-c", str(native / unit), "-o", str(output)])
        return output

    with ThreadPoolExecutor(max_workers=os.cpu_count()) as workers:
        return list(workers.map(compile_unit, units))


def _units_of_this_machine() -> dict[str, tuple[str, ...]]:
    machine = platform.machine().lower()
    if machine in {"x86_64", "amd64"}:
        return _X86_UNITS
    return _ARM_UNITS if machine in {"aarch64", "arm64"} else {}


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip()[-200:])
        raise BuildError(f"{command[0]} failed ({said}); GCC 11 or Clang 14 and later are known to work")


def _place(library: Path, target: Path) -> None:
    """Several processes may build at once: the last one's rename wins, and each finds a whole file."""
    target.parent.mkdir(parents=True, exist_ok=True)
    waiting = target.with_name(f"{target.name}.{os.getpid()}")
    shutil.copyfile(library, waiting)
    waiting.replace(target)
    for old in target.parent.glob("millicent_kernels.*.so"):
        if old != target:
            old.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.stdout.write(f"{build(Path(sys.argv[1]), Path(sys.argv[2]))}\n")
