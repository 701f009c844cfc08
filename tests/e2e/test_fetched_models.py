"""Models that are fetched while the server runs can be asked without a restart."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from millicent import app_models
from millicent.app_models import FetchedModels
from millicent.hub import list_installed, store
from support.live import LiveServer, live_server
from support.tiny_models import TinyLlama, write_tiny_model
from support.waiting import until


def install(cache: Path, name: str) -> None:
    """As `millicent pull` leaves it: by one rename, when it is whole."""
    made = write_tiny_model(cache / "scratch", TinyLlama())
    store._seal(made, store.Manifest(name, "a test", "", store._describe(made)))
    (cache / "models").mkdir(exist_ok=True)
    made.rename(cache / "models" / name.replace("/", "--"))


def post(server: LiveServer, path: str, **body: Any) -> tuple[int, Any]:
    status, answer, _ = server.request("POST", path, json.dumps(body).encode())
    return status, answer


def ask(server: LiveServer, model: str) -> int:
    return post(server, "/api/generate", model=model, prompt="hi", stream=False, options={"num_predict": 1})[0]


def tags(server: LiveServer) -> list[str]:
    return [model["name"] for model in server.get("/api/tags")[1]["models"]]


def test_what_is_fetched_can_be_asked_by_whoever_may_and_only_an_admin_fetches(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    install(cache, "org/before")
    tiny = write_tiny_model(tmp_path / "tiny", TinyLlama())
    with live_server(tmp_path / "home", [str(tiny)], env={"MILLICENT_CACHE": str(cache)}) as server:
        assert "org/before" not in tags(server)  # nobody asked for it when the server was started
        assert ask(server, "org/before") == 404
        assert post(server, "/api/pull", model="org/before", stream=False) == (200, {"status": "success"})
        assert ask(server, "org/before") == 200
        assert post(server, "/v1/completions", model="org/before", prompt="hi", max_tokens=1)[0] == 200

        install(cache, "org/later")  # by `millicent pull`, say
        assert until(lambda: "org/later" in tags(server), "never offered")
        assert ask(server, "org/later") == 200

        boss = server.command("keys", "create", "boss", "--scope", "admin")
        server.token = server.command("keys", "create", "--model", "org/before")
        assert tags(server) == ["org/before"]
        assert (ask(server, "org/before"), ask(server, "org/later")) == (200, 403)
        assert post(server, "/api/pull", model="org/before")[0] == 403
        server.token = boss
        server.check_accounts()


def test_a_server_without_an_engine_refuses_to_fetch_what_it_could_not_run(tmp_path: Path) -> None:
    config = '[placements.far]\nkind = "api"\nbase_url = "http://127.0.0.1:9/v1"\n[models.m]\nplacement = "far"\n'
    with live_server(tmp_path, [], config) as server:
        status, told = post(server, "/api/pull", model="smollm2:135m")
        assert (status, told["param"]) == (400, "model")


def test_what_could_not_be_looked_at_is_looked_at_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    pipeline = Mock(models=tuple)
    fetched = FetchedModels(cache, Mock(), pipeline, "local")
    install(cache, "org/new")
    with monkeypatch.context() as broken:
        broken.setattr(app_models, "list_installed", Mock(side_effect=OSError("busy")))
        with pytest.raises(OSError, match="busy"):
            asyncio.run(fetched.look())
    assert pipeline.offer.call_count == 0
    assert [model.name for model in list_installed(cache)] == ["org/new"]
    asyncio.run(fetched.look())
    assert pipeline.offer.call_args.args[0] == "org/new"
