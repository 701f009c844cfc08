"""`pull` and `models`, and finding the models that `serve` is asked for."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from millicent.cli.options import json_option

if TYPE_CHECKING:
    from millicent.hub import InstalledModel, Progress


@click.command()
@click.argument("name")
@json_option
def pull(name: str, json_: bool) -> None:
    """Fetch a model: one of `millicent models`, or org/name from the Hugging Face hub."""
    from millicent.cli import show

    model = fetched(name)
    if json_:
        show.as_json({"name": model.name, "path": str(model.path), "bytes": model.bytes, "source": model.source})
    else:
        print(f"{model.name}: {show.size(model.bytes)} at {model.path}")


@click.command()
@json_option
def models(json_: bool) -> None:
    """List the models that are here, and those that can be fetched by a short name."""
    from millicent.cli import show
    from millicent.config import cache
    from millicent.hub import CATALOGUE, list_installed
    from millicent.text.stored_precision import stored_precision

    here = {model.name: model for model in list_installed(cache())}
    bodies = []
    for name in sorted({*here, *CATALOGUE}):
        installed, known = here.get(name), CATALOGUE.get(name)
        bodies.append(
            {
                "name": name,
                "installed": installed is not None,
                "bytes": installed.bytes if installed else None,
                "precision": stored_precision(installed.path) if installed else None,
                "download_bytes": known.wheel_bytes if known else None,
                "path": str(installed.path) if installed else None,
                "source": installed.source if installed else None,
                "summary": known.summary if known else None,
                "licence": known.licence if known else None,
            }
        )
    if json_:
        show.as_json({"object": "list", "data": bodies})
        return
    rows = [
        (
            str(body["name"]),
            "installed" if body["installed"] else "not here",
            show.size(int(str(body["bytes"] or body["download_bytes"]))),
            str(body["precision"] or "-"),
            str(body["summary"] or body["source"]),
        )
        for body in bodies
    ]
    print(show.table(("NAME", "STATE", "SIZE", "STORED AS", "WHAT"), rows, right=frozenset({"SIZE"})))


def found(name_or_path: str) -> InstalledModel:
    """The model of that name or at that path; fetched if it isn't here, or is damaged."""
    from millicent.config import cache
    from millicent.core.errors import ModelError, ModelNotFound
    from millicent.hub import resolve

    try:
        return resolve(name_or_path, cache())
    except (ModelNotFound, ModelError):
        return fetched(name_or_path)


def fetched(name: str) -> InstalledModel:
    from millicent.config import cache
    from millicent.hub import pull as pull_from_hub

    with _progress(f"Fetching {name}") as progress:
        return pull_from_hub(name, cache(), progress)


@contextlib.contextmanager
def _progress(what: str) -> Iterator[Progress | None]:
    """A bar on stderr while bytes are dealt with; nothing where nobody watches."""
    if not sys.stderr.isatty():
        yield None
        return

    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None, visible=False)

        def report(done_bytes: int, total_bytes: int | None) -> None:
            bar.update(task, completed=done_bytes, total=total_bytes, visible=True)

        yield report


def path_of(path: str, home: Path) -> str:
    """A path in millicent.toml is seen from the file's own folder."""
    return str(home / Path(path).expanduser())


@click.command()
@click.argument("model")
@click.option("--to", type=click.Choice(["int8", "int4"]), required=True, help="How many bits a weight keeps.")
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="The folder to make; it must not exist yet."
)
@json_option
def quantize(model: str, to: Literal["int8", "int4"], out: Path, json_: bool) -> None:
    """Write a model's GGUF with smaller weights; other programs read it too.

    MODEL is as for `millicent serve`. Loading the result takes no time to quantize, and half or a quarter of the memory
    that 16 bits take.
    """
    import importlib.util

    from millicent.cli import show
    from millicent.core.errors import ConfigError

    if importlib.util.find_spec("torch") is None:
        raise ConfigError("quantizing needs PyTorch, which isn't installed: pip install 'millicent[engine]'.")
    source = found(model)

    from millicent.engine.quantized_file import write_quantized

    with _progress(f"Quantizing {source.name}") as progress:
        file = write_quantized(source.path, out, to, progress)
    size = file.stat().st_size
    if json_:
        show.as_json({"path": str(file), "bytes": size, "source_bytes": source.bytes})
    else:
        print(f"{file}: {show.size(size)}, from {show.size(source.bytes)}")
