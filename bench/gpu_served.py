"""Section `http` of gpu.py: through the front door. Time to first token on an idle server, tokens/s with many clients,
what the receipts say a million tokens cost, whether the accounts add up, and whether the joules do."""

from __future__ import annotations

import asyncio
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpu_sections import Settings

    from millicent.engine.weights import ModelSpec

_RECEIPT = "X-Millicent-Receipt"


def measure(settings: Settings) -> None:
    from support.live import LiveServer

    with tempfile.TemporaryDirectory() as folder:
        model = write_model(Path(folder) / "random", settings)
        dtype = "fp32" if settings.rehearsal else "bf16"
        config = f"""
[engine]
device = "cuda:0"
dtype = "{dtype}"
max_sequences = {settings.sized(256, 2)}
step_tokens = {settings.sized(2048, 16)}
{"memory_gb = 0.05" if settings.rehearsal else ""}
{"calibrate = false" if settings.rehearsal else ""}
[placements.gpu]
kind = "rented"
usd_per_hour = {settings.usd_per_hour}
"""
        server = LiveServer(Path(folder) / "home", [str(model)], config)
        start = time.perf_counter()
        server.start()
        try:
            tell("from the start of the process to ready", time.perf_counter() - start, "s")
            asyncio.run(_through(settings, server.url))
        finally:
            server.stop()


def tell(figure: str, value: float, unit: str, **more: Any) -> None:
    from gpu_sections import tell as told

    told(figure, value, unit, **more)


def write_model(folder: Path, settings: Settings) -> Path:
    """Qwen3-0.6B's shape with random weights, and a tokenizer that has a word for each of its tokens."""
    import torch
    from safetensors.torch import save_file

    from support.random_weights import RandomCheckpoint
    from support.tiny_models import write_tiny_tokenizer

    shape = settings.shape("QWEN3_0_6B")
    folder.mkdir()
    _grow(folder / "tokenizer.json", write_tiny_tokenizer(folder), shape.vocabulary)
    (folder / "config.json").write_text(json.dumps(_config(shape)))
    checkpoint = RandomCheckpoint(shape, device=settings.device)
    tensors = {name: checkpoint.read(name, torch.bfloat16).cpu() for name in checkpoint.shapes}
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})
    return folder


def _grow(file: Path, have: int, wanted: int) -> None:
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    if wanted < have:  # a rehearsal's model has few tokens: the merges' are left out
        content["model"]["vocab"] = {word: index for word, index in vocabulary.items() if index < wanted}
        content["model"]["merges"] = []
    vocabulary.update((f"word{index}", index) for index in range(have, wanted))
    file.write_text(json.dumps(content))


def _config(shape: ModelSpec) -> dict[str, Any]:
    spec = asdict(shape)
    return {
        "model_type": spec["family"],
        "hidden_act": "silu",
        "hidden_size": spec["hidden"],
        "num_hidden_layers": spec["layers"],
        "num_attention_heads": spec["heads"],
        "num_key_value_heads": spec["kv_heads"],
        "head_dim": spec["head_dim"],
        "intermediate_size": spec["intermediate"],
        "vocab_size": spec["vocabulary"],
        "max_position_embeddings": spec["context_tokens"],
        "rms_norm_eps": spec["norm_eps"],
        "rope_theta": spec["rope_theta"],
        "tie_word_embeddings": spec["tied_embeddings"],
        "attention_bias": False,
        "eos_token_id": 2,
    }


async def _through(settings: Settings, url: str) -> None:
    import aiohttp

    draw = random.Random(1)
    vocabulary = settings.shape("QWEN3_0_6B").vocabulary
    prompt_tokens, answer_tokens = settings.sized(1024, 12), settings.sized(128, 3)
    clients, requests = settings.sized(128, 2), settings.sized(512, 3)

    def prompt() -> list[int]:
        return [draw.randrange(3, vocabulary) for _ in range(prompt_tokens)]

    energy = _energy(settings)
    before = energy()
    timeout, connector = aiohttp.ClientTimeout(total=300), aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(url, timeout=timeout, connector=connector) as session:
        async with session.get("/v1/models") as answer:
            model = next(each["id"] for each in (await answer.json())["data"] if each["id"] != "minilm")
        warm, counted = settings.sized(10, 0), settings.sized(30, 2)
        first = [await _first_token_s(session, model, prompt()) for _ in range(warm + counted)][warm:]
        tell("time to first token, 1k prompt, idle server, p50", statistics.median(first) * 1000, "ms", target=15)
        tell("time to first token, the slowest", max(first) * 1000, "ms")
        start = time.perf_counter()
        waiting = iter(range(requests))
        receipts: list[str] = []

        async def client() -> None:
            receipts.extend([await _answer(session, model, prompt(), answer_tokens) for _ in waiting])

        await asyncio.gather(*(client() for _ in range(clients)))
        wall_s = time.perf_counter() - start
        made = requests * answer_tokens
        tell(f"{clients} clients, {prompt_tokens} in {answer_tokens} out", made / wall_s, "output tokens/s")
        told = [await _get(session, f"/v1/receipts/{receipt}") for receipt in receipts]
        cost = sum(Decimal(receipt["total_usd"]) for receipt in told)
        paid = f"${settings.usd_per_hour} an hour"
        tell(f"cost per million output tokens at {paid}, by receipts", float(cost / made * 10**6), "USD")
        await _accounts(session)
        await _joules(session, before, energy())


async def _first_token_s(session: Any, model: str, prompt: list[int]) -> float:
    body = {"model": model, "prompt": prompt, "max_tokens": 4, "ignore_eos": True, "temperature": 0, "stream": True}
    await asyncio.sleep(0.02)  # so that the server is idle, the last commit done
    start = time.perf_counter()
    found = 0.0
    async with session.post("/v1/completions", json=body) as answer:
        assert answer.status == 200, await answer.text()
        async for line in answer.content:
            if not found and line.startswith(b"data: {") and json.loads(line[6:])["choices"]:
                found = time.perf_counter() - start
    return found


async def _answer(session: Any, model: str, prompt: list[int], tokens: int) -> str:
    body = {"model": model, "prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "temperature": 0}
    async with session.post("/v1/completions", json=body) as answer:
        found = await answer.json()
        assert answer.status == 200, found
        assert found["usage"]["completion_tokens"] == tokens
        return str(answer.headers[_RECEIPT])


async def _get(session: Any, path: str) -> Any:
    async with session.get(path) as answer:
        assert answer.status == 200, await answer.text()
        return await answer.json()


async def _accounts(session: Any) -> None:
    """For each device and hour the parts are the whole, as integers."""
    accounts = (await _get(session, "/v1/accounts"))["data"]
    parts = ("serving_ns", "overhead_ns", "lost_ns", "idle_ns", "down_ns")
    off = sum(abs(sum(each[part] for part in parts) - each["wall_ns"] * each["accelerators"]) for each in accounts)
    names = sorted({each["device"] for each in accounts})
    tell("accounts: nanoseconds by which parts and whole differ", off, "ns", devices=names)
    assert off == 0
    assert names == ["cuda:0"]


def _energy(settings: Settings) -> Any:
    """Reads the GPU's counter, in microjoules; 0 where there is none."""
    if settings.rehearsal:
        return lambda: 0
    from millicent.meter.energy import NvmlZone

    try:
        read: Callable[[], int] = NvmlZone(0, os.environ.get("CUDA_VISIBLE_DEVICES")).read_uj
        read()
    except OSError as error:
        print(json.dumps({"energy": f"no counter: {error}"}), flush=True)
        return lambda: 0
    return read


async def _joules(session: Any, before_uj: int, after_uj: int) -> None:
    """What the receipts hold, of what the counter says was drawn while the server stood: idle draw is nobody's."""
    drawn = (after_uj - before_uj) / 1e6
    found, provenances, after = 0.0, set(), ""
    while True:
        page = await _get(session, f"/v1/receipts?limit=100{after}")
        for receipt in page["data"]:
            provenances.add(receipt["energy"]["provenance"])
            found += float(receipt["energy"]["joules"] or 0)
        if not page["has_more"]:
            break
        after = f"&after={page['next']}"
    tell("joules drawn, by the counter", drawn, "J")
    tell("joules on receipts", found, "J", provenances=sorted(provenances))
    if drawn:
        tell("joules on receipts, of those drawn", found / drawn, "")
        assert found <= drawn * 1.02, "receipts hold more energy than was drawn"
