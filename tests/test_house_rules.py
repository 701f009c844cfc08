"""House rules that a machine can hold. Each failure names the place and what to do instead."""

from __future__ import annotations

import ast
import re
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from millicent.config import Config
from source_tree import PACKAGE, ROOT, imports_of, modules, name_of, python_files, tracked, tree_of

MAX_FILE_LINES = 600
MAX_FUNCTION_LINES = 70

# The only module that reads the system clock.
CLOCK = PACKAGE / "core" / "clock.py"
CLOCK_CALLS = {
    "time.time",
    "time.time_ns",
    "time.monotonic",
    "time.monotonic_ns",
    "time.perf_counter",
    "time.perf_counter_ns",
    "datetime.now",
    "datetime.utcnow",
    "datetime.today",
    "datetime.datetime.now",
    "datetime.datetime.utcnow",
    "date.today",
    "datetime.date.today",
}

# Whatever holds or computes an amount: integers and Decimals only.
MONEY = (
    "core/money.py",
    "core/receipts.py",
    "core/accounts.py",
    "core/budgets.py",
    "meter/",
    "ledger/budgets.py",
    "ledger/entries.py",
    "economics/changes.py",
    "economics/config.py",
    "economics/forecast.py",
    "economics/margin.py",
    "economics/plans.py",
    "control/budgets.py",
    "control/config.py",
    "control/limits.py",
    "economics/api_cost.py",
    "economics/breakeven.py",
    "economics/curves.py",
    "economics/places.py",
    "economics/where.py",
)
# Where amounts are made, even a division must say how it rounds; elsewhere mypy refuses a float for a Decimal.
AMOUNTS = ("core/money.py", "meter/pricing.py")

# Where writing to the terminal is the job.
PRINTERS = ("cli/", "app.py")

# Offered to users' tests as much as to ours, so it may be that nothing in src imports them.
PUBLIC_FAKES = {"millicent.backends.fake", "millicent.ledger.memory"}

LEFTOVERS = re.compile(r"\b(?:TO" r"DO|FIX" r"ME|XX" r"X)\b")


def source_files() -> list[Path]:
    return [path for path in python_files() if path.is_relative_to(PACKAGE)]


def inside(path: Path, places: tuple[str, ...]) -> bool:
    return path.is_relative_to(PACKAGE) and path.relative_to(PACKAGE).as_posix().startswith(places)


def test_files_are_short_enough_to_read_whole() -> None:
    lengths = {
        name_of(path): len(path.read_text().splitlines()) for path in tracked(".py", ".cpp", ".h", ".js", ".css")
    }
    long = [
        f"{name}: {lines} lines, at most {MAX_FILE_LINES}" for name, lines in lengths.items() if lines > MAX_FILE_LINES
    ]
    assert not long, "\n".join(long)


def test_functions_are_short_enough_to_see_whole() -> None:
    long = [
        f"{name_of(path)}:{node.lineno}: {node.name} has {lines} lines, at most {MAX_FUNCTION_LINES}"
        for path in python_files()
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (lines := (node.end_lineno or 0) - node.lineno + 1) > MAX_FUNCTION_LINES
    ]
    assert not long, "\n".join(long)


def test_every_module_is_used() -> None:
    """Used is: imported by another module of ours, or started by name, as a program or an entry point."""
    known = frozenset(modules())
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    used = {target.partition(":")[0] for target in scripts.values()} | PUBLIC_FAKES
    used |= {module for module in known if module.endswith(".__main__")}
    for module, path in modules().items():
        used |= {target for _, target in imports_of(path, known) if target != module}
        used |= {
            node.value for node in ast.walk(tree_of(path)) if isinstance(node, ast.Constant) and node.value in known
        }
    packages = {module.rpartition(".")[0] for module in known}
    dead = [
        f"{name_of(path)}: nobody imports it" for module, path in modules().items() if module not in used | packages
    ]
    assert not dead, "\n".join(sorted(dead))


def test_test_files_have_unique_names() -> None:
    """So that `pytest -k` and reports name one file each."""
    names = Counter(path.name for path in python_files() if path.is_relative_to(ROOT / "tests"))
    assert [name for name, count in names.items() if count > 1 and name != "conftest.py"] == []


def banned(path: Path) -> Iterator[tuple[int, str]]:
    """Line and complaint for each call that a house rule forbids in a module of ours."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Attribute | ast.Name) and ast.unparse(node) in CLOCK_CALLS and path != CLOCK:
            yield node.lineno, f"{ast.unparse(node)}: take a millicent.core.clock.Clock and ask it"
        elif isinstance(node, ast.ImportFrom) and node.module == "time" and path != CLOCK:
            names = {f"time.{alias.name}" for alias in node.names} & CLOCK_CALLS
            yield from ((node.lineno, f"{name}: take a millicent.core.clock.Clock and ask it") for name in names)
        elif isinstance(node, ast.ExceptHandler) and swallows_everything(node):
            yield node.lineno, "an error is swallowed: catch what is expected, and say or count what happened"
        elif isinstance(node, ast.Name) and node.id == "print" and not inside(path, PRINTERS):
            yield node.lineno, "print: only the command line prints; use logging"
        elif isinstance(node, ast.Name) and node.id == "NotImplementedError":
            yield node.lineno, "NotImplementedError: leave out what doesn't work yet"


def swallows_everything(handler: ast.ExceptHandler) -> bool:
    everything = handler.type is None or ast.unparse(handler.type) in {"Exception", "BaseException"}
    silent = all(
        isinstance(node, ast.Pass | ast.Continue)
        or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
        for node in handler.body
    )
    return everything and silent


def floats(path: Path) -> Iterator[tuple[int, str]]:
    """Line and complaint for each place where money code could get a binary fraction."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Name) and node.id == "float":
            yield node.lineno, "float: money is integers of nano-dollars and Decimals"
        elif isinstance(node, ast.Constant) and isinstance(node.value, float):
            yield node.lineno, f"{node.value} is a float: write Decimal('{node.value}')"


def divisions(path: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.BinOp | ast.AugAssign) and isinstance(node.op, ast.Div):
            yield node.lineno, "`/` makes floats of integers: divide Decimals in a context, or use apportion()"


def test_nothing_banned_is_called() -> None:
    wrong = [f"{name_of(path)}:{line}: {complaint}" for path in source_files() for line, complaint in banned(path)]
    assert not wrong, "\n".join(wrong)


def test_no_float_holds_money() -> None:
    wrong = [
        f"{name_of(path)}:{line}: {complaint}"
        for path in source_files()
        if inside(path, MONEY)
        for line, complaint in (*floats(path), *(divisions(path) if inside(path, AMOUNTS) else ()))
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("code", "complaints"),
    [
        ("import time\nstart = time.monotonic_ns()", 1),
        ("from time import time_ns, sleep", 1),
        ("from datetime import datetime\ndatetime.now()", 1),
        ("try:\n    f()\nexcept Exception:\n    pass", 1),
        ("try:\n    f()\nexcept OSError:\n    pass", 0),
        ("print(1)", 1),
        ("raise NotImplementedError", 1),
        ("import time\ntime.sleep(1)", 0),
    ],
)
def test_the_bans_find_what_they_ban(code: str, complaints: int, tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(code)
    assert len(list(banned(path))) == complaints


@pytest.mark.parametrize("code", ["x = 1.5", "x: float = 1", "x = a / b", "x /= 2"])
def test_the_float_ban_finds_floats(code: str, tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(code)
    assert [*floats(path), *divisions(path)]


def test_no_leftovers() -> None:
    wrong = [
        f"{name_of(path)}:{number}: {line.strip()}"
        for path in tracked(".py", ".md", ".toml", ".cpp", ".h", ".js", ".css", ".html", ".j2", "")
        if path.name != "LICENSE"
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1)
        if LEFTOVERS.search(line)
    ]
    assert not wrong, "\n".join(wrong)


def test_every_setting_is_read_somewhere() -> None:
    """A setting that nobody reads is accepted and ignored, which is worse than refused."""
    read = Counter(
        node.attr
        for path in source_files()
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    )
    hints = get_type_hints(Config)
    rooms = {section: get_args(hint)[1] if get_args(hint) else hint for section, hint in hints.items()}
    unread = [
        f"{section}.{name}" for section, room in rooms.items() for name in room.__struct_fields__ if not read[name]
    ]
    assert not unread, f"nobody reads {', '.join(unread)}"
