"""`plan`: what it would cost elsewhere, and before it is built. Each plan has a module of its own."""

from __future__ import annotations

import click

from millicent.cli.plan_where import where


@click.group()
def plan() -> None:
    """Plan by what the ledger has seen: where to run it, and from which volume on another place pays."""


for _command in (where,):
    plan.add_command(_command)
