"""Who may import whom. The direction of imports is what keeps a room small enough to be understood alone."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib

import pytest

from source_tree import PACKAGE, ROOT, imports_of, modules, name_of, tree_of

# Room: what it may import of ours besides core and itself. A dotted name allows that module and what is below it.
CONTRACT: dict[str, tuple[str, ...]] = {
    "core": (),
    "step_time": (),
    "text": (),
    "hub": (),
    "wire": (),
    "engine": ("step_time", "text", "hub"),
    "meter": ("step_time",),
    "ledger": (),
    "control": ("ledger",),
    "backends": ("wire", "text", "hub", "engine.protocol"),
    "caching": ("ledger.queries", "meter"),
    "routing": ("ledger.queries", "meter"),
    "pipeline": ("control", "caching", "routing", "meter", "ledger", "text"),
    "jobs": ("pipeline", "ledger"),
    "economics": ("engine.scheduling", "step_time", "meter", "caching", "routing", "ledger.queries"),
    "watch": ("ledger.queries",),
    "distill": ("pipeline", "ledger.queries", "engine.models"),
    "dashboard": ("ledger.queries", "economics", "watch"),
    "server": ("wire", "pipeline", "control", "jobs", "hub", "text", "ledger.queries"),
}
# They wire everything together: may import anything, and nobody but they themselves may import them.
WIRING = ("config", "app", "app_models", "app_pages", "cli", "__main__")

# Loaded only where the work is done: the gateway, the command line and the scheduler stay light.
HEAVY = ("torch", "numpy", "transformers", "safetensors", "gguf", "huggingface_hub")


def room_of(module: str) -> str:
    """`millicent.core.money` is in `core`; the package itself, which holds the version, is in ``."""
    return module.split(".")[1] if "." in module else ""


def verdict(importer: str, target: str) -> str | None:
    """What is wrong with this import, or None."""
    room, other = room_of(importer), room_of(target)
    if room == other or other in {"", "core"} or room in WIRING:
        return None
    if other in WIRING:
        return f"nobody imports {other}: take what you need as an argument"
    inside = target.removeprefix("millicent.")
    if any(inside == allowed or inside.startswith(allowed + ".") for allowed in CONTRACT[room]):
        return None
    allowed = ", ".join(("core", *CONTRACT[room]))
    return f"{room} may import only {allowed}"


def test_every_room_is_in_the_contract() -> None:
    rooms = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    unknown = rooms - set(CONTRACT) - set(WIRING) - {"__init__"}
    assert not unknown, f"not in the contract: {sorted(unknown)}"


def test_rooms_import_only_what_the_contract_allows() -> None:
    known = frozenset(modules())
    wrong = [
        f"{name_of(path)}:{line}: imports {target}: {reason}"
        for module, path in sorted(modules().items())
        for line, target in imports_of(path, known)
        if target.split(".")[0] == "millicent" and (reason := verdict(module, target)) is not None
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("importer", "target", "allowed"),
    [
        ("millicent.core.money", "millicent.meter.prices", False),
        ("millicent.meter.prices", "millicent.core.money", True),
        ("millicent.backends.local", "millicent.engine.protocol", True),
        ("millicent.backends.local", "millicent.engine.scheduling.scheduler", False),
        ("millicent.economics.simulator", "millicent.engine.scheduling.scheduler", True),
        ("millicent.dashboard.pages", "millicent.ledger.queries", True),
        ("millicent.dashboard.pages", "millicent.ledger.writer", False),
        ("millicent.pipeline.pipeline", "millicent.app", False),
        ("millicent.app", "millicent.engine.runner", True),
        ("millicent.core.money", "millicent", True),
    ],
)
def test_the_contract_tells_allowed_from_forbidden(importer: str, target: str, allowed: bool) -> None:
    assert (verdict(importer, target) is None) is allowed


def test_nothing_heavy_is_imported_before_it_is_needed() -> None:
    """Everything outside the engine, and what the gateway and the simulator share with it, imports without tensors."""
    light = [
        module
        for module in sorted(modules())
        if room_of(module) != "engine"
        or module.startswith(("millicent.engine.protocol", "millicent.engine.config", "millicent.engine.scheduling"))
    ]
    script = (
        "import importlib, sys\n"
        f"for module in {light!r}:\n"
        "    importlib.import_module(module)\n"
        f"    loaded = sorted({set(HEAVY)!r} & set(sys.modules))\n"
        "    if loaded:\n"
        "        sys.exit(f'importing {module} loads {loaded}: import them inside the function that needs them')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def _asked_for(*extras: str) -> set[str]:
    """What an installation brings, by the names it is imported by."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [*project["dependencies"], *(line for extra in extras for line in project["optional-dependencies"][extra])]
    return {re.split(r"[<>=;\[ ]", line, maxsplit=1)[0].replace("-", "_").lower() for line in lines}


def test_a_plain_installation_has_what_is_imported_at_once() -> None:
    wrong = []
    for path in modules().values():
        room = path.relative_to(PACKAGE).parts[0]
        there = _asked_for(*(("engine", "gpu") if room == "engine" else ()))
        for statement in tree_of(path).body:
            names = [each.name for each in statement.names] if isinstance(statement, ast.Import) else []
            if isinstance(statement, ast.ImportFrom) and not statement.level:
                names = [statement.module or ""]
            tops = {name.partition(".")[0] for name in names} - {"millicent", *sys.stdlib_module_names}
            wrong += [f"{name_of(path)}: {top}" for top in tops if top.lower() not in there]
    assert not wrong, f"imported at once, and in no dependency: {wrong}"
