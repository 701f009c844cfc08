"""`serve`: the server, in the foreground."""

from __future__ import annotations

import click

DEFAULT_MODEL = "smollm2:135m"
EMBEDDER = "minilm"


@click.command()
@click.argument("models", nargs=-1, metavar="[MODEL]...")
@click.option("--host", help="Listen on this address; by default 127.0.0.1, this machine only.")
@click.option("--port", type=click.IntRange(0, 65535), help="Listen on this port; by default 8080; 0 takes a free one.")
def serve(models: tuple[str, ...], host: str | None, port: int | None) -> None:
    """Serve models over HTTP, by default smollm2:135m; models that aren't here yet are downloaded first."""
    import importlib.util

    import msgspec

    from millicent import config
    from millicent.core.errors import ConfigError

    home = config.home()
    settings = config.load(home / config.FILE_NAME)
    given = {name: value for name, value in (("host", host), ("port", port)) if value is not None}
    settings = msgspec.structs.replace(settings, server=msgspec.structs.replace(settings.server, **given))
    if importlib.util.find_spec("torch") is None:
        raise ConfigError("the engine needs PyTorch, which isn't installed: pip install 'millicent[engine]'.")

    from millicent.app import ServeOptions
    from millicent.app import serve as serve_until_stopped
    from millicent.cli.models import installed

    named = tuple(dict.fromkeys((*(models or (DEFAULT_MODEL,)), EMBEDDER)))
    serve_until_stopped(ServeOptions(home=home, config=settings, models=installed(named, settings)))
