"""Pulling `org/name`, against a small hub on loopback that speaks as much of the protocol as a download needs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from millicent.core.errors import ModelError, ModelNotFound
from millicent.hub import list_installed, pull
from millicent.hub.fetch import choose_files
from support.http_server import Handler, http_server

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPOSITORIES = {
    "org/whole": {
        "config.json": b"{}",
        "tokenizer.json": b'{"a": 1}',
        "model.safetensors": b"w" * 5000,
        "pytorch_model.bin": b"never",
        "onnx/model.onnx": b"never",
        "README.md": b"never",
    },
    "org/ggufs": {"a-Q4_K_M.gguf": b"four", "a-Q8_0.gguf": b"eight"},
}


class FakeHub(Handler):
    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = self.path.partition("?")[0].strip("/")
        headers: dict[str, str] = {}
        body, status = b"{}", 404
        for name, files in REPOSITORIES.items():
            if path.startswith(f"api/models/{name}"):
                siblings = [{"rfilename": file, "size": len(data)} for file, data in files.items()]
                body, status = json.dumps({"id": name, "sha": COMMIT, "siblings": siblings}).encode(), 200
                if "/tree/" in path:
                    tree = [
                        {"type": "file", "path": file, "size": len(data), "oid": "0" * 40}
                        for file, data in files.items()
                    ]
                    body = json.dumps(tree).encode()
            prefix = f"{name}/resolve/{COMMIT}/"
            if path.startswith(prefix) and path.removeprefix(prefix) in files:
                body, status = files[path.removeprefix(prefix)], 200
                headers["ETag"] = f'"{hashlib.sha1(body).hexdigest()}"'
        if status == 404:
            headers["X-Error-Code"] = "RepoNotFound"
        headers |= {"X-Repo-Commit": COMMIT, "Content-Type": "application/json"}
        self.send(status, body, headers)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    with http_server(FakeHub) as endpoint:
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        yield endpoint


def test_a_repository_comes_as_safetensors_and_configuration(hub: str, tmp_path: Path) -> None:
    model = pull("org/whole", tmp_path / "cache")
    assert sorted(path.name for path in model.path.iterdir()) == [
        "config.json",
        "millicent.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert (model.path / "model.safetensors").read_bytes() == b"w" * 5000
    assert (model.name, model.source) == ("org/whole", f"huggingface:org/whole@{COMMIT}")
    assert list_installed(tmp_path / "cache") == [model]


def test_one_gguf_of_several_is_named_by_a_part_of_its_name(hub: str, tmp_path: Path) -> None:
    model = pull("org/ggufs:q4_k_m", tmp_path / "cache")
    assert model.path.read_bytes() == b"four"
    with pytest.raises(ModelError, match="org/ggufs:Q4_K_M"):
        pull("org/ggufs", tmp_path / "cache")


def test_a_repository_that_is_not_there_is_not_found(hub: str, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="not on the Hugging Face hub"):
        pull("org/none", tmp_path / "cache")


def test_a_hub_that_cannot_be_reached_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ModelError, match="cannot be downloaded from the Hugging Face hub") as caught:
        pull("org/whole", tmp_path)
    assert "\n" not in caught.value.message


def test_a_repository_without_usable_weights_is_refused() -> None:
    with pytest.raises(ModelError, match="holds no such"):
        choose_files("org/x", ["model.onnx", "config.json"], "")
