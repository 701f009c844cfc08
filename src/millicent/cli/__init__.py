"""The command line. Every error is one line on stderr: exit 2 for how it was called, 130 when interrupted, else 1."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> None:
    """The `millicent` program."""
    try:
        status = run(sys.argv[1:] if arguments is None else arguments)
    except KeyboardInterrupt:  # before there was a command, or after it
        status = 130
    sys.exit(status)


def run(arguments: Sequence[str]) -> int:
    """One command, to its exit status."""
    import click

    from millicent.cli.commands import millicent
    from millicent.core.errors import MillicentError

    _prepare_output()
    if strange := [each for each in arguments if not _is_text(each)]:
        return _fail(f"{strange[0]!r} is no UTF-8 text: write it in UTF-8", 2)
    try:
        status = millicent.main(list(arguments) or ["--help"], prog_name="millicent", standalone_mode=False)
        sys.stdout.flush()
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx else "millicent"
        return _fail(f"{error.format_message()} (see `{command} --help`)", 2)
    except click.ClickException as error:
        return _fail(error.format_message(), 1)
    except (click.Abort, KeyboardInterrupt):
        return 130
    except MillicentError as error:
        return _fail(error.message, 1)
    except BrokenPipeError:
        # Whoever read our output has left, which is fine; the interpreter must not complain when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if os.environ.get("MILLICENT_DEBUG"):
            raise
        return _fail(": ".join(str(each) for each in (error.filename, error.strerror or error) if each is not None), 1)
    except Exception as error:
        if os.environ.get("MILLICENT_DEBUG"):
            raise
        what = " ".join(str(error).split()) or "no message"
        return _fail(f"{type(error).__name__}: {what} (unexpected: MILLICENT_DEBUG=1 shows where)", 1)
    return status if isinstance(status, int) else 0


def _prepare_output() -> None:
    """Files and pipes get UTF-8 whatever the locale; a terminal that lacks a character shows its number."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by whoever called
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115, PTH123 - to the end
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding=None if stream.isatty() else "utf-8", errors="backslashreplace")


def _is_text(argument: str) -> bool:
    """Bytes that are no UTF-8 come as what can't be written."""
    try:
        argument.encode()
    except UnicodeEncodeError:
        return False
    return True


def _fail(message: str, status: int) -> int:
    from millicent.core.errors import one_line

    print(f"error: {one_line(message, 1000)}", file=sys.stderr)
    return status
