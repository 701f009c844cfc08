"""`plan`: decisions from what the ledger has seen. Each plan has a module of its own."""

from __future__ import annotations

import click

from millicent.cli.plan_cheaper import cheaper
from millicent.cli.plan_estimate import estimate, scenarios
from millicent.cli.plan_scale import scale
from millicent.cli.plan_standing import standing
from millicent.cli.plan_where import where


@click.group()
def plan() -> None:
    """Plan by what the ledger has seen: where to run it, what breaks as it grows, what would make it
    cheaper, what something would cost, where you stand."""


for _command in (where, scale, cheaper, estimate, scenarios, standing):
    plan.add_command(_command)
