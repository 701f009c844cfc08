"""Wiring: from a configuration to a server that answers."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import resource
import signal
import socket
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import msgspec
import uvicorn
from starlette.routing import BaseRoute
from starlette.types import ASGIApp

from millicent.app_models import FetchedModels, estimated_devices, watching_engines
from millicent.app_pages import marked_as_demo, page_routes
from millicent.backends.elsewhere import Elsewhere, UpstreamBackend, open_backend
from millicent.backends.local import EngineState, LocalBackend, LocalModel
from millicent.caching.cache import ResponseCache, open_cache
from millicent.caching.secret import installation_secret
from millicent.config import Config, cache, economics_setting
from millicent.control.access import KeyRing
from millicent.control.budgets import follow_config
from millicent.control.keys import read_keys
from millicent.control.limits import RateLimiter
from millicent.core.clock import Clock, SystemClock, hour_start_ns
from millicent.core.errors import ConfigError
from millicent.core.files import private_folder
from millicent.core.identifiers import Ids, SystemIds
from millicent.core.protocols import Backend
from millicent.dashboard.routes import missing_page, sign_in_page
from millicent.economics.reports import ANSWERS, Reports
from millicent.engine.config import EngineConfig
from millicent.engine.machine import usable_cores
from millicent.ledger.entries import add_entries
from millicent.ledger.queries import LedgerQueries
from millicent.ledger.schema import write_once
from millicent.ledger.sqlite import SqliteLedger
from millicent.meter.attribution import StepTimeShares
from millicent.meter.energy import EnergySource, find_energy
from millicent.meter.estimated import EstimatedDevice
from millicent.meter.meter import Meter
from millicent.meter.placements import Placement, stated_watts
from millicent.meter.prices import PriceBook
from millicent.meter.published_prices import published_prices
from millicent.meter.quotes import Quoter
from millicent.meter.waits import Waits
from millicent.pipeline.deployments import Place
from millicent.pipeline.estimates import Estimates
from millicent.pipeline.features import Features
from millicent.pipeline.holdout import Holdout
from millicent.pipeline.pipeline import Pipeline
from millicent.pipeline.prompts import Prompts
from millicent.routing.policies import Policies, learnable
from millicent.server.application import EngineReport, Server, UpstreamReport
from millicent.server.cache import CacheAdmin
from millicent.server.config import ServerConfig
from millicent.server.economics import economics_routes
from millicent.server.garbage import settle_collector
from millicent.server.guard import is_loopback
from millicent.server.http import HttpProtocol
from millicent.server.keys import KeyChanges
from millicent.server.late import LateEntries
from millicent.server.logs import logging_to
from millicent.server.ollama import Ollama
from millicent.step_time import Coefficients
from millicent.watch.alerting import alerting
from millicent.watch.live import Live
from millicent.watch.metrics import Metrics, Traffic
from millicent.watch.telemetry import telemetry_of, traced

log = logging.getLogger(__name__)

# Enough to quote as before a restart; learning from so many takes less than a second.
_LEARNED_AT_START = 2000
_FILES = 10_240  # as many as every macOS allows one process


StandIns = Callable[[Meter, Clock], tuple[Sequence[Backend], dict[str, list[Place]]]]
"""Backends in the place of real ones, and where each model runs."""


@dataclass(frozen=True)
class ServeOptions:
    """What to serve, from where; `models` maps public names to files that are here, on `placement`. Without any there
    is no engine. `elsewhere` are placements that are called; models at `providers` can be quoted beside them.
    `demo` stands in for all of them: its backends show the meter made-up steps, and nothing is real."""

    home: Path
    config: Config
    models: Mapping[str, LocalModel]
    placement: Placement
    providers: tuple[Placement, ...] = ()
    elsewhere: tuple[Elsewhere, ...] = ()
    demo: StandIns | None = None


@dataclass(frozen=True)
class App:
    """Everything that runs, wired together. It can answer once `start` has returned."""

    ledger: SqliteLedger
    backend: LocalBackend | None
    pipeline: Pipeline
    server: Server
    live: Live

    async def start(self) -> None:
        """Raises Unavailable or ModelError where the engine can't be started."""
        if self.backend is not None:
            await self.backend.start()

    def makes_vectors(self, model: str) -> bool:
        """Of models elsewhere nobody knows; they are taken to make text."""
        return _makes_vectors(self.backend, model)


class _Health:
    """What `/ready` rests on: the ledger can be written, the engine is there."""

    def __init__(
        self, ledger: SqliteLedger, backend: LocalBackend | None, elsewhere: Sequence[UpstreamBackend]
    ) -> None:
        self._ledger = ledger
        self._backend = backend
        self._elsewhere = elsewhere

    def upstreams(self) -> Sequence[UpstreamReport]:
        return [
            UpstreamReport(each.placement, each.name, each.upstream.base_url, each.models()) for each in self._elsewhere
        ]

    def engines(self) -> Sequence[EngineReport]:
        if self._backend is None:
            return []
        status = self._backend.status()
        models = {name: state.value for name, state in status.models.items()}
        return [EngineReport(status.device, status.pid, models, status.state.value, status.message or None)]

    def trouble(self) -> str | None:
        if reason := self._ledger.healthy():
            return f"the ledger can't be written: {reason}"
        if self._backend is None:
            return None
        status = self._backend.status()
        if status.state is EngineState.READY:
            return None
        return f"the engine is {status.state.value}" + (f": {status.message}" if status.message else "")


@contextlib.asynccontextmanager
async def open_app(options: ServeOptions) -> AsyncIterator[App]:
    """Everything but the socket. On leaving, what runs is finished or settled, and everything is stopped."""
    config, home = options.config, options.home
    features, policies = Features(config.features), Policies(config.routing, home=options.home)
    private_folder(home)
    clock = SystemClock()
    ids = SystemIds(clock)
    gateway = ids.new("gw")
    ledger = SqliteLedger(home / "ledger.db", config.ledger, clock, gateway)
    await ledger.start()
    try:
        shares = await _known_shares(ledger, config, clock, ids)
        meter = Meter(clock, gateway, ids, shares)
        backend = _local_backend(options, meter, shares, clock) if options.models else None
        elsewhere = [open_backend(each, clock) for each in options.elsewhere]
        placements = {each.name: each for each in (options.placement, *options.providers)}
        estimated = await estimated_devices(options.elsewhere, placements, meter, clock, ledger, shares)
        backends, places = _backends(options, backend, elsewhere, meter, clock)
        queries = LedgerQueries(home / "ledger.db")
        await ledger.write(partial(follow_config, configured=config.budgets))
        keys = KeyRing(queries, clock, open_without_keys=is_loopback(config.server.host))
        limiter = RateLimiter(clock, lambda key: keys.rates(key).or_else(config.limits))
        traffic, answers = Traffic(config.features), _answers(options, clock)
        pipeline = Pipeline(
            backends=backends,
            ledger=ledger,
            meter=meter,
            placements=placements,
            clock=clock,
            limits=config.limits,
            fits=shares,
            features=features,
            estimates=await _estimates(queries, shares, estimated, config),
            limiter=limiter,
            waits=Waits(shares.coefficients, config.engine.max_sequences),
            estimated=estimated,
            places=places,
            policies=config.policies,
            routing=policies,
            cache=answers,
            prompts=_prompts(options, clock),
            holdout=Holdout(config.holdout),
            settled=traffic.settled,
        )
        _check_fallbacks(pipeline.deployed(), config)
        policies.check_models(pipeline.deployed())

        health = _Health(ledger, backend, elsewhere)
        doors = (keys, limiter, features)
        wired = _Wired(options, ledger, queries, pipeline, meter, health, backend, *doors, traffic, answers, clock, ids)
        app = App(ledger, backend, pipeline, _server(wired), wired.live)
        async with (
            _running(pipeline, [*([] if backend is None else [backend]), *elsewhere], config, queries),
            _beside(wired, elsewhere, estimated),
        ):
            yield app
    finally:
        await ledger.stop()


@dataclass(frozen=True)
class _Wired:
    """What the server and its routes are made of."""

    options: ServeOptions
    ledger: SqliteLedger
    queries: LedgerQueries
    pipeline: Pipeline
    meter: Meter
    health: _Health
    backend: LocalBackend | None
    keys: KeyRing
    limiter: RateLimiter
    features: Features
    traffic: Traffic
    answers: ResponseCache | None
    clock: Clock
    ids: Ids

    @cached_property
    def fetched(self) -> FetchedModels | None:
        if self.backend is None:
            return None
        return FetchedModels(cache(), self.backend, self.pipeline, self.options.placement.name)

    @cached_property
    def live(self) -> Live:
        live = Live(self.pipeline, self.health, self.queries.budgets, self.clock)
        self.traffic.listen(live.settled)
        return live


def _server(wired: _Wired) -> Server:
    ledger, queries, clock, config = wired.ledger, wired.queries, wired.clock, wired.options.config.server
    return Server(
        config=config,
        pipeline=wired.pipeline,
        queries=queries,
        health=wired.health,
        tokenizers=wired.backend,
        loader=wired.backend,
        clock=clock,
        ids=wired.ids,
        late=LateEntries(ledger=ledger, queries=queries, features=wired.features, clock=clock, config=config),
        ledger=ledger,
        keys=wired.keys,
        limiter=wired.limiter,
        sign_in_page=partial(sign_in_page, demo=wired.options.demo is not None),
        missing_page=partial(missing_page, demo=wired.options.demo is not None),
        pages=_more_routes(wired),
    )


def _more_routes(wired: _Wired) -> list[BaseRoute]:
    """The metrics, Ollama's addresses that run no model, the response cache's, the economics, and the pages."""
    pipeline, queries, clock, backend = wired.pipeline, wired.queries, wired.clock, wired.backend
    began_ns = hour_start_ns(clock.now_ns())
    metrics = Metrics(
        wired.traffic,
        pipeline,
        accounts=lambda: queries.accounts(began_ns, clock.now_ns() + 1),
        trouble=wired.health.trouble,
    )
    ollama = Ollama(
        pipeline=pipeline,
        health=wired.health,
        makes_vectors=partial(_makes_vectors, backend),
        cache=cache(),
        offer=wired.fetched.offer if wired.fetched else None,
        clock=clock,
        config=wired.options.config.server,
    )
    pages = page_routes(
        wired.options,
        queries=queries,
        pipeline=pipeline,
        meter=wired.meter,
        health=wired.health,
        keys=KeyChanges(ledger=wired.ledger, queries=queries, ring=wired.keys, clock=clock, ids=wired.ids),
        chat_models=lambda: [model for model in pipeline.models() if not _makes_vectors(backend, model)],
        clock=clock,
        live=wired.live,
        ledger=wired.ledger,
    )
    reports = Reports(queries, clock, economics_setting(wired.options.config))
    economics = economics_routes(reports, ANSWERS, add=add_entries, ledger=wired.ledger, queries=queries, clock=clock)
    return [metrics.route, *wired.live.routes, *ollama.routes, *CacheAdmin(wired.answers).routes, *economics, *pages]


def _makes_vectors(backend: LocalBackend | None, model: str) -> bool:
    return backend is not None and model in backend.models() and backend.makes_vectors(model)


@contextlib.asynccontextmanager
async def _running(
    pipeline: Pipeline, backends: Sequence[LocalBackend | UpstreamBackend], config: Config, queries: LedgerQueries
) -> AsyncIterator[None]:
    """Until what runs is finished or settled, and the backends are closed."""
    pipeline.remember(await asyncio.to_thread(queries.recent, _LEARNED_AT_START))
    await pipeline.start()
    try:
        yield
    finally:
        await pipeline.drain(config.server.shutdown_grace_s)
        for backend in backends:
            await backend.close()
        await pipeline.close()


async def _estimates(
    queries: LedgerQueries, shares: StepTimeShares, estimated: Mapping[str, EstimatedDevice], config: Config
) -> Estimates:
    """With what the latest receipts teach."""

    def costs_of(model: str, placement: str) -> Coefficients | None:
        return estimated[placement].costs if placement in estimated else shares.coefficients(model)

    quoter = Quoter(costs_of)
    for receipt in await asyncio.to_thread(queries.recent, _LEARNED_AT_START):
        if (learned := learnable(receipt)) is not None:
            quoter.learn_from(learned)
    return Estimates(quoter, PriceBook(config.prices, published_prices))


def _backends(
    options: ServeOptions,
    local: LocalBackend | None,
    elsewhere: Sequence[UpstreamBackend],
    meter: Meter,
    clock: Clock,
) -> tuple[Sequence[Backend], dict[str, list[Place]]]:
    if options.demo is not None:
        return options.demo(meter, clock)
    return [*([] if local is None else [local]), *elsewhere], _places(options, local, elsewhere)


def _places(
    options: ServeOptions, local: LocalBackend | None, elsewhere: Sequence[UpstreamBackend]
) -> dict[str, list[Place]]:
    """Where each model runs: here, or at the placements that are called."""
    places: dict[str, list[Place]] = {}
    if local is not None:
        places = {name: [Place(local, model.placement)] for name, model in options.models.items()}
    called = {backend.placement: backend for backend in elsewhere}
    for name, model in options.config.models.items():
        for each in model.deployed:
            backend = called[each.placement]
            place = Place(backend, each.placement, each.weight, backend.upstream.config.max_connections)
            places.setdefault(name, []).append(place)
    return places


def _prompts(options: ServeOptions, clock: Clock) -> Prompts:
    keeping = [each for each in options.elsewhere if each.config.spoken(each.provider) == "anthropic"]
    marked_at = [each.placement for each in keeping if each.config.prompt_caching == "auto"]
    return Prompts(installation_secret(options.home), clock, marked_at, [each.placement for each in keeping])


@contextlib.asynccontextmanager
async def _beside(
    wired: _Wired, elsewhere: Sequence[UpstreamBackend], estimated: Mapping[str, EstimatedDevice]
) -> AsyncIterator[None]:
    """What goes on besides answering: engines elsewhere are looked at, what is unusual is told, traces are sent."""
    config, clock = wired.options.config, wired.clock
    async with (
        wired.fetched.watched() if wired.fetched else contextlib.nullcontext(),
        watching_engines(elsewhere, estimated),
        alerting(config.alerts, ledger=wired.ledger, queries=wired.queries, clock=clock, ids=SystemIds(clock)),
        telemetry_of(config.telemetry, wired.traffic, config.features),
    ):
        yield


def _answers(options: ServeOptions, clock: Clock) -> ResponseCache | None:
    config = options.config
    return open_cache(config.cache, options.home, clock, deployed=_deployed(options), policies=config.routing)


def _deployed(options: ServeOptions) -> bytes:
    """What answers behind each name, beside the request: where it differs, a kept answer isn't the same one."""
    config = options.config
    here = [
        (name, str(model.path) if isinstance(model.path, Path) else "", model.dtype, model.quantize)
        for name, model in sorted(options.models.items())
    ]
    there = [(name, each.base_url) for name, each in sorted(config.upstreams.items())]
    engine = (config.engine.dtype, config.engine.quantize)
    return msgspec.msgpack.encode((here, there, engine, config.models, config.routing, config.policies))


def _check_fallbacks(models: Sequence[str], config: Config) -> None:
    for name, policy in config.policies.items():
        for fallback in policy.fallbacks:
            if fallback not in models:
                raise ConfigError(
                    f"[models.{name}] fallbacks: this server has no model `{fallback}`, only {', '.join(models)}: "
                    "serve it too, or take it out."
                )


def _local_backend(options: ServeOptions, meter: Meter, shares: StepTimeShares, clock: SystemClock) -> LocalBackend:
    """The engine on this machine, whose device the meter then watches."""
    engine, placement = options.config.engine, options.placement
    meter.add_device(engine.device, placement, energy=_energy(engine.device, placement))
    return LocalBackend(engine, options.models, meter, clock, options.home, costs=shares.costs)


async def _known_shares(ledger: SqliteLedger, config: Config, clock: SystemClock, ids: SystemIds) -> StepTimeShares:
    """With the fits that the ledger has for this device as it is configured now."""
    configuration = step_configuration(config.engine)
    shares = StepTimeShares(clock, ids, configuration)
    shares.load(await ledger.latest_fits(config.engine.device, configuration))
    return shares


def step_configuration(engine: EngineConfig) -> str:
    """What else than device and model steps' times depend on."""
    return f"dtype={engine.dtype} threads={usable_cores(engine)} deterministic={engine.deterministic}".lower()


def _energy(device: str, placement: Placement) -> EnergySource | None:
    found = find_energy(device, stated_watts(placement), visible=os.environ.get("CUDA_VISIBLE_DEVICES"))
    log.info("the energy of %s is %s", device, found.what)
    return found.source


def serve(options: ServeOptions, say: Callable[[str], None] = print) -> None:
    """Serve until SIGINT or SIGTERM. Raises ConfigError for an address that can't be had, ModelError for a model."""
    server = options.config.server
    if not is_loopback(server.host) and not _has_keys(options):
        raise ConfigError(
            f"host {server.host} would be reachable from other machines, and there is no key to tell callers apart: "
            "make one with `millicent keys create`, or listen on 127.0.0.1."
        )
    _allow_many_files()
    with (
        _listen(server) as listener,
        logging_to(options.home),
        asyncio.Runner(loop_factory=_loop_factory()) as runner,
    ):
        runner.run(_serve(options, listener, say))


def _has_keys(options: ServeOptions) -> bool:
    clock = SystemClock()
    keys = write_once(options.home / "ledger.db", options.config.ledger, clock, read_keys)
    return any(key.state(clock.now_ns()) == "active" for key in keys)


async def _serve(options: ServeOptions, listener: socket.socket, say: Callable[[str], None]) -> None:
    settings = options.config.server
    async with open_app(options) as app:
        http = _HttpServer(
            uvicorn.Config(
                _asgi(app, options),
                http=HttpProtocol,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=settings.shutdown_grace_s,
            )
        )
        serving = asyncio.create_task(http.serve(sockets=[listener]))
        stopping = _stop_on_signals(http)
        starting = asyncio.create_task(app.start())
        try:
            await asyncio.wait({starting, serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if starting.done():
                await starting
                settle_collector()
                models = app.pipeline.models()
                _announce(say, settings.host, listener.getsockname()[1], models, vectors=app.makes_vectors(models[0]))
                await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)
            await app.live.close()
            http.should_exit = True
            await serving


def _asgi(app: App, options: ServeOptions) -> ASGIApp:
    """As it is served."""
    asgi, telemetry = app.server.asgi, options.config.telemetry
    if options.demo is not None:
        asgi = marked_as_demo(asgi)
    return asgi if telemetry.endpoint is None else traced(asgi, telemetry.sample_percent)


class _HttpServer(uvicorn.Server):
    """Signals are ours: uvicorn would raise them again when it is done, before receipts are settled."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _stop_on_signals(http: uvicorn.Server) -> asyncio.Future[None]:
    """Done at the first SIGINT or SIGTERM; a second one doesn't wait for answers that are still running."""
    loop = asyncio.get_running_loop()
    stopping: asyncio.Future[None] = loop.create_future()

    def stop() -> None:
        if stopping.done():
            http.force_exit = True
        else:
            stopping.set_result(None)

    for name in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(name, stop)
    return stopping


def _announce(say: Callable[[str], None], host: str, port: int, models: Sequence[str], *, vectors: bool) -> None:
    """`vectors`: the first model makes embeddings, not text."""
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    say(f"Millicent ready on {url}")
    say(f"Serving {', '.join(models)}. Open {url}/ in a browser, or paste:\n")
    question = "What is the capital city of Japan?"
    if vectors:
        address, asked = "embeddings", f'"input": "{question}"'
    else:
        address, asked = (
            "chat/completions",
            f'"messages": [{{"role": "user", "content": "{question}"}}], "temperature": 0',
        )
    say(f"curl {url}/v1/{address} -H 'Content-Type: application/json' \\")
    say(f'  -d \'{{"model": "{models[0]}", {asked}}}\'\n')


def _allow_many_files() -> None:
    """Each client, and each call elsewhere, takes a descriptor, of which macOS gives 256 and most Linux 1,024 to those
    who don't ask for more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY:
        wanted = _FILES if hard == resource.RLIM_INFINITY else min(_FILES, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))


def _listen(config: ServerConfig) -> socket.socket:
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((config.host, config.port))
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"cannot listen on {config.host} port {config.port} ({error.strerror}): stop what uses it, or pass --port."
        ) from None
    listener.listen(2048)
    listener.setblocking(False)
    return listener


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop
    return uvloop.new_event_loop
