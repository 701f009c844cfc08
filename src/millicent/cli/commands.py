"""All commands, under one name. A command's own imports wait until it runs, so that help is quick."""

from __future__ import annotations

import click

from millicent import __version__
from millicent.cli.alerts import alerts
from millicent.cli.cache import cache
from millicent.cli.checks import config, doctor
from millicent.cli.control import budgets, keys
from millicent.cli.conversation import chat, run
from millicent.cli.demo import demo
from millicent.cli.evaluation import evaluate
from millicent.cli.exchange import export, import_, reconcile
from millicent.cli.ledger import receipts, report
from millicent.cli.models import models, pull, quantize
from millicent.cli.plan import plan
from millicent.cli.prices import quote, reprice
from millicent.cli.replay import replay
from millicent.cli.router import router
from millicent.cli.serving import serve
from millicent.cli.upkeep import ledger


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="millicent", message="%(prog)s %(version)s")
def millicent() -> None:
    """The inference server with the meter built in: every answer comes with a durable receipt."""


for _command in (
    *(serve, demo, chat, run, pull, models, quantize, quote),
    *(receipts, report, reprice, export, import_, reconcile, ledger),
    *(router, evaluate, plan, replay, cache),
    *(alerts, keys, budgets, config, doctor),
):
    millicent.add_command(_command)
