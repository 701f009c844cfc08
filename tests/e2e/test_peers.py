"""Other people's servers behind ours. They live in an environment of their own: `make peers`."""

from __future__ import annotations

import os
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest

from support.live import LiveServer, live_server
from support.ports import free_port
from support.tiny_models import TinyLlama, write_tiny_model

HOME = Path(os.environ.get("MILLICENT_PEERS", Path(__file__).parents[2] / ".peers"))
PYTHON = str(HOME / "bin" / "python")
pytestmark = pytest.mark.skipif(
    not (HOME / "stamp").exists(), reason=f"no environment with other servers in {HOME}: `make peers`"
)

LLAMA_CPP = """
import sys, time, xllamacpp
parameters = xllamacpp.CommonParams()
parameters.model.path, parameters.port = sys.argv[1], int(sys.argv[2])
parameters.hostnames, parameters.n_parallel, parameters.n_ctx = ["127.0.0.1"], 2, 1024
parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
server = xllamacpp.Server(parameters)
time.sleep(10**9)
"""
HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "What is the capital of Japan?"}], "model": "far"}


@contextmanager
def behind_ours(
    command: list[str], name: str, model: str, port: int, folder: Path, alive: str = "/v1/models"
) -> Iterator[LiveServer]:
    """A gateway in front of the server that `command` starts."""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    with (folder / "peer.txt").open("wb") as output:
        peer = subprocess.Popen(command, env=env, stdout=output, stderr=subprocess.STDOUT)
    try:
        _wait(f"http://127.0.0.1:{port}{alive}", peer, folder / "peer.txt")
        config = (
            f'[placements.peer]\nkind = "rented"\nusd_per_hour = 1\nserver = "{name}"\n'
            f'base_url = "http://127.0.0.1:{port}/v1"\n[models.far]\nplacement = "peer"\nmodel = "{model}"\n'
        )
        with live_server(folder / "home", [], config) as server:
            yield server
    finally:
        peer.kill()
        peer.wait(60)


def _wait(url: str, peer: subprocess.Popen[bytes], output: Path) -> None:
    deadline = time.monotonic() + 120
    while True:
        assert peer.poll() is None, output.read_text()
        assert time.monotonic() < deadline, output.read_text()
        try:
            urllib.request.urlopen(url, timeout=5).close()
        except OSError:
            time.sleep(0.2)
        else:
            return


def check(server: LiveServer, **more: Any) -> str:
    """Whole and streamed, with usage reported and a receipt; returns the text."""
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as client:
        raw = client.chat.completions.with_raw_response.create(**HELLO, max_tokens=8, **more)
        whole = raw.parse()
        _, receipt = server.get(f"/v1/receipts/{raw.headers['x-millicent-receipt']}")
        assert receipt["status"] == "succeeded"
        assert {count["provenance"] for count in receipt["usage"].values()} == {"reported"}
        assert receipt["accelerator"]["provenance"] == "estimated"
        assert float(receipt["total_usd"]) > 0
        usage = None
        for chunk in client.chat.completions.create(
            **HELLO, max_tokens=8, stream=True, stream_options={"include_usage": True}, **more
        ):
            usage = chunk.usage or usage
        assert usage is not None
        assert whole.usage is not None
        assert usage.prompt_tokens == whole.usage.prompt_tokens
        assert 1 <= usage.completion_tokens <= 8
        return whole.choices[0].message.content or ""


@pytest.mark.model
def test_llama_cpp_s_server(smollm2_path: Path, tmp_path: Path) -> None:
    port = free_port()
    command = [PYTHON, "-c", LLAMA_CPP, str(smollm2_path), str(port)]
    with behind_ours(command, "llama.cpp", "smollm2", port, tmp_path) as server:
        assert "Tokyo" in check(server, temperature=0, extra_body={"top_k": 5, "repetition_penalty": 1.01})
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as client:
            with pytest.raises(openai.BadRequestError) as caught:
                client.chat.completions.create(model="far", messages=[{"role": "user", "content": "x " * 3000}])
            assert caught.value.code == "context_length_exceeded"
            asked: Any = {"model": "far", "temperature": 0, "max_tokens": 4}
            prompts = ["The capital of France is", "One, two, three,"]
            several = client.completions.create(prompt=prompts, **asked)
            alone = [client.completions.create(prompt=prompt, **asked).choices[0].text for prompt in prompts]
            assert [choice.text for choice in several.choices] == alone
            assert several.usage is not None
            assert several.usage.completion_tokens == 8
            two = client.chat.completions.create(**HELLO, n=2, max_tokens=3)
            assert two.usage is not None
            assert two.usage.completion_tokens == 6
            texts = ["", ""]
            for chunk in client.completions.create(prompt=prompts, **asked, stream=True):
                for choice in chunk.choices:
                    texts[choice.index] += choice.text
            assert texts == alone
            schema = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}
            form = {"type": "json_schema", "json_schema": {"name": "person", "schema": schema}}
            answer = client.chat.completions.create(**HELLO, max_tokens=40, temperature=0, response_format=form)  # type: ignore[call-overload]
            assert '"age"' in answer.choices[0].message.content
            several = client.completions.create(
                model="far", prompt="Once", max_tokens=4, n=2, logprobs=1, temperature=0
            )
            assert [choice.index for choice in several.choices] == [0, 1]
            assert all(choice.logprobs is not None for choice in several.choices)


def test_mlx_lm_s_server(tmp_path: Path) -> None:
    tiny = write_tiny_model(tmp_path / "tiny", TinyLlama())
    port = free_port()
    command = [PYTHON, "-m", "mlx_lm", "server", "--model", str(tiny), "--port", str(port)]
    with behind_ours(command, "mlx", "default_model", port, tmp_path) as server:
        check(server, temperature=0, extra_body={"top_k": 5})


def test_transformers_serve(tmp_path: Path) -> None:
    tiny = write_tiny_model(tmp_path / "tiny", TinyLlama())
    port = free_port()
    started = "from transformers.cli.transformers import main; main()"
    command = [PYTHON, "-c", started, "serve", str(tiny), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    # Its list of models fails for one that lies in a folder.
    with behind_ours(command, "transformers", str(tiny), port, tmp_path, "/health") as server:
        check(server, temperature=0, seed=3, stop=["never"])
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as client:
            with pytest.raises(openai.BadRequestError) as caught:
                client.chat.completions.create(**HELLO, max_tokens=8, n=2)
            assert caught.value.param == "n"
            completed = client.completions.create(model="far", prompt="Once", max_tokens=4, temperature=0)
            assert completed.usage is not None
            assert completed.usage.completion_tokens <= 4
