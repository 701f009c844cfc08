"""The project's own files, read as text and as syntax trees: what the house-rule tests look at."""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
SRC = ROOT / "src"
PACKAGE = SRC / "millicent"


def tracked(*suffixes: str) -> list[Path]:
    """Files of the project, by suffix: those git knows or would add; without git, all that aren't build outputs."""
    try:
        listed = subprocess.run(
            ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.splitlines()
        files = [ROOT / name for name in listed]
    except (OSError, subprocess.CalledProcessError):
        files = [path for path in ROOT.rglob("*") if not {".venv", "build", "dist"} & set(path.parts)]
    return sorted(path for path in files if path.is_file() and (not suffixes or path.suffix in suffixes))


def python_files() -> list[Path]:
    return tracked(".py")


def name_of(path: Path) -> str:
    """How a failure names a file."""
    return str(path.relative_to(ROOT))


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


@cache
def modules() -> dict[str, Path]:
    """Dotted names of all modules under src, packages included."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(SRC).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_of(path: Path, known: frozenset[str]) -> Iterator[tuple[int, str]]:
    """Line and target of each import, wherever it stands: in functions and under TYPE_CHECKING too.

    `from a import b` is an import of `a.b` where that is a module (in `known`), else of `a`.
    """
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            source = _absolute(node, path)
            for alias in node.names:
                submodule = f"{source}.{alias.name}"
                yield node.lineno, submodule if submodule in known else source


def _absolute(node: ast.ImportFrom, path: Path) -> str:
    if not node.level:
        return node.module or ""
    package = path.relative_to(SRC).parts[: -node.level]
    return ".".join([*package, *([node.module] if node.module else [])])
