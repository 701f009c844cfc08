"""OpenTelemetry, to a collector that decodes what it is sent: what a request leaves, and that a collector which
hangs changes nothing for requests."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from support.fake_upstream import Call, FakeUpstream, fake_upstream_in_a_thread, said, split
from support.http_server import Handler, http_server
from support.live import LiveServer, live_server
from support.waiting import until

pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2")

KEY = "sk-not-to-be-shown"
CONFIG = """
[placements.elsewhere]
kind = "api"
provider = "openai"
base_url = "{url}"
api_key_env = "TEST_UPSTREAM_KEY"

[models.small]
placement = "elsewhere"
model = "gpt-4o-mini"

[features.search]

[telemetry]
endpoint = "{collector}"
headers_env = {{ x-collector-key = "COLLECTOR_KEY" }}
"""
ENV = {"TEST_UPSTREAM_KEY": KEY, "COLLECTOR_KEY": "for-the-collector"}
TRACE = "0af7651916cd43dd8448eb211c80319c"
CALLER = "b7ad6b7169203331"


@dataclass
class Collector:
    """`takes`: it answers; until then its connections hang."""

    url: str = ""
    spans: list[Any] = field(default_factory=list)
    metrics: dict[str, Any] = field(default_factory=dict)
    headers: list[dict[str, str]] = field(default_factory=list)
    takes: Event = field(default_factory=Event)

    def span(self, receipt: str) -> Any:
        """The request's, once it came."""
        return until(lambda: [each for each in self.spans if attributes(each).get("millicent.receipt") == receipt])[0]

    def below(self, span: Any) -> list[Any]:
        return [each for each in self.spans if each.parent_span_id == span.span_id]


@contextmanager
def collecting() -> Iterator[Collector]:
    from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    made = Collector()
    made.takes.set()

    class Taking(Handler):
        def do_POST(self) -> None:
            made.takes.wait(60)
            body = self.read_body()
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            made.headers.append({name.lower(): value for name, value in self.headers.items()})
            if self.path == "/v1/traces":
                for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                    made.spans += [span for scope in resource.scope_spans for span in scope.spans]
            else:
                assert self.path == "/v1/metrics"
                for resource in ExportMetricsServiceRequest.FromString(body).resource_metrics:
                    made.metrics |= {each.name: each for scope in resource.scope_metrics for each in scope.metrics}
            self.send(200)

    with http_server(Taking) as made.url:
        try:
            yield made
        finally:
            made.takes.set()


def attributes(span: Any) -> dict[str, Any]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in span.attributes}


async def answer(call: Call) -> None:
    if call.json["messages"][0]["content"] == "fail":
        await call.whole(b'{"error": {"message": "no, never"}}', status="400 Bad Request")
        return
    await call.stream(split(said("The capital", " is Tōkyō."), 7))


@pytest.fixture(scope="module")
def upstream() -> Iterator[FakeUpstream]:
    with fake_upstream_in_a_thread(answer) as fake:
        yield fake


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with collecting() as made:
        yield made


@pytest.fixture(scope="module")
def server(
    upstream: FakeUpstream, collector: Collector, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LiveServer]:
    home = tmp_path_factory.mktemp("telemetry")
    with live_server(home, [], CONFIG.format(url=upstream.url, collector=collector.url), ENV) as live:
        yield live


def ask(server: LiveServer, text: str = "What is the capital?", **headers: str) -> tuple[int, str]:
    body = json.dumps({"model": "small", "messages": [{"role": "user", "content": text}]}).encode()
    sent = {"Content-Type": "application/json", "X-Millicent-Feature": "search", **headers}
    status, _, got = server.request("POST", "/v1/chat/completions", body, sent)
    return status, {name.lower(): value for name, value in got.items()}["x-millicent-receipt"]


def test_a_request_leaves_a_span_with_an_attempt_below_it(server: LiveServer, collector: Collector) -> None:
    _, receipt = ask(server)
    span = collector.span(receipt)
    _, told = server.get(f"/v1/receipts/{receipt}")
    found = attributes(span)
    assert span.name == "chat small"
    assert found["gen_ai.operation.name"] == "chat"
    assert found["gen_ai.provider.name"] == "openai"
    assert (found["gen_ai.usage.input_tokens"], found["gen_ai.usage.output_tokens"]) == (19, 10)
    assert found["millicent.cost_usd"] == told["total_usd"]
    assert found["millicent.feature"] == "search"
    (attempt,) = collector.below(span)
    assert attributes(attempt)["millicent.role"] == "inference"
    assert span.start_time_unix_nano <= attempt.start_time_unix_nano <= attempt.end_time_unix_nano
    assert attempt.end_time_unix_nano <= span.end_time_unix_nano
    assert not span.parent_span_id
    assert collector.headers[-1]["x-collector-key"] == "for-the-collector"


def test_a_callers_trace_goes_on_here_and_at_the_provider(
    server: LiveServer, collector: Collector, upstream: FakeUpstream
) -> None:
    _, receipt = ask(server, traceparent=f"00-{TRACE}-{CALLER}-01", tracestate="vendor=1")
    span = collector.span(receipt)
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE, CALLER)
    (attempt,) = collector.below(span)
    sent = upstream.calls[-1].headers
    assert sent["traceparent"] == f"00-{TRACE}-{attempt.span_id.hex()}-01"
    assert sent["tracestate"] == "vendor=1"


def test_a_trace_that_is_not_sampled_leaves_no_span_and_is_passed_on(
    server: LiveServer, collector: Collector, upstream: FakeUpstream
) -> None:
    _, unsampled = ask(server, traceparent=f"00-{TRACE}-{CALLER}-00")
    assert upstream.calls[-1].headers["traceparent"].endswith("-00")
    _, sampled = ask(server, traceparent="garbage")
    assert collector.span(sampled).trace_id.hex() != TRACE
    assert unsampled not in {attributes(span).get("millicent.receipt") for span in collector.spans}


def test_what_failed_is_an_error(server: LiveServer, collector: Collector) -> None:
    status, receipt = ask(server, "fail")
    assert status >= 400
    span = collector.span(receipt)
    assert span.status.code == 2
    assert attributes(span)["error.type"] == "failed"


def test_nothing_that_was_said_and_no_key_is_in_it(server: LiveServer, collector: Collector) -> None:
    _, receipt = ask(server, "a secret question")
    collector.span(receipt)
    everything = str(collector.spans)
    assert "secret question" not in everything
    assert KEY not in everything


def test_a_collector_that_hangs_holds_up_no_request_and_metrics_come_at_the_end(
    upstream: FakeUpstream, tmp_path: Path
) -> None:
    with collecting() as made:
        made.takes.clear()
        config = CONFIG.format(url=upstream.url, collector=made.url)
        with live_server(tmp_path, [], config, ENV) as live:
            for _ in range(5):
                assert ask(live)[0] == 200
            made.takes.set()
            assert live.stop() == 0
    tokens = made.metrics["gen_ai.client.token.usage"].histogram.data_points
    assert sum(point.count for point in tokens) == 10
    (cost,) = made.metrics["millicent.cost"].sum.data_points
    assert cost.as_double > 0
