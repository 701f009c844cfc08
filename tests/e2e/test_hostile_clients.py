"""Clients that mean no good, for a moment (`bench/hostile.py` goes on for a minute), and what is left afterwards."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.live import LiveServer, live_server
from support.tiny_models import TinyLlama, write_tiny_model

BENCH = Path(__file__).parents[2] / "bench" / "hostile.py"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    folder = tmp_path_factory.mktemp("hostile")
    tiny = write_tiny_model(folder / "tiny", TinyLlama(context_tokens=8192))
    with live_server(folder / "home", [str(tiny)], '[engine]\ndtype = "fp32"\n') as live:
        yield live


def test_a_normal_request_is_answered_as_before_and_no_kv_block_is_left_held(server: LiveServer) -> None:
    log = server.home / "logs" / "engine-cpu.log"
    command = [sys.executable, str(BENCH), "--url", server.url, "--model", "tiny", "--log", str(log)]
    done = subprocess.run([*command, "--rate", "60", "--seconds", "2"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert sum(found["acts"].values()) == 120
    assert len(found["acts"]) == 8
    assert found["statuses"]["400"] > 0
    assert server.get("/ready")[0] == 200
    server.check_accounts()
