"""A whole gateway, HTTP server and ledger included, whose backend says two words: to be killed.

python fake_gateway.py HOME PORT prints `ready` when it answers.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import uvicorn

from millicent.backends.fake import FakeAnswer, FakeBackend
from millicent.control.access import KeyRing
from millicent.control.limits import RateLimiter
from millicent.core.clock import SystemClock
from millicent.core.identifiers import SystemIds
from millicent.core.steps import DeviceState
from millicent.dashboard.routes import sign_in_page
from millicent.ledger.config import LedgerConfig
from millicent.ledger.queries import LedgerQueries
from millicent.ledger.sqlite import SqliteLedger
from millicent.meter.meter import Meter
from millicent.meter.placements import assumed_placement
from millicent.pipeline.config import LimitsConfig
from millicent.pipeline.features import Features
from millicent.pipeline.pipeline import Pipeline
from millicent.server.application import EngineReport, Server, UpstreamReport
from millicent.server.config import ServerConfig
from millicent.server.http import HttpProtocol
from millicent.server.late import LateEntries

DEVICE = "fake"


class Healthy:
    def engines(self) -> list[EngineReport]:
        return []

    def upstreams(self) -> list[UpstreamReport]:
        return []

    def trouble(self) -> str | None:
        return None


async def main(home: Path, port: int) -> None:
    clock = SystemClock()
    ids = SystemIds(clock)
    gateway = ids.new("gw")
    ledger = SqliteLedger(home / "ledger.db", LedgerConfig(), clock, gateway)
    await ledger.start()
    placement = assumed_placement(DEVICE, 2)
    meter = Meter(clock, gateway, ids)
    meter.add_device(DEVICE, placement)
    backend = FakeBackend(
        FakeAnswer(delay_s=0.001), placement=placement.name, device=DEVICE, observer=meter, clock=clock
    )
    limits = LimitsConfig()
    queries = LedgerQueries(home / "ledger.db")
    limiter = RateLimiter(clock, lambda _: limits)
    pipeline = Pipeline(
        backends=[backend],
        ledger=ledger,
        meter=meter,
        placements={placement.name: placement},
        clock=clock,
        limits=limits,
        limiter=limiter,
    )
    server = Server(
        config=ServerConfig(port=port),
        pipeline=pipeline,
        queries=queries,
        health=Healthy(),
        clock=clock,
        ids=ids,
        ledger=ledger,
        keys=KeyRing(queries, clock, open_without_keys=True),
        limiter=limiter,
        sign_in_page=sign_in_page,
        late=LateEntries(
            ledger=ledger, queries=queries, features=Features({}), clock=clock, config=ServerConfig(port=port)
        ),
    )
    await pipeline.start()
    meter.device_state(DEVICE, DeviceState.UP, clock.monotonic_ns())
    http = uvicorn.Server(
        uvicorn.Config(server.asgi, port=port, http=HttpProtocol, lifespan="off", log_config=None, access_log=False)
    )
    serving = asyncio.create_task(http.serve())
    while not http.started:  # noqa: ASYNC110 - uvicorn has no event for it
        await asyncio.sleep(0.005)
    print("ready", flush=True)
    await serving


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), int(sys.argv[2])))
