"""Whatever is killed, no receipt is missing, doubled or left open, and service comes back."""

import json
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from support.live import LiveServer, live_server
from support.tiny_models import TinyLlama, write_tiny_model
from support.waiting import until

STREAMS = 8
LONG = {"model": "tiny", "prompt": "once upon", "max_tokens": 100_000, "ignore_eos": True, "stream": True}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[LiveServer]:
    tiny = write_tiny_model(tmp_path / "tiny", TinyLlama(context_tokens=8192))
    with live_server(tmp_path / "home", [str(tiny)]) as live:
        yield live


class Streams:
    """Streams that are being read in threads: what each saw, and under which receipt."""

    def __init__(self, server: LiveServer) -> None:
        self._server = server
        self.receipts: list[str] = []
        self.errors: list[dict[str, Any]] = []
        self.cut_off = 0
        self._started = threading.Semaphore(0)
        self._threads = [threading.Thread(target=self._read, daemon=True) for _ in range(STREAMS)]
        for thread in self._threads:
            thread.start()
        for _ in self._threads:
            assert self._started.acquire(timeout=60)

    def join(self) -> None:
        for thread in self._threads:
            thread.join(60)
            assert not thread.is_alive()

    def _read(self) -> None:
        begun = False
        try:
            with httpx.stream("POST", f"{self._server.url}/v1/completions", json=LONG, timeout=120) as response:
                assert response.status_code == 200
                self.receipts.append(response.headers["x-millicent-receipt"])
                for line in response.iter_lines():
                    if line.startswith("data: {"):
                        event = json.loads(line.removeprefix("data: "))
                        if "error" in event:
                            self.errors.append(event["error"])
                        elif not begun:
                            begun = True
                            self._started.release()
        except httpx.TransportError:
            self.cut_off += 1


def answers(server: LiveServer) -> None:
    body = json.dumps({"model": "tiny", "prompt": "hello", "max_tokens": 4, "ignore_eos": True}).encode()
    status, answer, _ = server.request("POST", "/v1/completions", body)
    assert status == 200, answer
    assert answer["usage"]["completion_tokens"] == 4


def check_settled(server: LiveServer, receipt_ids: list[str], status: str) -> None:
    receipts = server.receipts()
    ids = [one["id"] for one in receipts]
    assert len(ids) == len(set(ids))
    by_id = {one["id"]: one for one in receipts}
    for receipt_id in receipt_ids:
        assert by_id[receipt_id]["status"] == status, by_id[receipt_id]
        assert by_id[receipt_id]["settled_at"] is not None
    assert all(one["status"] is not None for one in receipts)
    server.check_accounts()


def test_an_engine_killed_during_streams_costs_them_a_retryable_error_and_nothing_else(server: LiveServer) -> None:
    streams = Streams(server)
    os.kill(server.engine_pid(), signal.SIGKILL)
    streams.join()
    assert [error["code"] for error in streams.errors] == ["engine_crashed"] * STREAMS
    server.wait_ready()
    check_settled(server, streams.receipts, "interrupted")
    answers(server)
    server.check_accounts()


def test_readiness_says_so_while_the_engine_is_down(server: LiveServer) -> None:
    pid = server.engine_pid()
    os.kill(pid, signal.SIGKILL)
    until(lambda: server.get("/ready")[0] == 503, "never reported as not ready")
    assert server.get("/health")[0] == 200
    server.wait_ready()
    assert server.engine_pid() != pid


def test_a_gateway_killed_during_streams_leaves_no_receipt_open(server: LiveServer) -> None:
    streams = Streams(server)
    engine_pid = server.engine_pid()
    server.kill()
    streams.join()
    assert streams.cut_off == STREAMS
    server.start()
    check_settled(server, streams.receipts, "interrupted")
    assert len(server.receipts()) == STREAMS
    answers(server)
    until(lambda: not _alive(engine_pid), "the old engine outlived its gateway")


def test_engine_and_gateway_killed_one_after_the_other_still_settle_everything(server: LiveServer) -> None:
    streams = Streams(server)
    os.kill(server.engine_pid(), signal.SIGKILL)
    server.kill()
    streams.join()
    server.start()
    check_settled(server, streams.receipts, "interrupted")
    answers(server)


def test_a_polite_stop_settles_what_runs(tmp_path: Path) -> None:
    tiny = write_tiny_model(tmp_path / "tiny", TinyLlama(context_tokens=8192))
    config = "[server]\nshutdown_grace_s = 0\n"
    with live_server(tmp_path / "home", [str(tiny)], config) as server:
        streams = Streams(server)
        assert server.stop() == 0
        streams.join()
        server.start()
        check_settled(server, streams.receipts, "cancelled")


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"
