"""`GET /metrics`: what this gateway has done since it started, and what it does now, as Prometheus reads it.

Names under `vllm:` mean what they mean there, so that dashboards and autoscalers made for that server understand them;
everything else is under `millicent_`. docs/telemetry.md has the table. Labels are bounded: receipts are of models that
are served, and a feature that the configuration doesn't name is `other`. Sums are kept as integers, and become floats
only in the text.
"""

from __future__ import annotations

import asyncio
import bisect
import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Protocol

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from millicent.core.accounts import Account
from millicent.core.clock import NS_PER_MS, NS_PER_S
from millicent.core.receipts import RESPONSE_CACHE, Receipt, Status
from millicent.core.usage import Provenance

_OTHER = "other"
# Upper bounds of the histograms, in milliseconds: fine where people notice, coarse where only machines wait.
_BOUNDS_MS = (
    1, 5, 10, 20, 40, 60, 80, 100, 250, 500, 750, 1_000, 2_500, 5_000, 7_500, 10_000, 20_000, 40_000, 80_000, 160_000,
    640_000, 2_560_000,
)  # fmt: skip
_BOUNDS_NS = [bound * NS_PER_MS for bound in _BOUNDS_MS]
_BOUNDS_TOKENS = [digit * 10**power for power in range(7) for digit in (1, 2, 5)]
_NANO = 1_000_000_000
_DEVICE_STATES = ("serving", "overhead", "lost", "idle", "down")


class Deployed(Protocol):
    """A model at a placement; `state` is closed while calls go there."""

    @property
    def model(self) -> str: ...
    @property
    def placement(self) -> str | None: ...
    @property
    def state(self) -> str: ...


class Gateway(Protocol):
    """What is read when somebody asks: the pipeline."""

    def models(self) -> tuple[str, ...]: ...

    def load(self) -> Sequence[tuple[str, bool]]:
        """The model of each request under way, and whether its answer has begun."""
        ...

    def deployments(self) -> Sequence[Deployed]: ...

    async def checkpoint(self) -> None: ...


class _Histogram:
    """Counts by upper bound, the last of what is beyond every one. As text a bound and the sum are over `per_unit`."""

    __slots__ = ("_bounds", "_counts", "_per_unit", "_total")

    def __init__(self, bounds: Sequence[int], per_unit: int) -> None:
        self._bounds = bounds
        self._per_unit = per_unit
        self._counts = [0] * (len(bounds) + 1)
        self._total = 0

    def observe(self, value: int) -> None:
        self._counts[bisect.bisect_left(self._bounds, value)] += 1
        self._total += value

    def show(self, family: HistogramMetricFamily, labels: Sequence[str]) -> None:
        names = [*(f"{bound / self._per_unit:.10g}" for bound in self._bounds), "+Inf"]
        buckets = [(name, float(held)) for name, held in zip(names, itertools.accumulate(self._counts), strict=True)]
        family.add_metric(labels, buckets, self._total / self._per_unit)


class Traffic:
    """Sums over the receipts that were settled, each told once."""

    def __init__(self, features: Iterable[str]) -> None:
        self._features = frozenset(features)
        self._listeners: list[Callable[[Receipt], None]] = []
        self._dropped: Callable[[], int] | None = None
        self._requests: Counter[tuple[str, ...]] = Counter()
        self._tokens: Counter[tuple[str, ...]] = Counter()
        self._cost_nanousd: Counter[tuple[str, ...]] = Counter()
        self._saved_nanousd: Counter[tuple[str, ...]] = Counter()
        self._unpriced: Counter[tuple[str, ...]] = Counter()
        self._device_ns: Counter[tuple[str, ...]] = Counter()
        self._nanojoules: Counter[tuple[str, ...]] = Counter()
        self._drafts: Counter[tuple[str, ...]] = Counter()
        self._read: Counter[tuple[str, ...]] = Counter()
        self._written: Counter[tuple[str, ...]] = Counter()
        self._finished: Counter[tuple[str, ...]] = Counter()
        self._cached: Counter[tuple[str, ...]] = Counter()
        self._took: dict[str, dict[str, _Histogram]] = {
            name: defaultdict(partial(_Histogram, _BOUNDS_NS, NS_PER_S)) for name in ("queue", "ttft", "tpot", "total")
        }
        self._sizes: dict[str, dict[str, _Histogram]] = {
            name: defaultdict(partial(_Histogram, _BOUNDS_TOKENS, 1)) for name in ("read", "written")
        }

    def listen(self, listener: Callable[[Receipt], None], *, dropped: Callable[[], int] | None = None) -> None:
        """Tell it of every receipt, too; `dropped` is how many it could do nothing with."""
        self._listeners.append(listener)
        self._dropped = dropped or self._dropped

    def settled(self, receipt: Receipt) -> None:
        for listener in self._listeners:
            listener(receipt)
        model = receipt.model
        feature = receipt.attribution.feature or ""
        who = (model, receipt.placement or "", feature if feature in {"", *self._features} else _OTHER)
        self._requests[*who, str(receipt.status)] += 1
        for line in receipt.lines:
            if line.book == "actual" and line.amount is not None:
                self._cost_nanousd[*who, line.role.value] += line.amount.nanousd
        self._unpriced[who] += receipt.total is None
        outcome = (receipt.policy or {}).get(RESPONSE_CACHE)
        if outcome is not None:
            self._cached[model, outcome] += 1
        for lever, saved in receipt.saved.items():
            self._saved_nanousd[model, lever] += saved.nanousd
        if outcome == "hit":  # no model has worked, and none is quicker for it
            return
        for leaf, count in receipt.usage.leaves.items():
            self._tokens[*who, leaf.value] += count.tokens or 0
        # What nobody knows is no series, rather than a zero.
        if receipt.accelerator.provenance is not Provenance.UNKNOWN:
            self._device_ns[who] += receipt.accelerator.serving_ns
        if receipt.energy.joules is not None:
            self._nanojoules[who] += int(receipt.energy.joules * _NANO)
        self._drafts[model, "drafted"] += receipt.accelerator.drafted_tokens
        self._drafts[model, "accepted"] += receipt.accelerator.accepted_tokens
        self._read[model,] += receipt.usage.input_tokens or 0
        self._written[model,] += receipt.usage.output_tokens or 0
        if receipt.status is Status.SUCCEEDED:
            self._finished[model, receipt.finish_reason or ""] += 1
            timing = receipt.timing
            for name, took_ns in (
                ("queue", timing.queue_ns),
                ("ttft", timing.ttft_ns),
                ("tpot", timing.tpot_ns),
                ("total", timing.total_ns),
            ):
                if took_ns is not None:
                    self._took[name][model].observe(took_ns)
            for name, tokens in (("read", receipt.usage.input_tokens), ("written", receipt.usage.output_tokens)):
                if tokens is not None:
                    self._sizes[name][model].observe(tokens)

    def collect(self) -> Iterator[Metric]:
        if self._dropped is not None:
            name = "millicent_telemetry_dropped"
            yield CounterMetricFamily(name, "Requests of which OpenTelemetry wasn't told.", value=self._dropped())
        who = ("model", "placement", "feature")
        yield _counter("millicent_requests", "Requests settled.", (*who, "status"), self._requests)
        yield _counter("millicent_tokens", "Tokens, each in one leaf.", (*who, "leaf"), self._tokens)
        yield _counter("millicent_cost_dollars", "What receipts add up to.", (*who, "role"), self._cost_nanousd, _NANO)
        yield _counter("millicent_unpriced_requests", "Requests whose cost is not known.", who, self._unpriced)
        yield _counter("millicent_saved_dollars", "Estimated savings.", ("model", "lever"), self._saved_nanousd, _NANO)
        yield _counter("millicent_accelerator_seconds", "Device time attributed.", who, self._device_ns, _NANO)
        yield _counter("millicent_energy_joules", "Joules attributed, where known.", who, self._nanojoules, _NANO)
        yield _counter("millicent_guessed_tokens", "Speculative decoding.", ("model", "outcome"), self._drafts)
        yield _counter("millicent_response_cache_requests", "What the cache did.", ("model", "outcome"), self._cached)
        yield _counter("vllm:prompt_tokens", "Input tokens.", ("model_name",), self._read)
        yield _counter("vllm:generation_tokens", "Output tokens.", ("model_name",), self._written)
        yield _counter(
            "vllm:request_success", "Answers that ended well.", ("model_name", "finished_reason"), self._finished
        )
        took, sizes = self._took, self._sizes
        yield _histogram("vllm:request_queue_time_seconds", "From arrival to the first step.", took["queue"])
        yield _histogram("vllm:time_to_first_token_seconds", "From arrival to the first token.", took["ttft"])
        what = "Per output token after the first, by request."
        yield _histogram("vllm:request_time_per_output_token_seconds", what, took["tpot"])
        yield _histogram("vllm:e2e_request_latency_seconds", "From arrival to the durable end.", took["total"])
        yield _histogram("vllm:request_prompt_tokens", "Input tokens of a request.", sizes["read"])
        yield _histogram("vllm:request_generation_tokens", "Output tokens of a request.", sizes["written"])


class Metrics:
    """The route; `settled` is to be told of every receipt.

    `accounts` are the devices' since the hour in which the gateway started; `trouble` is why it can't answer.
    """

    def __init__(
        self,
        traffic: Traffic,
        gateway: Gateway,
        accounts: Callable[[], Sequence[Account]],
        trouble: Callable[[], str | None],
    ) -> None:
        self._traffic = traffic
        self._gateway = gateway
        self._accounts = accounts
        self._trouble = trouble

    @property
    def route(self) -> Route:
        return Route("/metrics", self._answer)

    async def _answer(self, request: Request) -> Response:
        await self._gateway.checkpoint()
        accounts = await asyncio.to_thread(self._accounts)
        registry = CollectorRegistry()
        registry.register(_Once([*self._traffic.collect(), *self._now(), _device_seconds(accounts)]))
        # OpenMetrics for those who ask for it, as Prometheus does.
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(registry), headers={"content-type": content_type})

    def _now(self) -> Iterator[Metric]:
        yield GaugeMetricFamily(
            "millicent_ready", "1 while requests can be answered.", value=float(self._trouble() is None)
        )
        under_way = Counter(self._gateway.load())
        for name, what, begun in (
            ("vllm:num_requests_running", "Requests whose answer has begun.", True),
            ("vllm:num_requests_waiting", "Requests that wait for their first token.", False),
        ):
            family = GaugeMetricFamily(name, what, labels=("model_name",))
            for model in self._gateway.models():
                family.add_metric((model,), under_way[model, begun])
            yield family
        family = GaugeMetricFamily(
            "millicent_deployment_available", "1 while calls go there.", labels=("model", "placement")
        )
        for each in self._gateway.deployments():
            family.add_metric((each.model, each.placement or ""), float(each.state != "open"))
        yield family


class _Once(Collector):
    """Families that were made for this answer."""

    def __init__(self, families: Sequence[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        yield from self._families


def _counter(
    name: str, what: str, labels: Sequence[str], sums: Counter[tuple[str, ...]], per_unit: int = 1
) -> CounterMetricFamily:
    """`per_unit`: how many of what was counted make one of what is shown."""
    family = CounterMetricFamily(name, what, labels=labels)
    for values, total in sums.items():
        family.add_metric(values, total / per_unit)
    return family


def _histogram(name: str, what: str, by_model: Mapping[str, _Histogram]) -> HistogramMetricFamily:
    family = HistogramMetricFamily(name, what, labels=("model_name",))
    for model, histogram in by_model.items():
        histogram.show(family, (model,))
    return family


def _device_seconds(accounts: Sequence[Account]) -> CounterMetricFamily:
    spent_ns: Counter[tuple[str, ...]] = Counter()
    for account in accounts:
        for state in _DEVICE_STATES:
            spent_ns[account.device, account.placement, state] += getattr(account, f"{state}_ns")
    what = "Accelerator time by what it went into; the states add up to the clock."
    return _counter("millicent_device_seconds", what, ("device", "placement", "state"), spent_ns, NS_PER_S)
