"""What the pages show of the configuration, and the one thing that they write there: a placement's table, added at the
end of the file, so that nothing that somebody wrote is touched."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from starlette.requests import Request
from starlette.responses import Response

from millicent.core.errors import ConfigError, InvalidRequest
from millicent.core.files import private_folder, whole_file
from millicent.dashboard import tables
from millicent.dashboard.site import Page, Site
from millicent.dashboard.tables import Column, Table

# The fields of a machine that is paid for by the hour, and of one that was bought.
RENTED = ("usd_per_hour",)
OWNED = ("capital_usd", "life_years", "watts", "usd_per_kwh", "annual_usd")

_NUMBER = re.compile(r"\d{1,12}(\.\d{1,9})?")


def placement_table(name: str, settings: Mapping[str, str]) -> str:
    """The lines of `[placements.NAME]`. Raises InvalidRequest naming the field."""
    kind = settings.get("kind")
    if kind not in ("rented", "owned"):
        raise InvalidRequest(f"kind={kind!r}: say whether the machine is rented or owned", param="kind")
    fields = RENTED if kind == "rented" else OWNED
    lines = [f"[placements.{name}]", f'kind = "{kind}"']
    for field in fields:
        value = settings.get(field)
        if value is None:
            continue
        if not _NUMBER.fullmatch(value):
            raise InvalidRequest(f"{field}={value!r}: write a number such as 0.35", param=field)
        lines.append(f"{field} = {value}")
    return "\n".join(lines) + "\n"


def append_table(path: Path, lines: str, check: Callable[[Path], object]) -> None:
    """Add a table to the configuration, all or nothing. What would come out is written beside it and read by `check`
    first. Raises ConfigError, and changes nothing, where that refuses it or the file can't be written."""
    try:
        before = path.read_text(encoding="utf-8") if path.exists() else ""
        private_folder(path.parent)
        gap = "" if not before else "\n" if before.endswith("\n") else "\n\n"
        with whole_file(path, 0o600) as beside:
            beside.write_text(f"{before}{gap}{lines}", encoding="utf-8")
            check(beside)
    except OSError as error:
        raise ConfigError(
            f"{path} can't be written ({error.strerror}): add the lines by hand, or make it writable."
        ) from error
    except ConfigError as error:
        raise ConfigError(error.message.replace(str(beside), str(path))) from error


class Setting(NamedTuple):
    """One setting as it holds. `origin`: the file's line, the command line, or the default."""

    section: str
    name: str
    value: str
    origin: str


def settings_page(site: Site, path: Path, settings: Sequence[Setting]) -> Page:
    """Read only: the file is what is changed."""

    async def show(request: Request) -> Response:
        sections: dict[str, list[Setting]] = {}
        for setting in settings:
            sections.setdefault(setting.section, []).append(setting)
        return site.answer(
            request,
            "settings.html",
            shown=[_table(settings)],
            selection=site.selection(request),
            sections=sections,
            file=path,
            exists=await site.read(path.exists),
        )

    return Page("Settings", "Settings", "/settings", [site.get("/settings", show)])


def _table(settings: Sequence[Setting]) -> Table:
    columns = tuple(Column(name.capitalize(), name, number=False) for name in Setting._fields)
    rows = tuple(tuple(tables.text(each) for each in setting) for setting in settings)
    return Table(name="settings", title="Settings", columns=columns, rows=rows)
