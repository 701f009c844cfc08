"""How the command line behaves as a program: help, exit statuses, one-line errors."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import get_args

import click
import pytest

from millicent import __version__
from millicent.cli import commands, main, run
from millicent.cli.ledger import GROUPS
from millicent.core.errors import ModelError
from millicent.ledger.queries import GroupBy

Outcome = tuple[int, str, str]


@pytest.fixture(autouse=True)
def _own_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MILLICENT_HOME", str(tmp_path))
    monkeypatch.delenv("MILLICENT_DEBUG", raising=False)


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> Outcome:
    status = run(arguments)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def program(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "millicent", *arguments]


def leaves(group: click.Group, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = []
    for name, command in group.commands.items():
        found += leaves(command, (*path, name)) if isinstance(command, click.Group) else [(*path, name)]
    return found


@pytest.mark.parametrize("command", leaves(commands.millicent), ids=" ".join)
def test_every_command_explains_itself(command: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = call(capsys, *command, "--help")
    assert (status, err) == (0, "")
    assert out.startswith(f"Usage: millicent {' '.join(command)} ")


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",)])
def test_help_lists_the_commands(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = call(capsys, *arguments)
    assert status == 0
    assert all(f"\n  {name} " in out for name in commands.millicent.commands)


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(capsys, "--version") == (0, f"millicent {__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (("recepits",), "recepits"),
        (("receipts", "--limmit", "3"), "--limmit"),
        (("receipts", "--limit", "many"), "many"),
        (("report", "--by", "planet"), "planet"),
        (("receipts", "--since", "yesterday-ish"), "is no time"),
        (("run", "smollm2:135m"), "PROMPT"),
    ],
)
def test_a_wrong_call_is_one_line_and_exit_2(
    arguments: tuple[str, ...], fragment: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = call(capsys, *arguments)
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert fragment in err


def test_a_mistake_in_the_configuration_is_one_line_and_exit_1(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "millicent.toml").write_text("[server]\nprot = 1\n")
    status, out, err = call(capsys, "config", "check")
    assert (status, out) == (1, "")
    assert err == f"error: {tmp_path}/millicent.toml:2: [server] has no setting `prot`: did you mean `port`?\n"


def test_a_right_configuration_is_said_to_be_right(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "millicent.toml").write_text("[server]\nport = 1\n")
    assert call(capsys, "config", "check") == (0, f"{tmp_path}/millicent.toml is right.\n", "")


def test_the_configuration_as_json_holds_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = call(capsys, "config", "check", "--json")
    assert status == 0
    assert '"max_concurrent": 256' in out


@pytest.mark.parametrize(
    ("raised", "status", "message"),
    [
        (
            ModelError("tiny.gguf: is cut off."),
            1,
            "error: tiny.gguf: is cut off.\n",
        ),
        (KeyboardInterrupt(), 130, ""),
        (
            RuntimeError("a\nb"),
            1,
            "error: RuntimeError: a b (unexpected: MILLICENT_DEBUG=1 shows where)\n",
        ),
    ],
)
def test_what_goes_wrong_inside_is_one_line(
    raised: BaseException,
    status: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: object) -> None:
        raise raised

    monkeypatch.setattr("millicent.config.load", fail)
    got, out, err = call(capsys, "config", "check")
    assert (got, out, err.lstrip("\n")) == (status, "", message)


def test_a_reader_that_leaves_is_no_error() -> None:
    """`millicent ... | head -1` ends quietly."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(program("config", "check", "--json"), stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")


def test_a_full_disk_is_told_in_one_line() -> None:
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(program("config", "check", "--json"), stdout=full, stderr=subprocess.PIPE, check=False)
    assert (done.returncode, done.stderr) == (1, b"error: No space left on device\n")


def test_a_closed_output_is_no_error() -> None:
    shut = ["sh", "-c", 'exec "$@" >&-', "sh", *program("config", "check")]
    done = subprocess.run(shut, stderr=subprocess.PIPE, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


def test_what_is_piped_is_utf_8_whatever_the_locale() -> None:
    """A name that the locale lacks ended the output."""
    foreign = os.environ | {"PYTHONIOENCODING": "latin-1"}
    script = "from millicent.cli import run; run(['--version']); print('漢字')"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, env=foreign, check=False)
    assert done.stdout.decode().endswith("\n漢字\n")


def test_an_argument_that_is_no_text_is_a_wrong_call(capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = call(capsys, "receipts", os.fsdecode(b"\xff"))
    assert (status, err) == (2, "error: '\\udcff' is no UTF-8 text: write it in UTF-8\n")


def test_what_a_call_says_is_quoted_in_part_and_moves_no_cursor(capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = call(capsys, "report", "--by", "\x1b[2J\n" + "x" * 20_000)
    assert status == 2
    assert err.count("\n") == 1
    assert "\x1b" not in err
    assert len(err) < 1100


def test_a_span_has_an_end(capsys: pytest.CaptureFixture[str]) -> None:
    """It was an error of the ledger's."""
    for arguments in (("keys", "create", "--expires", "99999999999999d"), ("receipts", "--since", "9" * 5000 + "d")):
        status, _, err = call(capsys, *arguments)
        assert (status, err.count("\n")) == (2, 1)


def test_an_interruption_before_there_is_a_command_is_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("millicent.cli.run", interrupted)
    with pytest.raises(SystemExit, match="130"):
        main([])


def test_help_loads_nothing_heavy() -> None:
    script = (
        "import sys\nfrom millicent.cli import run\nrun(['--help'])\n"
        "heavy = {'torch', 'numpy', 'transformers', 'rich', 'uvicorn', 'starlette', 'msgspec', 'sqlite3', 'asyncio'}\n"
        "loaded = sorted(heavy & set(sys.modules))\n"
        "sys.exit(f'help loads {loaded}' if loaded else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_without_torch_serve_says_what_to_install(tmp_path: Path) -> None:
    hide = "import sys; sys.modules['torch'] = None; from millicent.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", hide, "serve"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"MILLICENT_HOME": str(tmp_path)},
    )
    assert done.returncode == 1
    assert done.stderr == "error: the engine needs PyTorch, which isn't installed: pip install 'millicent[engine]'.\n"


def test_report_groups_by_all_that_the_ledger_can() -> None:
    assert get_args(GroupBy) == GROUPS
