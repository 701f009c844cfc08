"""`plan`: what it would cost elsewhere, and before it is built. Each plan has a module of its own."""

from __future__ import annotations

import click

from millicent.cli.plan_cheaper import cheaper
from millicent.cli.plan_scale import scale
from millicent.cli.plan_where import where


@click.group()
def plan() -> None:
    """Plan by what the ledger has seen: where to run it, what more traffic takes, what would be cheaper."""


for _command in (where, scale, cheaper):
    plan.add_command(_command)
