"""A live Millicent in a process of its own, with a home of its own."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from support.ports import free_port
from support.waiting import until

START_LIMIT_S = 120


class LiveServer:
    """`start` waits until it can answer; `kill` is a power cut; `stop` is polite."""

    def __init__(self, home: Path, models: list[str], config: str = "", env: Mapping[str, str] | None = None) -> None:
        self.home = home
        self.models = models
        self.port = free_port()
        self.process: subprocess.Popen[bytes] | None = None
        self.token: str | None = None  # sent with every request, once the server has keys
        self._env = dict(env or {})
        home.mkdir(parents=True, exist_ok=True)
        (home / "millicent.toml").write_text(config)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def output(self) -> str:
        return (self.home / "output.txt").read_text()

    def start(self) -> None:
        command = [sys.executable, "-m", "millicent", "serve", *self.models, "--port", str(self.port)]
        env = os.environ | {"MILLICENT_HOME": str(self.home)} | self._env
        with (self.home / "output.txt").open("ab") as output:
            self.process = subprocess.Popen(
                command, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
            )
        self.wait_ready()

    def command(self, *arguments: str) -> str:
        """What the command line prints, run on this server's home."""
        env = os.environ | {"MILLICENT_HOME": str(self.home)} | self._env
        done = subprocess.run(
            [sys.executable, "-m", "millicent", *arguments], env=env, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    def wait_ready(self) -> None:
        deadline = time.monotonic() + START_LIMIT_S
        while time.monotonic() < deadline:
            assert self.process is not None
            assert self.process.poll() is None, f"the server ended: {self.output}"
            try:
                if self.get("/ready")[0] == 200:
                    return
            except OSError:
                pass
            time.sleep(0.05)
        raise AssertionError(f"not ready after {START_LIMIT_S} s: {self.output}")

    def stop(self) -> int:
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(60)
        self.process = None
        return code

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait(60)
        self.process = None

    def engine_pid(self) -> int:
        pid = self.get("/ready")[1]["engines"][0]["pid"]
        assert isinstance(pid, int)
        return pid

    @contextmanager
    def engine_paused(self) -> Iterator[None]:
        """What is asked meanwhile waits, for as long as the test likes."""
        pid = self.engine_pid()
        os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(pid, signal.SIGCONT)

    def request(
        self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> tuple[int, Any, Mapping[str, str]]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        try:
            ours = {} if self.token is None else {"Authorization": f"Bearer {self.token}"}
            connection.request(method, path, body, ours | dict(headers or {}))
            response = connection.getresponse()
            content = response.read()
            return response.status, json.loads(content) if content else None, dict(response.headers)
        finally:
            connection.close()

    def get(self, path: str) -> tuple[int, Any]:
        status, body, _ = self.request("GET", path)
        return status, body

    def receipts(self, query: str = "") -> list[dict[str, Any]]:
        """All of them, over all pages."""
        found: list[dict[str, Any]] = []
        after = ""
        while True:
            status, page = self.get(f"/v1/receipts?limit=200{query}{after}")
            assert status == 200, page
            found += page["data"]
            if not page["has_more"]:
                return found
            after = f"&after={page['next']}"

    def settled(self, receipt_id: str) -> dict[str, Any]:
        """The receipt, once it is closed."""

        def closed() -> dict[str, Any] | None:
            status, receipt = self.get(f"/v1/receipts/{receipt_id}")
            assert status == 200, receipt
            assert isinstance(receipt, dict)
            return receipt if receipt["status"] is not None else None

        return until(closed, "never settled")

    def check_accounts(self) -> None:
        """Every hour balances, and the hours' serving time is what the receipts say, to the nanosecond."""
        status, accounts = self.get("/v1/accounts")
        assert status == 200, accounts
        for hour in accounts["data"]:
            spent = sum(hour[f"{kind}_ns"] for kind in ("serving", "overhead", "lost", "idle", "down"))
            assert spent == hour["wall_ns"] * hour["accelerators"], hour
            assert hour["idle_ns"] >= 0, hour
        receipts = self.receipts()
        charged_ns = sum(round(one["accelerator"]["seconds"] * 1e9) for one in receipts)
        assert charged_ns == sum(hour["serving_ns"] for hour in accounts["data"])


@contextmanager
def live_server(
    home: Path, models: list[str], config: str = "", env: Mapping[str, str] | None = None
) -> Iterator[LiveServer]:
    server = LiveServer(home, models, config, env)
    try:
        server.start()
        yield server
    finally:
        if server.process is not None:
            server.kill()
