"""What Prometheus reads, against receipts added up by hand."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal

import msgspec
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics_families
from prometheus_client.parser import text_string_to_metric_families
from starlette.applications import Starlette
from starlette.testclient import TestClient

from millicent.core.clock import NS_PER_MS
from millicent.core.money import Money
from millicent.core.receipts import Receipt, Timing
from millicent.core.request import Attribution
from millicent.watch.metrics import Metrics, Traffic
from support import receipts
from support.watched_gateway import ACCOUNT, StandInGateway


def scrape(told: Sequence[Receipt], trouble: str | None = None) -> dict[str, float]:
    """Every sample, by its name and labels as they are written."""
    traffic = Traffic(["search"])
    for receipt in told:
        traffic.settled(receipt)
    metrics = Metrics(traffic, StandInGateway(), lambda: [ACCOUNT, ACCOUNT], lambda: trouble)
    answer = TestClient(Starlette(routes=[metrics.route])).get("/metrics")
    assert answer.status_code == 200
    samples = [sample for family in text_string_to_metric_families(answer.text) for sample in family.samples]
    return {
        sample.name + "".join(f" {name}={value}" for name, value in sorted(sample.labels.items())): sample.value
        for sample in samples
    }


def test_receipts_add_up() -> None:
    found = scrape([receipts.settled(), receipts.settled(), receipts.unknown()])
    who = "feature=search model=tiny placement=this-machine"
    assert found[f"millicent_requests_total {who} status=succeeded"] == 3
    assert found[f"millicent_cost_dollars_total {who} role=inference"] == 0.00005
    assert found[f"millicent_unpriced_requests_total {who}"] == 1
    assert found[f"millicent_accelerator_seconds_total {who}"] == 0.5
    assert found[f"millicent_tokens_total {who.replace('feature=search', 'feature=search leaf=input_fresh')}"] == 24
    assert found["vllm:generation_tokens_total model_name=tiny"] == 6
    assert found["vllm:request_prompt_tokens_sum model_name=tiny"] == 24
    assert found["vllm:request_prompt_tokens_bucket le=10 model_name=tiny"] == 0
    assert found["vllm:request_prompt_tokens_bucket le=20 model_name=tiny"] == 2
    assert found["vllm:request_success_total finished_reason=stop model_name=tiny"] == 3


def test_openmetrics_is_answered_to_those_who_ask_for_it() -> None:
    """As Prometheus asks; its parser is stricter, and the figures are the same."""
    traffic = Traffic(["search"])
    traffic.settled(receipts.settled())
    metrics = Metrics(traffic, StandInGateway(), lambda: [ACCOUNT], lambda: None)
    client = TestClient(Starlette(routes=[metrics.route]))
    asked = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
    answer = client.get("/metrics", headers={"accept": asked})
    assert answer.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    plain = text_string_to_metric_families(client.get("/metrics").text)
    strict = openmetrics_families(answer.text)  # type: ignore[no-untyped-call]
    # Where names may hold a colon or not is the asker's choice.
    one, other = (
        sorted((sample.name.replace(":", "_"), sorted(sample.labels.items()), sample.value) for sample in samples)
        for samples in ([sample for family in families for sample in family.samples] for families in (plain, strict))
    )
    assert one == other


def test_ten_thousand_features_and_users_make_no_more_series_than_one() -> None:
    traffic = Traffic(["search"])
    closed = receipts.settled()
    for number in range(10_000):
        who = Attribution(feature=f"feature {number}", user=f"user {number}", team=f"t{number}", tier=f"t{number}")
        traffic.settled(msgspec.structs.replace(closed, attribution=who))
    many = [sample for family in traffic.collect() for sample in family.samples]
    alone = Traffic(["search"])
    alone.settled(msgspec.structs.replace(closed, attribution=Attribution(feature="another")))
    assert len(many) == len([sample for family in alone.collect() for sample in family.samples])


def test_every_name_of_vllm_is_one_that_it_documents() -> None:
    """Those of its production metrics that stand in its own dashboard or are asked by KEDA and autoscalers."""
    documented = {
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
        "vllm:prompt_tokens",
        "vllm:generation_tokens",
        "vllm:request_success",
        "vllm:request_prompt_tokens",
        "vllm:request_generation_tokens",
        "vllm:time_to_first_token_seconds",
        "vllm:request_time_per_output_token_seconds",
        "vllm:request_queue_time_seconds",
        "vllm:e2e_request_latency_seconds",
    }
    metrics = Metrics(Traffic([]), StandInGateway(), lambda: [ACCOUNT], lambda: None)
    text = TestClient(Starlette(routes=[metrics.route])).get("/metrics").text
    assert {
        name for family in text_string_to_metric_families(text) if (name := family.name).startswith("vllm:")
    } == documented


def test_what_nobody_knows_is_no_zero() -> None:
    found = scrape([receipts.unknown()])
    assert not [name for name in found if name.startswith(("millicent_energy", "millicent_accelerator"))]


def test_a_repriced_book_is_not_spent_twice() -> None:
    closed = receipts.settled()
    book = msgspec.structs.replace(closed.lines[0], book="january", amount=Money(9_000_000))
    found = scrape([msgspec.structs.replace(closed, lines=(*closed.lines, book))])
    assert sum(value for name, value in found.items() if name.startswith("millicent_cost_dollars_total")) == 0.000025


@given(st.lists(st.text(max_size=9), max_size=20))
def test_labels_are_bounded_whatever_callers_send(names: list[str]) -> None:
    told = [msgspec.structs.replace(receipts.settled(), attribution=Attribution(feature=name)) for name in names]
    found = scrape(told)
    assert sum(name.startswith("millicent_requests_total") for name in found) <= 3
    assert sum(value for name, value in found.items() if name.startswith("millicent_requests_total")) == len(names)


@given(st.lists(st.integers(0, 10_000_000), min_size=1, max_size=30))
def test_buckets_hold_what_is_at_most_their_bound(times_ms: list[int]) -> None:
    told = [
        msgspec.structs.replace(receipts.settled(), timing=Timing(total_ns=time_ms * NS_PER_MS)) for time_ms in times_ms
    ]
    found = scrape(told)
    name = "vllm:e2e_request_latency_seconds"
    for bound in ("0.005", "1", "160"):
        held = sum(time_ms <= Decimal(bound) * 1000 for time_ms in times_ms)
        assert found[f"{name}_bucket le={bound} model_name=tiny"] == held
    assert found[f"{name}_bucket le=+Inf model_name=tiny"] == len(times_ms)
    assert found[f"{name}_sum model_name=tiny"] == sum(times_ms) / 1000


def test_what_runs_now_is_told() -> None:
    found = scrape([])
    assert found["vllm:num_requests_running model_name=tiny"] == 2
    assert found["vllm:num_requests_waiting model_name=tiny"] == 1
    assert found["millicent_deployment_available model=tiny placement=this-machine"] == 1
    assert found["millicent_deployment_available model=tiny placement=far"] == 0
    assert found["millicent_ready"] == 1
    assert scrape([], trouble="the disk is full")["millicent_ready"] == 0


def test_device_seconds_are_the_accounts() -> None:
    found = scrape([])
    seconds = {
        name.rsplit("=", 1)[1]: value for name, value in found.items() if name.startswith("millicent_device_seconds")
    }
    assert seconds == {"serving": 2, "overhead": 4, "lost": 6, "idle": 7180, "down": 8}
