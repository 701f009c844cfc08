"""Wiring: from a configuration to a server that answers."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import logging.handlers
import os
import shlex
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import uvicorn

from millicent.backends.local import EngineStatus, LocalBackend, LocalModel
from millicent.config import Config
from millicent.core.clock import Clock, SystemClock
from millicent.core.errors import ConfigError, MillicentError
from millicent.core.identifiers import SystemIds
from millicent.dashboard import dashboard_routes
from millicent.ledger.queries import LedgerQueries
from millicent.ledger.sqlite import SqliteLedger
from millicent.meter.meter import Meter
from millicent.meter.placements import placement_for
from millicent.pipeline.pipeline import Pipeline
from millicent.server.application import EngineReport, Server
from millicent.server.guard import is_loopback

log = logging.getLogger(__name__)

_LOG_BYTES = 10 << 20


@dataclass(frozen=True)
class ServeOptions:
    """What to serve and where state lives. `models` maps public names to installed files."""

    home: Path
    config: Config
    models: dict[str, LocalModel]
    say: Callable[[str], None] = field(default=print)


@dataclass
class App:
    """Everything that runs, wired together."""

    options: ServeOptions
    clock: Clock
    ledger: SqliteLedger
    backend: LocalBackend
    pipeline: Pipeline
    server: Server

    def engines(self) -> Sequence[EngineReport]:
        return [_report(self.backend.status())]

    def trouble(self) -> str | None:
        if reason := self.ledger.healthy():
            return f"the ledger can't be written: {reason}"
        status = self.backend.status()
        if status.state != "ready":
            return f"the engine is {status.state}" + (f": {status.message}" if status.message else "")
        return None


@contextlib.asynccontextmanager
async def open_app(options: ServeOptions) -> AsyncIterator[App]:
    """Everything but the socket, started; on leaving, what runs is finished or settled and everything is stopped.

    The engine may still be loading when this yields: `app.backend.wait_ready()` waits for it.
    """
    config, home = options.config, options.home
    clock = SystemClock()
    ids = SystemIds(clock)
    gateway = ids.new("gw")
    ledger = SqliteLedger(home / "ledger.db", config.ledger, clock, gateway)
    await ledger.start()
    meter = Meter(clock, gateway, ids)
    placement = placement_for(config.engine.device, config.placements)
    meter.add_device(config.engine.device, placement)
    backend = LocalBackend(config.engine, options.models, observer=meter, clock=clock, home=home)
    pipeline = Pipeline(backends=[backend], ledger=ledger, meter=meter, clock=clock, limits=config.limits)
    queries = LedgerQueries(home / "ledger.db")
    app = App(options, clock, ledger, backend, pipeline)
    try:
        await backend.start()
        pipeline.start()
        yield app
    finally:
        await pipeline.stop(config.server.shutdown_grace_s)
        await backend.close()
        await ledger.stop()
