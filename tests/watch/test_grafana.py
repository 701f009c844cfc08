"""The Grafana dashboard asks for nothing that `/metrics` doesn't show, by names and by labels."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from starlette.applications import Starlette
from starlette.testclient import TestClient

from millicent.watch.metrics import Metrics, Traffic
from source_tree import ROOT
from support import receipts
from support.watched_gateway import ACCOUNT, StandInGateway

DASHBOARD: dict[str, Any] = json.loads((ROOT / "docs" / "grafana" / "millicent.json").read_text())
_SELECTOR = re.compile(r"([a-z_:]+:[a-z0-9_]+|millicent_[a-z_]+)(?:\{([^}]*)\})?")
_LABEL = re.compile(r"(\w+)=~?\"")


def shown() -> dict[str, set[str]]:
    """Every sample's name with its labels."""
    traffic = Traffic(["search"])
    traffic.settled(receipts.settled())
    metrics = Metrics(traffic, StandInGateway(), lambda: [ACCOUNT], lambda: None)
    text = TestClient(Starlette(routes=[metrics.route])).get("/metrics").text
    families: list[Metric] = list(text_string_to_metric_families(text))
    found: dict[str, set[str]] = {}
    for family in families:
        # A counter that nothing was counted in has no sample, and its name in the text.
        found.setdefault(family.name if family.type != "counter" else f"{family.name}_total", set())
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def expressions() -> list[str]:
    panels = [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", [])]
    variables = [each["definition"] for each in DASHBOARD["templating"]["list"] if each["type"] == "query"]
    return panels + variables


@pytest.mark.parametrize("expression", expressions())
def test_every_query_of_the_dashboard_asks_for_what_metrics_show(expression: str) -> None:
    known = shown()
    selectors = _SELECTOR.findall(expression)
    assert selectors, f"no metric in {expression}"
    for name, labels in selectors:
        assert name in known, f"/metrics has no {name}"
        if known[name]:
            assert set(_LABEL.findall(labels)) <= known[name], f"{name} has not all labels of {labels}"
    grouped = {label.strip() for by in re.findall(r"by \(([^)]*)\)", expression) for label in by.split(",")}
    for name, _ in selectors:
        if known[name]:
            assert grouped <= known[name], f"{name} has no labels {grouped - known[name]}"


def test_every_panel_has_a_title_a_unit_and_a_place_of_its_own() -> None:
    places = [tuple(panel["gridPos"][side] for side in "xy") for panel in DASHBOARD["panels"]]
    assert len(places) == len(set(places))
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(places)
    for panel in DASHBOARD["panels"]:
        assert panel["title"]
        assert panel["type"] == "row" or panel["fieldConfig"]["defaults"]["unit"]
