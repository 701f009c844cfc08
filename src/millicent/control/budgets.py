"""Budgets as their owner sees them: from the configuration, the command line and `/admin`. What they do to requests
is decided in the ledger's transactions (`ledger.budgets`)."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping

from millicent.control.config import BudgetConfig
from millicent.core.budgets import Balance, Budget
from millicent.core.errors import Conflict, NotFound
from millicent.ledger.budgets import put_budget, read_balances, read_budgets, remove_budget

_CONFIG = "config"


def follow_config(connection: sqlite3.Connection, configured: Mapping[str, BudgetConfig]) -> None:
    """Make the ledger's budgets those of the configuration, and leave alone those made elsewhere."""
    for budget in read_budgets(connection):
        if budget.source == _CONFIG and budget.name not in configured:
            remove_budget(connection, budget.name)
    for name, config in configured.items():
        put_budget(connection, config.budget(name, _CONFIG))


def set_budget(connection: sqlite3.Connection, budget: Budget) -> None:
    """Add or change it. Raises Conflict for one that the configuration defines."""
    _not_configured(connection, budget.name)
    put_budget(connection, budget)


def drop_budget(connection: sqlite3.Connection, name: str) -> None:
    _not_configured(connection, name)
    if not remove_budget(connection, name):
        raise NotFound(f"There is no budget `{name[:100]}`: `millicent budgets list` shows those there are.")


def standing(connection: sqlite3.Connection, now_ns: int) -> list[tuple[Budget, list[Balance]]]:
    """Every budget with its balances in the running period."""
    return [(budget, read_balances(connection, budget, now_ns)) for budget in read_budgets(connection)]


def _not_configured(connection: sqlite3.Connection, name: str) -> None:
    if any(budget.name == name and budget.source == _CONFIG for budget in read_budgets(connection)):
        raise Conflict(
            f"Budget `{name[:100]}` is defined in millicent.toml: change it there and restart.",
            code="defined_in_config",
        )
