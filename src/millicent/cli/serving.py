"""`serve`: the server, in the foreground."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from millicent.backends.elsewhere import Elsewhere
    from millicent.backends.local import LocalModel
    from millicent.config import Config
    from millicent.engine.config import Dtype, Quantization
    from millicent.meter.placements import Placement

DEFAULT_MODEL = "smollm2:135m"
EMBEDDING_MODEL = "minilm"  # offered beside any other, and fetched when it is first asked for

dtype_option = click.option(
    "--dtype", type=click.Choice(["auto", "bf16", "fp32"]), help="What weights that aren't quantized are computed in."
)
quantize_option = click.option(
    "--quantize",
    type=click.Choice(["auto", "none", "native", "int8", "int4"]),
    help="Round weights to 8 or 4 bits while loading; native keeps the file's own quantization, none expands it.",
)


@click.command()
@click.argument("models", nargs=-1, metavar="[MODEL]...")
@click.option("--host", help="Listen on this address; by default 127.0.0.1, this machine only.")
@click.option("--port", type=click.IntRange(0, 65535), help="Listen on this port; by default 8080; 0 takes a free one.")
@dtype_option
@quantize_option
def serve(
    models: tuple[str, ...], host: str | None, port: int | None, dtype: Dtype | None, quantize: Quantization | None
) -> None:
    """Serve models over HTTP; those that aren't here yet are downloaded first.

    MODEL is a name from `millicent models`, a name in millicent.toml, org/name on the Hugging Face hub, or the path of
    a GGUF file or a folder of safetensors. By default, those in millicent.toml, else smollm2:135m. The embedding model
    minilm is served beside them, and downloaded when it is first asked for.
    """
    import importlib.util

    import msgspec

    from millicent import config
    from millicent.core.errors import ConfigError

    home = config.home()
    settings = config.load(home / config.FILE_NAME)
    given = {name: value for name, value in (("host", host), ("port", port)) if value is not None}
    settings = msgspec.structs.replace(settings, server=msgspec.structs.replace(settings.server, **given))
    settings = in_precision(settings, dtype, quantize)
    elsewhere = called_elsewhere(settings)
    here = [name for name in models if not is_elsewhere(settings, name)]
    local = bool(here) or not elsewhere or any(not each.deployed for each in settings.models.values())
    if local and importlib.util.find_spec("torch") is None:
        raise ConfigError("the engine needs PyTorch, which isn't installed: pip install 'millicent[engine]'.")

    from millicent.app import ServeOptions
    from millicent.app import serve as serve_until_stopped

    placement = placement_of(settings)
    wanted = chosen(tuple(here), settings, home, placement.name) if local else {}
    providers = [
        each.placement(name) for name, each in settings.placements.items() if each.kind == "api" or name in elsewhere
    ]
    options = ServeOptions(
        home=home,
        config=settings,
        models=wanted,
        placement=placement,
        providers=tuple(providers),
        elsewhere=tuple(elsewhere.values()),
    )
    serve_until_stopped(options)


def is_elsewhere(settings: Config, name: str) -> bool:
    """Is this a model that other placements run?"""
    return name in settings.models and bool(settings.models[name].deployed)


def called_elsewhere(settings: Config) -> dict[str, Elsewhere]:
    """The placements that are called, by name. All of the file's are served, whatever else is named: they cost
    nothing until they are asked."""
    from millicent.backends.elsewhere import called

    deployed = {name: each.deployed for name, each in settings.models.items()}
    providers = {name: each.provider for name, each in settings.placements.items()}
    return {each.placement: each for each in called(deployed, settings.upstreams, providers)}


def in_precision(settings: Config, dtype: Dtype | None, quantize: Quantization | None) -> Config:
    """What the command line says counts for every model, whatever the file says of one."""
    import msgspec

    given = {name: value for name, value in (("dtype", dtype), ("quantize", quantize)) if value is not None}
    unset = dict.fromkeys(given)
    models = {name: msgspec.structs.replace(model, **unset) for name, model in settings.models.items()}
    return msgspec.structs.replace(settings, engine=msgspec.structs.replace(settings.engine, **given), models=models)


def placement_of(settings: Config) -> Placement:
    """The one that is configured; a machine that nobody priced has an assumed rate."""
    from millicent.core.errors import ConfigError
    from millicent.engine.config import EngineConfig
    from millicent.engine.machine import usable_cores
    from millicent.meter.placements import assumed_placement

    called = {*settings.upstreams, *called_elsewhere(settings)}
    machines = {name: each for name, each in settings.placements.items() if each.kind != "api" and name not in called}
    if not machines:
        return assumed_placement("local", usable_cores(EngineConfig()))
    if len(machines) > 1:
        names = ", ".join(machines)
        raise ConfigError(f"[placements] holds {names}, and this machine is one of them: keep that one.")
    [(name, placement)] = machines.items()
    return placement.placement(name)


def chosen(names: tuple[str, ...], settings: Config, home: Path, placement: str) -> dict[str, LocalModel]:
    """Public names and their files, downloaded where need be. What is named on the command line is loaded at once;
    the embedding model, unless named, when it is first asked for."""
    from millicent.backends.config import ModelConfig
    from millicent.backends.local import LocalModel
    from millicent.cli.models import found, path_of
    from millicent.core.errors import ConfigError

    wanted: dict[str, LocalModel] = {}
    configured = tuple(name for name in settings.models if not is_elsewhere(settings, name))
    for name in dict.fromkeys(names or configured or (DEFAULT_MODEL,)):
        how = settings.models.get(name, ModelConfig())
        model = found(path_of(how.path, home) if how.path else name)
        public = name if name in settings.models else model.name
        if public in wanted:
            raise ConfigError(f"two models would be called {public!r}: give one another name with [models.NAME] path.")
        preload = how.preload or bool(names) or not configured
        wanted[public] = LocalModel(model.path, placement, how.keep_alive_s, preload, how.dtype, how.quantize)
    wanted.setdefault(EMBEDDING_MODEL, LocalModel(lambda: found(EMBEDDING_MODEL).path, placement, makes_vectors=True))
    return wanted
