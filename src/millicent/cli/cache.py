"""`cache`: what the response cache keeps in its file, and forgetting it. A server that runs knows at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from millicent.cli import show
from millicent.cli.options import json_option

if TYPE_CHECKING:
    from millicent.caching.store import AnswerStore


@click.group()
def cache() -> None:
    """Show and purge the answers that the response cache keeps. A server may run meanwhile."""


@cache.command("show")
@json_option
def show_(json_: bool) -> None:
    """How much is kept, and how often what is still there was given."""
    from millicent.core.clock import SystemClock, iso_utc

    with _store() as store:
        found = None if store is None else store.standing(SystemClock().now_ns())
    if json_:
        show.as_json({"object": "cache", **({"entries": 0} if found is None else found.body())})
    elif found is None or found.oldest_at_ns is None:
        print("Nothing is kept.")
    else:
        oldest = iso_utc(found.oldest_at_ns)[:19]
        print(f"{found.entries:,} answers, {show.size(found.bytes)}, given {found.hits:,} times; oldest {oldest}Z.")


@cache.command()
@click.option("--user", help="Only what this user's requests were answered.")
@click.option("--model", help="Only answers of this model.")
def purge(user: str | None, model: str | None) -> None:
    """Forget what is kept: all of it, one user's, or one model's."""
    print(f"{forget(user=user, model=model):,} answers forgotten.")


def forget(*, user: str | None = None, model: str | None = None) -> int:
    """How many. Raises ConfigError, also where answers are kept in a server's memory only."""
    with _store() as store:
        return 0 if store is None else store.purge(user=user, model=model)


@contextmanager
def _store() -> Iterator[AnswerStore | None]:
    """None where there is no file. Raises ConfigError where answers are kept in a server's memory only."""
    import sqlite3

    from millicent.caching.store import FILE_NAME, AnswerStore
    from millicent.cli.home import settings as read_settings
    from millicent.config import home
    from millicent.core.errors import ConfigError

    path, settings = home() / FILE_NAME, read_settings().cache
    if settings.is_used and settings.store == "memory":
        raise ConfigError('[cache] store = "memory": what is kept is known to the server: ask its /admin/cache.')
    if not path.exists():
        yield None
        return
    try:
        store = AnswerStore(path, max_bytes=settings.max_mb << 20, max_entries=settings.max_entries)
        try:
            yield store
        finally:
            store.close()
    except sqlite3.Error as error:
        raise ConfigError(f"{path}: {error}: stop the server, and delete the file.") from error
