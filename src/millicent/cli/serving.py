"""`serve`: the server, in the foreground."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from millicent.cli.home import settings as read_settings

if TYPE_CHECKING:
    from millicent.backends.elsewhere import Elsewhere
    from millicent.backends.local import LocalModel
    from millicent.backends.local_models import DraftModel
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
    type=click.Choice(["auto", "none", "native", "int8", "int4", "fp8"]),
    help="Round weights to 8 or 4 bits while loading (fp8 on a GPU); native keeps the file's own quantization, none"
    " expands it.",
)


@click.command()
@click.argument("models", nargs=-1, metavar="[MODEL]...")
@click.option("--host", help="Listen on this address; by default 127.0.0.1, this machine only.")
@click.option("--port", type=click.IntRange(0, 65535), help="Listen on this port; by default 8080; 0 takes a free one.")
@click.option("--device", metavar="[auto|cpu|cuda:N]", help="Where models run; by default cpu. GPUs are experimental.")
@dtype_option
@quantize_option
@click.option("--draft", metavar="MODEL", help="A smaller model with the same tokenizer that guesses for MODEL.")
def serve(
    models: tuple[str, ...],
    host: str | None,
    port: int | None,
    device: str | None,
    dtype: Dtype | None,
    quantize: Quantization | None,
    draft: str | None,
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

    home, settings = config.home(), read_settings()
    given = {name: value for name, value in (("host", host), ("port", port)) if value is not None}
    settings = msgspec.structs.replace(settings, server=msgspec.structs.replace(settings.server, **given))
    settings = on_device(in_precision(settings, dtype, quantize), device)
    elsewhere = called_elsewhere(settings, home)
    here = [name for name in models if not is_elsewhere(settings, name)]
    local = bool(here) or not elsewhere or any(not each.deployed for each in settings.models.values())
    if local and importlib.util.find_spec("torch") is None:
        raise ConfigError("the engine needs PyTorch, which isn't installed: pip install 'millicent[engine]'.")

    from millicent.app import ServeOptions
    from millicent.app import serve as serve_until_stopped

    placement = placement_of(settings)
    wanted = chosen(tuple(here), settings, home, placement.name, draft=draft) if local else {}
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


def called_elsewhere(settings: Config, home: Path) -> dict[str, Elsewhere]:
    """The placements that are called, by name. All of the file's are served, whatever else is named: they cost
    nothing until they are asked."""
    from millicent.backends.elsewhere import called

    charged = {name: (each.provider, each.service) for name, each in settings.placements.items()}
    return {each.placement: each for each in called(settings.models, settings.upstreams, charged, home)}


def in_precision(settings: Config, dtype: Dtype | None, quantize: Quantization | None) -> Config:
    """What the command line says counts for every model, whatever the file says of one."""
    import msgspec

    given = {name: value for name, value in (("dtype", dtype), ("quantize", quantize)) if value is not None}
    unset = dict.fromkeys(given)
    models = {name: msgspec.structs.replace(model, **unset) for name, model in settings.models.items()}
    return msgspec.structs.replace(settings, engine=msgspec.structs.replace(settings.engine, **given), models=models)


def on_device(settings: Config, device: str | None) -> Config:
    """With the device that is there, as it is called in accounts. Raises ConfigError where it isn't."""
    import msgspec

    from millicent.core.errors import ConfigError
    from millicent.engine.config import EngineConfig
    from millicent.engine.gpus import chosen_device

    try:
        wanted = msgspec.convert({"device": device or settings.engine.device}, EngineConfig).device
    except msgspec.ValidationError:
        raise ConfigError(f"--device is {device!r}: write auto, cpu or cuda:0") from None
    chosen = chosen_device(wanted)
    return msgspec.structs.replace(settings, engine=msgspec.structs.replace(settings.engine, device=chosen))


def placement_of(settings: Config) -> Placement:
    """The one that is configured; a machine that nobody priced has an assumed rate."""
    from millicent.core.errors import ConfigError
    from millicent.engine.config import EngineConfig
    from millicent.engine.machine import usable_cores
    from millicent.meter.placements import ASSUMED_PLACEMENT, assumed_placement

    called = {*settings.upstreams, *(each.placement for model in settings.models.values() for each in model.deployed)}
    machines = {name: each for name, each in settings.placements.items() if each.kind != "api" and name not in called}
    if not machines:
        return assumed_placement(ASSUMED_PLACEMENT, usable_cores(EngineConfig()))
    if len(machines) > 1:
        names = ", ".join(machines)
        raise ConfigError(f"[placements] holds {names}, and this machine is one of them: keep that one.")
    [(name, placement)] = machines.items()
    return placement.placement(name)


def chosen(
    names: tuple[str, ...], settings: Config, home: Path, placement: str, *, draft: str | None = None
) -> dict[str, LocalModel]:
    """Public names and their files, downloaded where need be. What is named on the command line is loaded at once;
    the embedding model, unless named, when it is first asked for. `draft` counts for all of them."""
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
        beside = draft or how.draft
        wanted[public] = LocalModel(
            model.path,
            placement,
            how.keep_alive_s,
            preload,
            how.dtype,
            how.quantize,
            draft=None if beside is None else _draft(beside, settings, home),
        )
    wanted.setdefault(EMBEDDING_MODEL, LocalModel(lambda: found(EMBEDDING_MODEL).path, placement, makes_vectors=True))
    return wanted


def _draft(name: str, settings: Config, home: Path) -> DraftModel:
    from millicent.backends.config import ModelConfig
    from millicent.backends.local_models import DraftModel
    from millicent.cli.models import found, path_of

    how = settings.models.get(name, ModelConfig())
    model = found(path_of(how.path, home) if how.path else name)
    return DraftModel(name if name in settings.models else model.name, model.path, how.dtype, how.quantize)
