"""Clients of every kind against a live server, in an environment of their own: `make clients` makes it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.live import LiveServer, live_server
from support.tiny_models import TinyLlama, write_tiny_model

SCRIPTS = Path(__file__).parent / "scripts"
HOME = Path(os.environ.get("MILLICENT_CLIENTS", Path(__file__).parents[2] / ".clients"))
STAMP = HOME / "stamp"
pytestmark = pytest.mark.skipif(not STAMP.exists(), reason=f"no environment with clients in {HOME}: `make clients`")

TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Looks something up.",
        "parameters": {
            "type": "object",
            "properties": {"times": {"type": "integer", "enum": [1, 2, 3]}},
            "required": ["times"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    folder = tmp_path_factory.mktemp("clients")
    tiny = write_tiny_model(folder / "tiny", TinyLlama(context_tokens=8192))
    with live_server(folder / "home", [str(tiny)]) as live:
        yield live


@pytest.mark.parametrize("script", sorted(SCRIPTS.iterdir()), ids=lambda script: script.name)
def test_a_client_chats_streams_calls_tools_and_sees_errors_and_its_receipt(
    script: Path, server: LiveServer, tmp_path: Path
) -> None:
    before = len(server.get("/v1/receipts?limit=100")[1]["data"])
    if script.suffix == ".mjs":
        # JavaScript finds its packages beside the script, and nowhere else.
        (tmp_path / "node_modules").symlink_to(HOME / "node_modules")
        command = [str(HOME / "bin" / "node"), str(shutil.copy(script, tmp_path))]
    else:
        command = [str(HOME / "bin" / "python"), str(script)]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env |= {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "NO_PROXY": "127.0.0.1"}
    command += [server.url, json.dumps(TOOL)]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    shown = json.loads(done.stdout.splitlines()[-1])
    receipts = server.get("/v1/receipts?limit=100")[1]["data"]
    assert len(receipts) >= before + 2
    if shown:
        _, receipt = server.get(f"/v1/receipts/{shown['receipt']}")
        assert receipt["status"] == "succeeded"
        assert shown["cost"] == pytest.approx(float(receipt["total_usd"]))
