"""Traces and metrics over OTLP/HTTP, by OpenTelemetry's conventions for generative AI: one span per request, one below
it per attempt, made from the receipt once it is durable. docs/telemetry.md has the names in one table.

A request only leaves its receipt in a bounded queue; a thread of its own makes spans of it and sends them. What the
queue has no room for, or the collector doesn't take, is dropped and counted.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import logging
import queue
import secrets
import threading
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from millicent.core.clock import NS_PER_S
from millicent.core.errors import ConfigError
from millicent.core.receipts import Attempt, Receipt, Status
from millicent.core.traces import CURRENT, Trace, trace_of
from millicent.core.usage import Leaf

if TYPE_CHECKING:
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.sdk.trace.export import SpanExporter
    from starlette.types import ASGIApp, Receive, Scope, Send

    from millicent.watch.config import TelemetryConfig
    from millicent.watch.metrics import Traffic

log = logging.getLogger(__name__)

_WAITING = 8192
_AT_ONCE = 512
_PAUSE_S = 2.0
_TIMEOUT_S = 3
_METRICS_EVERY_MS = 30_000
# What finishing may take at the end.
_LAST_S = 3.0
_OTHER = "other"

_OPERATIONS = {
    "openai.embeddings": "embeddings",
    "ollama.embed": "embeddings",
    "openai.completions": "text_completion",
    "ollama.generate": "text_completion",
}
# As the conventions advise for each.
_SECONDS = [0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92]
_FIRST_S = [0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0]
_EACH_S = [0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5]
_TOKENS = [1, 4, 16, 64, 256, 1024, 4096, 16384, 65536, 262144, 1048576, 4194304, 16777216, 67108864]


def traced(app: ASGIApp, sample_percent: int) -> ASGIApp:
    """Every request belongs to its caller's trace, or to a new one."""

    async def with_trace(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = {
                name.decode("latin-1"): value.decode("latin-1")
                for name, value in scope["headers"]
                if name in {b"traceparent", b"tracestate"}
            }
            CURRENT.set(trace_of(headers, sampled=secrets.randbelow(100) < sample_percent))
        await app(scope, receive, send)

    return with_trace


class _Told(NamedTuple):
    receipt: Receipt
    trace: Trace


class Telemetry:
    """`settled` is to be told of every receipt, in the context of its request. `start` begins sending, `close` ends it.

    Raises ConfigError where the extra isn't installed.
    """

    def __init__(self, config: TelemetryConfig, headers: Mapping[str, str], features: Iterable[str]) -> None:
        if importlib.util.find_spec("opentelemetry") is None or any(
            importlib.util.find_spec(name) is None for name in ("opentelemetry.sdk", "opentelemetry.exporter")
        ):
            raise ConfigError(
                "[telemetry] endpoint: OpenTelemetry is not installed: `pip install millicent[otel]`, or take it out."
            )
        self._config = config
        self._headers = dict(headers)
        self._features = frozenset(features)
        self._waiting: queue.Queue[_Told | None] = queue.Queue(_WAITING)
        self._thread = threading.Thread(target=self._send, name="telemetry", daemon=True)
        self._counting = threading.Lock()
        self._dropped = 0
        self._unsent = 0  # on their way to the collector, or waiting for that
        self._given_up = False

    @property
    def dropped(self) -> int:
        """Receipts of which nothing was sent: the queue was full, or the collector didn't take them."""
        return self._dropped

    def settled(self, receipt: Receipt) -> None:
        trace = CURRENT.get() or trace_of({}, sampled=False)
        with self._counting:
            self._unsent += trace.sampled
        try:
            self._waiting.put_nowait(_Told(receipt, trace))
        except queue.Full:
            with self._counting:
                self._unsent -= trace.sampled
                self._dropped += 1

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Send what waits, for a few seconds. Blocks."""
        try:
            self._waiting.put(None, timeout=_LAST_S)
        except queue.Full:
            log.warning("telemetry: the collector takes nothing; what waits is dropped")
        else:
            self._thread.join(_LAST_S)
        with self._counting:  # nobody waits any longer for what is still on its way
            self._given_up = True
            self._dropped += self._unsent

    def _send(self) -> None:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource

        from millicent import __version__

        resource = Resource.create({"service.name": self._config.service_name, "service.version": __version__})
        base = self._config.endpoint.rstrip("/") if self._config.endpoint else ""
        exporter = OTLPSpanExporter(endpoint=f"{base}/v1/traces", headers=self._headers, timeout=_TIMEOUT_S)
        provider = _meter_provider(f"{base}/v1/metrics", self._headers, resource)
        instruments = _Instruments(provider, self._features)
        try:
            more = True
            while more:
                batch, more = self._batch()
                for told in batch:
                    instruments.record(told.receipt)
                self._export(exporter, resource, [told for told in batch if told.trace.sampled])
        finally:
            provider.shutdown(timeout_millis=_TIMEOUT_S * 1000)
            exporter.shutdown()  # type: ignore[no-untyped-call] # theirs

    def _batch(self) -> tuple[list[_Told], bool]:
        """What came in within a pause, at most so much; and whether more may come."""
        batch: list[_Told] = []
        try:
            while len(batch) < _AT_ONCE:
                told = self._waiting.get(timeout=_PAUSE_S)
                if told is None:
                    return batch, False
                batch.append(told)
        except queue.Empty:
            return batch, True
        return batch, True

    def _export(self, exporter: SpanExporter, resource: Resource, batch: Sequence[_Told]) -> None:
        from opentelemetry.sdk.trace.export import SpanExportResult

        if not batch:
            return
        try:
            spans = [span for told in batch for span in spans_of(told.receipt, told.trace, resource)]
            result = exporter.export(spans)
        except Exception:
            log.exception("telemetry: spans could not be made")
            result = SpanExportResult.FAILURE
        taken = result is SpanExportResult.SUCCESS
        with self._counting:
            if not self._given_up:
                self._unsent -= len(batch)
                self._dropped += 0 if taken else len(batch)
        if not taken:
            log.warning("telemetry: the collector didn't take the spans of %d requests", len(batch))


@contextlib.asynccontextmanager
async def telemetry_of(config: TelemetryConfig, traffic: Traffic, features: Iterable[str]) -> AsyncIterator[None]:
    """For as long as this lasts, what is settled is sent, where an endpoint is configured. Raises ConfigError."""
    if config.endpoint is None:
        yield
        return
    telemetry = Telemetry(config, config.headers(), features)
    telemetry.start()
    traffic.listen(telemetry.settled, dropped=lambda: telemetry.dropped)
    try:
        yield
    finally:
        await asyncio.to_thread(telemetry.close)


def spans_of(receipt: Receipt, trace: Trace, resource: Resource) -> list[ReadableSpan]:
    """The request's, and one of each attempt."""
    from opentelemetry.trace import SpanKind

    ended_ns = receipt.settled_at_ns or receipt.created_at_ns
    operation = _operation(receipt)
    request = _span(
        f"{operation} {receipt.model}",
        trace,
        trace.span_id,
        trace.parent_id,
        SpanKind.SERVER,
        (receipt.created_at_ns, ended_ns),
        _request_attributes(receipt, operation),
        receipt.error if receipt.status in {Status.FAILED, Status.INTERRUPTED} else None,
        resource,
    )
    spans = [request]
    calls = iter(trace.calls)
    for attempt in receipt.attempts:
        # Calls elsewhere were given their span's name when they were made; the engine here asks for none.
        span_id = next(calls, None) or trace_of({}, sampled=True).span_id
        spans.append(
            _span(
                f"{operation} {attempt.model}",
                trace,
                span_id,
                trace.span_id,
                SpanKind.CLIENT,
                (attempt.started_at_ns, attempt.ended_at_ns or ended_ns),
                _attempt_attributes(attempt, operation),
                attempt.error,
                resource,
            )
        )
    return spans


def _span(
    name: str,
    trace: Trace,
    span_id: str,
    parent_id: str | None,
    kind: Any,
    times_ns: tuple[int, int],
    attributes: dict[str, Any],
    error: str | None,
    resource: Resource,
) -> ReadableSpan:
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.sdk.util.instrumentation import InstrumentationScope
    from opentelemetry.trace import SpanContext, Status, StatusCode, TraceFlags

    def context(of: str, *, remote: bool) -> SpanContext:
        return SpanContext(int(trace.trace_id, 16), int(of, 16), remote, TraceFlags(TraceFlags.SAMPLED))

    return ReadableSpan(
        name,
        context(span_id, remote=False),
        None if parent_id is None else context(parent_id, remote=True),
        resource,
        {key: value for key, value in attributes.items() if value is not None},
        kind=kind,
        status=Status(StatusCode.UNSET) if error is None else Status(StatusCode.ERROR, error[:500]),
        start_time=times_ns[0],
        end_time=max(times_ns),
        instrumentation_scope=InstrumentationScope("millicent"),
    )


def _operation(receipt: Receipt) -> str:
    return _OPERATIONS.get(receipt.dialect, "chat")


def _provider(backend: str | None) -> str:
    return "millicent" if backend in {None, "local"} else str(backend)


def _seconds(ns: int | None) -> float | None:
    return None if ns is None else ns / NS_PER_S


def _request_attributes(receipt: Receipt, operation: str) -> dict[str, Any]:
    who, timing, total = receipt.attribution, receipt.timing, receipt.total
    failed = receipt.status in {Status.FAILED, Status.INTERRUPTED}
    return {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": _provider(receipt.backend),
        "gen_ai.request.model": receipt.model,
        "gen_ai.response.model": receipt.served_model,
        "gen_ai.response.id": receipt.id,
        "gen_ai.response.finish_reasons": [receipt.finish_reason] if receipt.finish_reason else None,
        "gen_ai.usage.input_tokens": receipt.usage.input_tokens,
        "gen_ai.usage.output_tokens": receipt.usage.output_tokens,
        "gen_ai.usage.cache_read.input_tokens": receipt.usage.tokens(Leaf.INPUT_CACHE_READ),
        "gen_ai.usage.reasoning.output_tokens": receipt.usage.tokens(Leaf.OUTPUT_REASONING),
        "gen_ai.conversation.id": who.conversation,
        "error.type": str(receipt.status) if failed else None,
        "millicent.receipt": receipt.id,
        "millicent.status": str(receipt.status),
        "millicent.cost_usd": None if total is None else str(total),
        "millicent.placement": receipt.placement,
        "millicent.dialect": receipt.dialect,
        "millicent.stream": receipt.stream,
        "millicent.feature": who.feature,
        "millicent.team": who.team,
        "millicent.tier": who.tier,
        "millicent.key": who.key,
        "millicent.queue_s": _seconds(timing.queue_ns),
        "millicent.time_to_first_token_s": _seconds(timing.ttft_ns),
        "millicent.time_per_output_token_s": _seconds(timing.tpot_ns),
    }


def _attempt_attributes(attempt: Attempt, operation: str) -> dict[str, Any]:
    return {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": _provider(attempt.backend),
        "gen_ai.request.model": attempt.model,
        "millicent.placement": attempt.placement,
        "millicent.role": str(attempt.role),
        "millicent.status": None if attempt.status is None else str(attempt.status),
        "error.type": None if attempt.error is None else str(attempt.status),
    }


def _meter_provider(endpoint: str, headers: Mapping[str, str], resource: Resource) -> MeterProvider:
    from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader

    exporter = OTLPMetricExporter(endpoint=endpoint, headers=dict(headers), timeout=_TIMEOUT_S)
    reader = PeriodicExportingMetricReader(exporter, export_interval_millis=_METRICS_EVERY_MS)
    return MeterProvider([reader], resource, shutdown_on_exit=False)


class _Instruments:
    """The conventions' histograms, and what a request costs. Labels are bounded as those of `/metrics` are."""

    def __init__(self, provider: MeterProvider, features: frozenset[str]) -> None:
        meter = provider.get_meter("millicent")
        self._features = features

        def histogram(name: str, unit: str, what: str, bounds: Sequence[float]) -> Any:
            return meter.create_histogram(name, unit, what, explicit_bucket_boundaries_advisory=bounds)

        self._tokens = histogram("gen_ai.client.token.usage", "{token}", "Tokens of a request.", _TOKENS)
        self._total = histogram("gen_ai.server.request.duration", "s", "Arrival to the durable end.", _SECONDS)
        self._first = histogram("gen_ai.server.time_to_first_token", "s", "Arrival to the first token.", _FIRST_S)
        self._each = histogram("gen_ai.server.time_per_output_token", "s", "Per token after the first.", _EACH_S)
        self._cost = meter.create_counter("millicent.cost", "USD", "What receipts add up to.")
        self._unpriced = meter.create_counter("millicent.unpriced_requests", "{request}", "Cost not known.")

    def record(self, receipt: Receipt) -> None:
        feature = receipt.attribution.feature or ""
        labels = {
            "gen_ai.operation.name": _operation(receipt),
            "gen_ai.provider.name": _provider(receipt.backend),
            "gen_ai.request.model": receipt.model,
            "millicent.feature": feature if feature in {"", *self._features} else _OTHER,
        }
        for kind, tokens in (("input", receipt.usage.input_tokens), ("output", receipt.usage.output_tokens)):
            if tokens is not None:
                self._tokens.record(tokens, labels | {"gen_ai.token.type": kind})
        failed = receipt.status in {Status.FAILED, Status.INTERRUPTED}
        ended = labels | ({"error.type": str(receipt.status)} if failed else {})
        for instrument, took_ns, of_failed in (
            (self._total, receipt.timing.total_ns, True),
            (self._first, receipt.timing.ttft_ns, False),
            (self._each, receipt.timing.tpot_ns, False),
        ):
            if took_ns is not None and (of_failed or not failed):
                instrument.record(took_ns / NS_PER_S, ended)
        if receipt.total is None:
            self._unpriced.add(1, labels)
        else:
            # A figure to look at; what is billed is in the ledger.
            self._cost.add(float(max(0, receipt.total.nanousd)) / 1_000_000_000, labels)
