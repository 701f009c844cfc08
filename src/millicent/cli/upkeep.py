"""`ledger`: copies of it, its version, and people who want to be forgotten."""

from __future__ import annotations

from pathlib import Path

import click

from millicent.cli import show
from millicent.cli.home import ledger_path, settings, write_ledger


@click.group()
def ledger() -> None:
    """Back the ledger up, put a backup back, forget a person. A server may run meanwhile."""


@ledger.command()
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
def backup(file: Path) -> None:
    """Copy the ledger, whole and of one instant, to a new FILE."""
    from millicent.ledger.backup import back_up

    back_up(ledger_path(), file)
    print(f"{file}: {show.size(file.stat().st_size)}, checked.")


@ledger.command()
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--yes", is_flag=True, help="Don't ask.")
def restore(file: Path, yes: bool) -> None:
    """Put the backup FILE in the ledger's place. The ledger as it is now is backed up beside it first."""
    from millicent.core.clock import SystemClock, iso_utc
    from millicent.ledger import backup

    path, clock = ledger_path(), SystemClock()
    if path.exists() and not yes:
        click.confirm(f"Replace {path}? Receipts since the backup are then only in the copy that is made.", abort=True)
    kept = path.with_name(f"ledger-before-{iso_utc(clock.now_ns())[:19].replace(':', '')}.db")
    existed = backup.restore(path, file, kept, settings().ledger, clock)
    print(f"{path} is as it was in {file}" + (f"; what it was until now is in {kept}." if existed else "."))


@ledger.command()
@click.option("--user", required=True, help="The user as receipts name them.")
def purge(user: str) -> None:
    """Take a person off every receipt, and forget what was answered to them; the amounts stay. Backups made before
    still have them."""
    from millicent.cli.cache import forget
    from millicent.core.errors import NotFound
    from millicent.ledger.maintenance import purge_user

    path = ledger_path()
    if not path.exists():
        raise NotFound(f"no ledger at {path}: set MILLICENT_HOME to where it is.")
    purged = write_ledger(lambda connection: purge_user(connection, user))
    print(f"{purged:,} receipts no longer name {show.printable(user)}.")
    forget(user=user)


@ledger.command()
def upgrade() -> None:
    """Bring the ledger up to this version, as the server does when it starts."""
    write_ledger(lambda _: None)
    print(f"{ledger_path()} is up to date.")
