"""`plan`: what it would cost elsewhere, and before it is built. Each plan has a module of its own."""

from __future__ import annotations

import click

from millicent.cli.plan_estimate import estimate, scenarios
from millicent.cli.plan_where import where


@click.group()
def plan() -> None:
    """Plan by what the ledger has seen: where to run it, and what something would cost before it is built."""


for _command in (where, estimate, scenarios):
    plan.add_command(_command)
