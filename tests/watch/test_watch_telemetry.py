"""Telemetry that nobody takes costs requests nothing, and is counted; and whose trace a request belongs to."""

from __future__ import annotations

import asyncio
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.core import Metric

from millicent.core.errors import ConfigError
from millicent.core.traces import CURRENT, Trace, trace_of
from millicent.watch.config import TelemetryConfig
from millicent.watch.metrics import Traffic
from millicent.watch.telemetry import Telemetry, telemetry_of
from support import receipts
from support.ports import free_port

TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


def dropped(traffic: Traffic) -> float:
    families: dict[str, Metric] = {family.name: family for family in traffic.collect()}
    return families["millicent_telemetry_dropped"].samples[0].value


def test_what_a_collector_that_is_gone_does_not_get_is_counted() -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    traffic = Traffic([])
    config = TelemetryConfig(endpoint=f"http://127.0.0.1:{free_port()}")

    async def scenario() -> None:
        async with telemetry_of(config, traffic, []):
            CURRENT.set(trace_of({}, sampled=True))
            for _ in range(10):
                traffic.settled(receipts.settled())

    asyncio.run(scenario())
    assert dropped(traffic) == 10


def test_a_queue_that_is_full_drops_and_never_waits() -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    telemetry = Telemetry(TelemetryConfig(endpoint="http://127.0.0.1:1"), {}, [])  # which isn't started
    settled = receipts.settled()
    for _ in range(8192 + 5):
        telemetry.settled(settled)
    assert telemetry.dropped == 5


def test_without_an_endpoint_nothing_is_sent_and_nothing_is_counted() -> None:
    traffic = Traffic([])

    async def scenario() -> None:
        async with telemetry_of(TelemetryConfig(), traffic, []):
            traffic.settled(receipts.settled())

    asyncio.run(scenario())
    assert all("telemetry" not in family.name for family in traffic.collect())


def test_an_endpoint_and_its_headers_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="endpoint"):
        TelemetryConfig(endpoint="collector:4318").check()
    monkeypatch.setenv("A_KEY", " abc ")
    assert TelemetryConfig(headers_env={"x-key": "A_KEY"}).headers() == {"x-key": "abc"}
    with pytest.raises(ConfigError, match="NO_KEY is not set"):
        TelemetryConfig(headers_env={"x-key": "NO_KEY"}).headers()


def test_a_callers_trace_is_gone_on_from_as_it_decided() -> None:
    found = trace_of({"traceparent": f"00-{TRACE}-{CALLER}-00", "tracestate": "a=b"}, sampled=True)
    assert (found.trace_id, found.parent_id, found.sampled, found.state) == (TRACE, CALLER, False, "a=b")
    assert found.span_id != CALLER
    sent = found.call_headers()
    assert sent == {"traceparent": f"00-{TRACE}-{found.calls[0]}-00", "tracestate": "a=b"}


@pytest.mark.parametrize(
    "header",
    [
        f"ff-{TRACE}-{CALLER}-01",
        f"00-{'0' * 32}-{CALLER}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE}-{CALLER}-01-more",
        f"00-{TRACE.upper()}-{CALLER}-01",
        "",
    ],
)
def test_a_header_that_is_not_valid_begins_a_new_trace(header: str) -> None:
    found = trace_of({"traceparent": header}, sampled=True)
    assert found.parent_id is None
    assert found.trace_id != TRACE
    assert found.sampled


@given(st.text(string.printable, max_size=80))
def test_whatever_a_caller_sends_makes_a_trace(header: str) -> None:
    found = trace_of({"traceparent": header}, sampled=False)
    assert isinstance(found, Trace)
    assert len(found.trace_id) == 32
    assert int(found.trace_id, 16) > 0
