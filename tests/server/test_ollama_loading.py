"""Loading and unloading through Ollama's addresses: who may, what is done, and what is said."""

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import pytest

from millicent.control.access import Caller
from millicent.control.keys import ApiKey, Scope
from millicent.core.clock import ManualClock
from millicent.core.errors import Unavailable
from millicent.server.config import ServerConfig
from millicent.server.inference import OLLAMA_CHAT, OLLAMA_GENERATE
from millicent.server.ollama_loading import LoadingEndpoint
from millicent.wire import ollama_requests

PATHS = {ollama_requests.CHAT: "/api/chat", ollama_requests.GENERATE: "/api/generate"}
DIALECTS = {ollama_requests.CHAT: OLLAMA_CHAT, ollama_requests.GENERATE: OLLAMA_GENERATE}
ANYBODY = Caller()
KINDS = pytest.mark.parametrize("kind", PATHS)


class Loader:
    """Has the models `here:1b` and `damaged`."""

    def __init__(self) -> None:
        self.done: list[tuple[str, str]] = []

    def models(self) -> tuple[str, ...]:
        return ("here:1b", "damaged")

    async def load(self, name: str) -> None:
        if name == "damaged":
            raise Unavailable("damaged: the file ends early", retry_after_s=7)
        self.done.append(("load", name))

    async def unload(self, name: str) -> None:
        self.done.append(("unload", name))


def key(scope: Scope, *models: str) -> Caller:
    made = ApiKey(id="mk_1", scope=scope, secret_sha256=b"", created_at_ns=0, models=models or None)
    return Caller(made)


def post(
    kind: str, body: dict[str, Any] | bytes, loader: Loader | None, caller: Caller = ANYBODY
) -> tuple[int, dict[bytes, bytes], bytes]:
    """`far` is served elsewhere, and `cheapest` is a policy."""
    pipeline: Any = SimpleNamespace(models=lambda: ("here:1b", "damaged", "far", "cheapest"))
    limiter: Any = SimpleNamespace(allowances=lambda _: {})
    unused: Any = None
    ids: Any = SimpleNamespace(new=lambda _: "rcpt_1")
    endpoint = LoadingEndpoint(
        kind, loader, DIALECTS[kind], pipeline, limiter, unused, unused, unused, ids,
        ManualClock(), ServerConfig(max_body_mb=1),
    )  # fmt: skip
    sent: list[Any] = []

    async def receive() -> Any:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return {"type": "http.request", "body": content, "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": PATHS[kind], "headers": [], "millicent.caller": caller}
    asyncio.run(endpoint(scope, receive, send))
    start, end = sent
    return start["status"], dict(start["headers"]), end["body"]


@KINDS
def test_a_load_is_a_line_or_one_whole_answer(kind: str) -> None:
    loader = Loader()
    status, headers, streamed = post(kind, {"model": "here"}, loader)
    assert (status, headers[b"content-type"], streamed[-1:]) == (200, b"application/x-ndjson", b"\n")
    status, headers, whole = post(kind, {"model": "here:1b", "stream": False}, loader)
    assert (status, headers[b"content-type"]) == (200, b"application/json")
    assert json.loads(streamed) == json.loads(whole)
    assert json.loads(whole)["done_reason"] == "load"
    assert json.loads(whole)["model"] == "here:1b"
    assert b"x-millicent-receipt" not in headers
    assert loader.done == [("load", "here:1b")] * 2


@KINDS
def test_only_who_administers_unloads(kind: str) -> None:
    loader = Loader()
    body = {"model": "here", "keep_alive": 0}
    status, _, told = post(kind, body, loader, key(Scope.CLIENT))
    assert (status, json.loads(told)["code"], loader.done) == (403, "scope", [])
    assert "admin" in json.loads(told)["error"]
    assert post(kind, {"model": "here"}, loader, key(Scope.CLIENT))[0] == 200
    for caller in (key(Scope.ADMIN), Caller()):
        status, _, told = post(kind, body, loader, caller)
        assert (status, json.loads(told)["done_reason"]) == (200, "unload")
    assert loader.done == [("load", "here:1b"), ("unload", "here:1b"), ("unload", "here:1b")]


@KINDS
@pytest.mark.parametrize("keep_alive", [0, "5m"])
def test_a_load_is_refused_as_a_request_would_be(kind: str, keep_alive: Any) -> None:
    loader = Loader()
    limited = key(Scope.ADMIN, "far")
    status, _, told = post(kind, {"model": "here", "keep_alive": keep_alive}, loader, limited)
    assert (status, json.loads(told)["code"]) == (403, "model_not_allowed")
    status, _, told = post(kind, {"model": "nix", "keep_alive": keep_alive}, loader)
    assert (status, json.loads(told)["code"], json.loads(told)["param"]) == (404, "model_not_found", "model")
    assert "nix" in json.loads(told)["error"]
    assert loader.done == []


@KINDS
@pytest.mark.parametrize("model", ["far", "cheapest"])
def test_what_runs_elsewhere_is_left_alone(kind: str, model: str) -> None:
    for loader in (Loader(), None):
        for keep_alive, reason in ((None, "load"), (0, "unload")):
            status, _, told = post(kind, {"model": model, "keep_alive": keep_alive}, loader)
            assert (status, json.loads(told)["done_reason"]) == (200, reason)
        assert loader is None or loader.done == []


@KINDS
def test_a_model_that_cannot_be_loaded_is_a_503_that_says_when_to_come_back(kind: str) -> None:
    status, headers, told = post(kind, {"model": "damaged"}, Loader())
    assert (status, headers[b"retry-after"]) == (503, b"7")
    assert json.loads(told)["error"] == "damaged: the file ends early"


@KINDS
def test_what_is_no_load_is_read_once_more_and_refused_by_its_decoder(kind: str) -> None:
    loader = Loader()
    said: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "prompt": "hi"}
    del said["prompt" if kind == ollama_requests.CHAT else "messages"]
    for body in (b"{", {"model": "here", "options": {"mirostat": 1}} | said):
        assert post(kind, body, loader)[0] == 400
    assert post(kind, b"x" * (2 << 20), loader)[0] == 413
    assert loader.done == []
