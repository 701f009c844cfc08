"""The reference pages that are made from the code: `make docs` writes them, a test checks that they are current."""

from __future__ import annotations

import re
import types
from collections.abc import Iterator
from datetime import date
from decimal import Decimal
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import click
import msgspec

from millicent.cli.commands import millicent
from millicent.config import WRITTEN_IN, Config
from millicent.core import errors

DOCS = Path(__file__).parent.parent / "docs"
_MADE = "<!-- Made from the code by `make docs`: change it there. -->"


def pages() -> dict[str, str]:
    """Each page's name and text."""
    return {"cli.md": cli_page(), "configuration.md": configuration_page(), "errors.md": errors_page()}


def commands(group: click.Group = millicent, parent: click.Context | None = None) -> Iterator[click.Context]:
    """A context for every command that does something, in the order in which help lists them."""
    context = click.Context(group, info_name=group.name, parent=parent, **group.context_settings)
    for name, command in sorted(group.commands.items()):
        if isinstance(command, click.Group):
            yield from commands(command, context)
        else:
            yield click.Context(command, info_name=name, parent=context, max_content_width=100)


def cli_page() -> str:
    intro = (
        "State lives in `MILLICENT_HOME` (default `~/.millicent`), models in `MILLICENT_CACHE` (default "
        "`~/.cache/millicent`). `chat` and `run` send `MILLICENT_API_KEY` where it is set.\n\n"
        "Data goes to stdout, remarks and errors to stderr, an error in one line. Exit status: 0 when it worked, 2 for "
        "a wrong call, 130 when interrupted, else 1. With `--json`, amounts are exact decimal strings in dollars."
    )
    parts = ["# Commands", _MADE, intro]
    for context in commands():
        command = context.command
        usage = " ".join([context.command_path, *command.collect_usage_pieces(context)])
        records = [record for param in command.get_params(context) if (record := param.get_help_record(context))]
        options = "\n".join(f"- `{name}`: {text or ''}".rstrip(": ") for name, text in records if "--help" not in name)
        help_text = "\n\n".join(" ".join(each.split()) for each in (command.help or "").split("\n\n"))
        parts += [f"## {context.command_path}", f"```\n{usage}\n```", help_text, options]
    return _page(parts)


def configuration_page() -> str:
    intro = (
        "One file, `millicent.toml`, in `MILLICENT_HOME` (default `~/.millicent`). Without it, or without a setting, "
        "the defaults below hold. `millicent config check` checks it, and tells a mistake with its line. Secrets don't "
        "belong here: they come from the environment or from files, and a setting that looks like one is refused."
    )
    parts = ["# Configuration", _MADE, intro]
    for section, hint in get_type_hints(Config, include_extras=True).items():
        named = get_origin(hint) is dict
        room = get_args(hint)[1] if named else hint
        written = WRITTEN_IN.get(section, section)
        title = f"[{written}.NAME]" if named else f"[{section}]"
        half = "" if written == section else f" ({section})"
        parts += [f"## `{title}`{half}", " ".join((room.__doc__ or "").split()), _settings(room)]
    return _page(parts)


def _settings(room: type[msgspec.Struct]) -> str:
    hints = get_type_hints(room, include_extras=True)
    lines = ["| setting | value | default |", "|---|---|---|"]
    for field in msgspec.structs.fields(room):
        default = "required" if field.required else _toml(_default(field))
        lines.append(f"| `{field.encode_name}` | {_values(hints[field.name], room)} | {default} |")
    return "\n".join(lines)


def _default(field: msgspec.structs.FieldInfo) -> object:
    return field.default if field.default_factory is msgspec.NODEFAULT else field.default_factory()


def _toml(value: object) -> str:
    return "not set" if value is None else f"`{msgspec.json.encode(value).decode()}`"


def _values(hint: Any, room: type[msgspec.Struct]) -> str:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in {Union, types.UnionType}:
        return " or ".join(_values(each, room) for each in arguments if each is not type(None))
    if origin is Annotated:
        return f"{_values(arguments[0], room)}{_bounds(arguments[1])}"
    if origin is Literal:
        return ", ".join(_toml(each) for each in arguments)
    if origin in {tuple, list}:
        return f"list of {_values(arguments[0], room)}"
    if origin is dict:
        return f"table of {_values(arguments[1], room)}"
    if issubclass(hint, Enum):
        return ", ".join(_toml(each) for each in hint)
    if issubclass(hint, msgspec.Struct):
        known = {field.name for field in msgspec.structs.fields(room)}
        more = [f"`{field.name}`" for field in msgspec.structs.fields(hint) if field.name not in known]
        return " and ".join(["table of settings as here", *more])
    return {date: "day", bool: "`true`, `false`", int: "whole number", float: "number", Decimal: "number", str: "text"}[
        hint
    ]


def _bounds(meta: msgspec.Meta) -> str:
    if meta.gt is not None:
        return f" above {meta.gt}"
    low = "" if meta.ge is None else f" from {meta.ge}"
    return low if meta.le is None else f"{low} to {meta.le}"


def error_classes() -> list[type[errors.MillicentError]]:
    found = [
        each for each in vars(errors).values() if isinstance(each, type) and issubclass(each, errors.MillicentError)
    ]
    return sorted(found, key=lambda each: (each.status, each.__name__))


def errors_page() -> str:
    meanings = dict(re.findall(r"[├└]── (\w+) +(?:\d{3})? *(.*)", errors.__doc__ or ""))
    lines = ["| error | HTTP | type | code | meaning |", "|---|---|---|---|---|"]
    for each in error_classes():
        http = str(each.status) if each.status != errors.MillicentError.status else ""
        meaning = meanings.get(each.__name__, "")
        lines.append(f"| {each.__name__} | {http} | `{each.kind}` | `{each.code}` | {meaning} |")
    intro = (
        "Every error says what was wrong, where, and what to do. Over HTTP it has the shape of the dialect that was "
        "spoken; in OpenAI's, `type`, `code` and `param` are for programs and `message` is for people. 429 and 503 can "
        "be tried again. On the command line an error is one line on stderr."
    )
    return _page(["# Errors", _MADE, intro, "\n".join(lines)])


def _page(parts: list[str]) -> str:
    return "\n\n".join(part for part in parts if part) + "\n"


if __name__ == "__main__":
    for _name, _text in pages().items():
        (DOCS / _name).write_text(_text, encoding="utf-8")
