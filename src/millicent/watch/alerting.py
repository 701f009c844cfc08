"""Watching and telling, as one: what the gateway runs beside its requests."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from typing import TYPE_CHECKING

from millicent.core.clock import Clock
from millicent.core.identifiers import Ids
from millicent.watch.config import AlertConfig
from millicent.watch.watcher import Ledger, Watcher, Writes, with_default

if TYPE_CHECKING:
    from millicent.watch.notifier import Webhook


def watched(rules: Mapping[str, AlertConfig]) -> list[str]:
    """The names of the rules that are in force."""
    return list(with_default(rules))


def webhooks_of(rules: Mapping[str, AlertConfig]) -> dict[str, Webhook]:
    """Who is told, by rule. Raises ConfigError where an address can't be had."""
    addresses = {name: rule.webhook(name) for name, rule in rules.items()}
    if not any(addresses.values()):
        return {}
    from millicent.watch.notifier import Webhook

    return {name: Webhook(url, rules[name].private_targets) for name, url in addresses.items() if url is not None}


@contextlib.asynccontextmanager
async def alerting(
    rules: Mapping[str, AlertConfig],
    *,
    ledger: Writes,
    queries: Ledger,
    clock: Clock,
    ids: Ids,
) -> AsyncIterator[None]:
    """For as long as this lasts. What isn't sent by then waits in the ledger. Raises ConfigError as `webhooks_of`."""
    webhooks = webhooks_of(rules)
    notifier = None
    if webhooks:
        from millicent.watch.notifier import Notifier  # and with it an HTTP client that nobody else needs

        notifier = Notifier(webhooks, ledger=ledger, clock=clock)
    watcher = Watcher(
        rules,
        ledger=ledger,
        queries=queries,
        clock=clock,
        ids=ids,
        webhooks=frozenset(webhooks),
        told=(lambda: None) if notifier is None else notifier.wake,
    )
    tasks = [asyncio.create_task(watcher.run())]
    if notifier is not None:
        tasks.append(asyncio.create_task(notifier.run()))
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
