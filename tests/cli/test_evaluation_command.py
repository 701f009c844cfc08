"""What `eval` makes of answers that were graded before."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from millicent.cli import run
from millicent.routing.graded_sets import Graded, read_set


def test_percentiles_of_compared_models_are_by_nearest_rank_as_everywhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "set.jsonl"
    prompts.write_text("".join(f'{{"prompt": "{number}?", "expect": "yes"}}\n' for number in range(20)))
    rows = [
        Graded(item.id, "small", True, "0.001", None, latency_ms, None)
        for latency_ms, item in enumerate(read_set(prompts, None), start=1)
    ]
    prompts.with_suffix(".results.jsonl").write_bytes(b"".join(msgspec.json.encode(row) + b"\n" for row in rows))
    assert run(["eval", str(prompts), "--model", "small", "--json"]) == 0
    [small] = json.loads(capsys.readouterr().out)["data"]
    assert small["latency_ms"] == {"p50": 10, "p95": 19}
    assert (small["quality"], small["cost_per_useful_usd"]) == (1, "0.001")
