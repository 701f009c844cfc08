"""What this machine can do for Millicent. Each check says what it found and, where something is amiss, the fix."""

from __future__ import annotations

import errno
import http.client
import importlib.metadata
import os
import platform
import shutil
import socket
import sqlite3
from collections.abc import Callable, Iterator
from enum import StrEnum
from pathlib import Path
from urllib.parse import urlsplit

import msgspec
import psutil

from millicent import config as configuration
from millicent.backends.elsewhere import Elsewhere, open_backend
from millicent.cli.home import ledger_path
from millicent.cli.serving import called_elsewhere
from millicent.cli.show import size
from millicent.core.clock import SystemClock
from millicent.core.errors import ConfigError, MillicentError, ModelNotFound
from millicent.engine.config import EngineConfig
from millicent.engine.gpus import chosen_device, gpus, missing_for_gpu
from millicent.engine.kernels import available, build
from millicent.engine.machine import memory_budget_bytes, usable_cores
from millicent.hub import CATALOGUE, list_installed, verify
from millicent.ledger.queries import LedgerQueries

_GB = 10**9
_CPUINFO = Path("/proc/cpuinfo")
# What the kernels or PyTorch make use of, as Linux names it: x86-64, then arm64.
_CPU_FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "asimd", "asimddp", "i8mm", "bf16")
# Without it the kernels compute one number at a time.
_NEEDED = {"x86_64": "avx2", "aarch64": "asimddp"}


class State(StrEnum):
    GOOD = "good"
    LIMITED = "limited"  # it works, with less than there could be
    WRONG = "wrong"


class Finding(msgspec.Struct, frozen=True):
    what: str
    state: State
    found: str
    fix: str | None = None


def examine() -> Iterator[Finding]:
    """Every check, in the order in which problems are best solved."""
    path = configuration.home() / configuration.FILE_NAME
    try:
        settings = configuration.load(path)
        yield Finding("config", State.GOOD, str(path) if path.exists() else "defaults")
    except ConfigError as error:
        settings = configuration.Config()
        yield Finding("config", State.WRONG, "millicent.toml has a mistake", error.message)
    checks: tuple[Callable[[], Finding], ...] = (
        python,
        processor,
        lambda: memory(settings.engine),
        lambda: energy(settings),
        lambda: torch(needed=runs_here(settings)),
        lambda: gpu(settings.engine),
        compiler,
        lambda: folder("home", configuration.home()),
        lambda: folder("cache", configuration.cache()),
        models,
        lambda: port(settings.server.host, settings.server.port),
        lambda: ledger(ledger_path()),
    )
    for check in checks:
        yield check()
    for place in called_elsewhere(settings, configuration.home()).values():
        yield upstream(place)


def python() -> Finding:
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    return Finding("python", State.GOOD, found)


def processor() -> Finding:
    cores = usable_cores(EngineConfig())
    features = cpu_features()
    found = f"{cores} cores, {' '.join(features) or 'no vector extensions known'}"
    needed = _NEEDED.get(platform.machine())
    if needed is not None and needed not in features and _CPUINFO.exists():
        fix = f"without {needed} every answer is slow: use a newer machine."
        return Finding("processor", State.LIMITED, found, fix)
    return Finding("processor", State.GOOD, found)


def cpu_features() -> list[str]:
    for line in _read(_CPUINFO).splitlines():
        name, _, flags = line.partition(":")
        if name.strip() in {"flags", "Features"}:
            return [feature for feature in _CPU_FEATURES if feature in flags.split()]
    return ["asimd", "asimddp"] if platform.machine() == "arm64" else []  # every Mac that is no x86-64


def memory(config: EngineConfig) -> Finding:
    available = psutil.virtual_memory().available
    found = f"{size(available)} free; models may take {size(memory_budget_bytes(config))}"
    if available < _GB:
        return Finding("memory", State.LIMITED, found, "end other programs, or serve a small model.")
    return Finding("memory", State.GOOD, found)


def energy(settings: configuration.Config) -> Finding:
    """What joules on receipts rest on here."""
    from millicent.cli.serving import placement_of
    from millicent.meter.energy import find_energy
    from millicent.meter.placements import stated_watts

    try:
        watts = stated_watts(placement_of(settings))
    except ConfigError:
        watts = None  # which placement this machine is, `config` and `serve` say
    found = find_energy(settings.engine.device, watts, visible=os.environ.get("CUDA_VISIBLE_DEVICES"))
    if found.source is None:
        fix = "let this user read the counter, or set watts in [placements.NAME] of kind owned."
        return Finding("energy", State.LIMITED, found.what, fix)
    return Finding("energy", State.GOOD, found.what)


def runs_here(settings: configuration.Config) -> bool:
    """Does this machine run models, or do they all run elsewhere?"""
    return not settings.models or any(not model.deployed for model in settings.models.values())


def torch(*, needed: bool) -> Finding:
    try:
        return Finding("torch", State.GOOD, importlib.metadata.version("torch"))
    except importlib.metadata.PackageNotFoundError:
        if not needed:
            return Finding("torch", State.GOOD, "not installed, and not needed: every model runs elsewhere")
        return Finding("torch", State.WRONG, "not installed", "pip install 'millicent[engine]'")


def upstream(place: Elsewhere) -> Finding:
    """Is there a key, and does anybody listen there? Nothing is asked that costs."""
    what = f"placement {place.placement}"
    try:
        backend = open_backend(place, SystemClock())
    except ConfigError as error:
        return Finding(what, State.WRONG, "can't be called", error.message)
    url = urlsplit(backend.upstream.base_url)
    found = f"{backend.name} at {backend.upstream.base_url}: {', '.join(place.models)}"
    try:
        socket.create_connection((url.hostname or "", url.port or (443 if url.scheme == "https" else 80)), 3).close()
    except OSError as error:
        return Finding(what, State.WRONG, f"{found}: can't be reached ({error})", "start it, or correct its base_url.")
    return Finding(what, State.GOOD, found)


def gpu(config: EngineConfig) -> Finding:
    """What there is, and whether the engine runs on it."""
    found, missing = gpus(), missing_for_gpu()
    names = ", ".join(f"{each.name} ({size(each.memory_bytes)}, driver {each.driver})" for each in found) or "none"
    try:
        chosen = chosen_device(config.device, found, missing)
    except ConfigError as error:
        return Finding("gpu", State.WRONG, names, error.message)
    if not found:
        return Finding("gpu", State.GOOD, names)
    if missing:
        return Finding("gpu", State.LIMITED, f"{names}; the engine runs on {chosen}", f"{missing}, to use it.")
    return Finding("gpu", State.GOOD, f"{names}; the engine runs on {chosen}")


def compiler() -> Finding:
    """What compiles the kernels, where that wasn't done when Millicent was installed."""
    if (found := build.compiler()) is not None:
        return Finding("compiler", State.GOOD, found)
    if compiled := available().instruction_set:
        return Finding("compiler", State.GOOD, f"none, and not needed: the kernels are there, for {compiled}")
    fix = "on Debian: apt-get install g++; on macOS: xcode-select --install."
    return Finding("compiler", State.LIMITED, "no C++ compiler: PyTorch's own kernels are used", fix)


def folder(what: str, path: Path) -> Finding:
    """Whether `path`, or the folder in which it will be made, can be written and has room."""
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        return Finding(what, State.WRONG, f"{path} can't be written", f"set MILLICENT_{what.upper()} elsewhere.")
    free = shutil.disk_usage(existing).free
    found = f"{path}, {size(free)} free"
    if free < _GB:
        return Finding(what, State.LIMITED, found, "make room: nothing can be kept on a full disk.")
    return Finding(what, State.GOOD, found)


def port(host: str, number: int) -> Finding:
    """Free, or held by a Millicent that answers."""
    address = f"{host}:{number}"
    try:
        family, kind, protocol, _, target = socket.getaddrinfo(host, number, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(target)
    except OSError as error:
        if error.errno == errno.EADDRINUSE and _answers(host, number):
            return Finding("port", State.GOOD, f"a Millicent server answers on {address}")
        reason = "is taken" if error.errno == errno.EADDRINUSE else str(error)
        return Finding("port", State.WRONG, f"{address} {reason}", "set another `port` or `host` in [server].")
    return Finding("port", State.GOOD, f"{address} is free")


def _answers(host: str, number: int) -> bool:
    connection = http.client.HTTPConnection(host, number, timeout=2)
    try:
        connection.request("GET", "/ready")
        return b'"engines"' in connection.getresponse().read(65536)
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def ledger(path: Path) -> Finding:
    """Is the file whole, and does everything in it add up?"""
    if not path.exists():
        return Finding("ledger", State.GOOD, "none yet: it is made with the first receipt")
    fix = f"stop the server, keep a copy of {path}, then start it again, or restore a backup."
    try:
        problems = LedgerQueries(path).verify()
    except (MillicentError, sqlite3.Error) as error:
        problems = [str(error)]
    if problems:
        return Finding("ledger", State.WRONG, f"{path}: {'; '.join(problems[:3])}", fix)
    return Finding("ledger", State.GOOD, f"{path}, {size(path.stat().st_size)}: sound, and it adds up")


def models() -> Finding:
    """What is here, and what is here but damaged."""
    for name in CATALOGUE:
        try:
            verify(name, configuration.cache())
        except ModelNotFound:
            continue
        except MillicentError as error:
            return Finding(
                "models", State.WRONG, error.message, f"delete that file, if it is there; then: millicent pull {name}"
            )
    here = [model.name for model in list_installed(configuration.cache())]
    return Finding("models", State.GOOD, ", ".join(here) or "none yet: `millicent serve` fetches what it needs")


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
