"""Wiring of models: those that are fetched while the server runs, and engines elsewhere that show no steps."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path

from millicent.backends.elsewhere import Elsewhere, UpstreamBackend
from millicent.backends.engine_figures import watch
from millicent.backends.local import LocalBackend, LocalModel
from millicent.core.clock import Clock
from millicent.hub import InstalledModel, installed_at_ns, list_installed
from millicent.ledger.sqlite import SqliteLedger
from millicent.meter.attribution import StepTimeShares
from millicent.meter.energy import StatedPower
from millicent.meter.estimated import EstimatedDevice
from millicent.meter.meter import Meter
from millicent.meter.placements import Placement, stated_watts
from millicent.pipeline.deployments import Place
from millicent.pipeline.pipeline import Pipeline

log = logging.getLogger(__name__)

_LOOK_EVERY_S = 1.0


class FetchedModels:
    """What appears in `cache` from now on is offered by `backend`, under its own name, and loaded when it is first
    asked for. What lay there before isn't: those were not named when the server was started."""

    def __init__(self, cache: Path, backend: LocalBackend, pipeline: Pipeline, placement: str) -> None:
        self._cache = cache
        self._backend = backend
        self._pipeline = pipeline
        self._placement = placement
        self._looked_ns = installed_at_ns(cache)
        self._seen = {model.name for model in list_installed(cache)}

    def offer(self, model: InstalledModel) -> None:
        """Nothing changes where something of this name is served already."""
        self._seen.add(model.name)
        if model.name not in self._pipeline.models():
            self._backend.offer(model.name, LocalModel(model.path, self._placement))
            self._pipeline.offer(model.name, Place(self._backend, self._placement))
            log.info("%s was fetched, and can be asked", model.name)

    async def look(self) -> None:
        """Offer what `millicent pull`, say, has put there since the last time."""
        changed_ns = installed_at_ns(self._cache)
        if changed_ns == self._looked_ns:
            return
        for model in await asyncio.to_thread(list_installed, self._cache):
            if model.name not in self._seen:
                self.offer(model)
        self._looked_ns = changed_ns  # only now: what could not be looked at is looked at again

    @contextlib.asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        watching = asyncio.create_task(self._watch())
        try:
            yield
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_EVERY_S)
            try:
                await self.look()
            except OSError as error:
                log.warning("%s can't be looked at for new models: %s", self._cache, error)


async def estimated_devices(
    places: Sequence[Elsewhere],
    placements: Mapping[str, Placement],
    meter: Meter,
    clock: Clock,
    ledger: SqliteLedger,
    shares: StepTimeShares,
) -> dict[str, EstimatedDevice]:
    """The engines elsewhere whose time is paid for, which the meter then watches, with what was learned of them."""
    numbers = itertools.count(-1, -1)
    devices = {}
    for each in places:
        placement = placements[each.placement]
        if placement.kind != "api":
            watts = stated_watts(placement)
            there = " ".join(sorted(set(each.models.values())))
            runs = f"{each.config.base_url} {there} accelerators={placement.accelerators}"
            device = devices[placement.name] = EstimatedDevice(placement, meter, clock, numbers, shares, runs)
            device.load_fit(await ledger.latest_fits(device.name, runs))
            device.watch(placement, None if watts is None else StatedPower(watts))
    return devices


@contextlib.asynccontextmanager
async def watching_engines(
    elsewhere: Sequence[UpstreamBackend], estimated: Mapping[str, EstimatedDevice]
) -> AsyncIterator[None]:
    """What those engines show of their load is looked at."""
    watches = [
        asyncio.create_task(watch(each.name, each.upstream, estimated[each.placement]))
        for each in elsewhere
        if each.placement in estimated
    ]
    try:
        yield
    finally:
        for watching in watches:
            watching.cancel()
        await asyncio.gather(*watches, return_exceptions=True)
