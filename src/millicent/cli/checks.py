"""`config check` and `doctor`: what is wrong before it goes wrong."""

from __future__ import annotations

import click

from millicent.cli.options import json_option
from millicent.core.errors import MillicentError


@click.group()
def config() -> None:
    """Look after millicent.toml."""


@config.command()
@json_option
def check(json_: bool) -> None:
    """Check millicent.toml; --json prints every setting as it holds, defaults included."""
    from millicent import config as configuration
    from millicent.cli import show

    path = configuration.home() / configuration.FILE_NAME
    settings = configuration.load(path)
    if json_:
        show.as_json({"path": str(path), "exists": path.exists(), "settings": settings})
    elif path.exists():
        print(f"{path} is right.")
    else:
        print(f"{path} isn't there: the defaults hold.")


@click.command()
@click.option("--ledger", "only_ledger", is_flag=True, help="Only ask whether the ledger is sound and adds up.")
@json_option
def doctor(only_ledger: bool, json_: bool) -> None:
    """Say what this machine can do, and what stands in the way, with the fix; exit 1 when something does."""
    from millicent.cli import show
    from millicent.cli.doctor import State, examine
    from millicent.cli.doctor import ledger as examine_ledger
    from millicent.cli.home import ledger_path

    findings = [examine_ledger(ledger_path())] if only_ledger else list(examine())
    if json_:
        show.as_json({"object": "list", "data": findings})
    else:
        marks = {State.GOOD: "ok", State.LIMITED: "limited", State.WRONG: "WRONG"}
        rows = [(marks[each.state], each.what, each.found) for each in findings]
        print(show.table(("STATE", "WHAT", "FOUND"), rows))
        for each in findings:
            if each.fix:
                print(f"\n{each.what}: {each.fix}")
    wrong = [each.what for each in findings if each.state is State.WRONG]
    if wrong:
        raise MillicentError(f"{len(wrong)} of {len(findings)} checks failed: {', '.join(wrong)}.")
