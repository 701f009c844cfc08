"""Embeddings of a live server, through the official client: every vector metered, every call with its receipt."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest

from millicent.engine.models import load_encoder
from millicent.text import load_tokenizer
from support.live import LiveServer, live_server
from support.minilm_golden import TEXTS
from support.tiny_encoders import write_tiny_encoder
from support.tiny_models import write_tiny_model

GOLDEN = Path(__file__).parents[1] / "engine_models" / "golden" / "minilm_vectors.json"


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_encoder(tmp_path_factory.mktemp("encoders") / "encoder")


@pytest.fixture(scope="module")
def server(encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    folder = tmp_path_factory.mktemp("embeddings")
    tiny = write_tiny_model(folder / "tiny")
    config = f'[models.tiny]\npath = "{tiny}"\n[models.encoder]\npath = "{encoder}"\n'
    with live_server(folder / "home", ["tiny", "encoder"], config) as live:
        yield live


@pytest.fixture
def client(server: LiveServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as made:
        yield made


def expected(path: Path, *texts: str) -> np.ndarray[Any, Any]:
    tokenizer = load_tokenizer(path)
    encoder = load_encoder(path, dtype="fp32", name="here")
    vectors: np.ndarray[Any, Any] = encoder.encode([tokenizer.encode(text) for text in texts]).numpy()
    return vectors


def test_the_official_client_gets_vectors_with_a_receipt(
    server: LiveServer, client: openai.OpenAI, encoder: Path
) -> None:
    texts = ["the sun rises", "the moon sets", "a b c"]
    raw = client.embeddings.with_raw_response.create(
        model="encoder", input=texts, user="ada", extra_headers={"X-Millicent-Feature": "search"}
    )
    found = raw.parse()
    assert [entry.index for entry in found.data] == [0, 1, 2]
    np.testing.assert_allclose([entry.embedding for entry in found.data], expected(encoder, *texts), atol=1e-5)
    as_floats = client.embeddings.create(model="encoder", input=texts, encoding_format="float")
    np.testing.assert_allclose([entry.embedding for entry in as_floats.data], expected(encoder, *texts), atol=1e-5)
    status, receipt = server.get(f"/v1/receipts/{raw.headers['x-millicent-receipt']}")
    assert (status, receipt["status"], receipt["dialect"]) == (200, "succeeded", "openai.embeddings")
    assert receipt["usage"] == {"input_fresh": {"tokens": found.usage.prompt_tokens, "provenance": "measured"}}
    assert found.usage.total_tokens == found.usage.prompt_tokens == 15
    assert receipt["attribution"]["user"] == "ada"
    assert receipt["attribution"]["feature"] == "search"
    assert receipt["accelerator"]["seconds"] == receipt["accelerator"]["prefill_seconds"] > 0
    assert receipt["total_usd"] == raw.headers["x-millicent-cost-usd"]
    assert receipt["timing_ms"]["ttft"] is None
    extra = found.usage.model_extra
    assert extra is not None
    assert extra["cost"] == pytest.approx(float(receipt["total_usd"]))


def test_tokens_are_embedded_as_given_and_vectors_are_shortened_to_unit_length(
    client: openai.OpenAI, encoder: Path
) -> None:
    tokens = load_tokenizer(encoder).encode("the sun rises")
    found = client.embeddings.create(model="encoder", input=[tokens, tokens], dimensions=8)
    whole = expected(encoder, "the sun rises")[0]
    for entry in found.data:
        np.testing.assert_allclose(entry.embedding, whole[:8] / np.linalg.norm(whole[:8]), atol=1e-5)


def test_what_is_too_long_is_refused_unless_it_may_be_cut(client: openai.OpenAI) -> None:
    long = "the sun rises and sets " * 20
    with pytest.raises(openai.BadRequestError, match="more than the 40 that this model reads"):
        client.embeddings.create(model="encoder", input=long)
    cut = client.embeddings.create(model="encoder", input=long, extra_body={"truncate_prompt_tokens": -1})
    assert cut.usage.prompt_tokens == 40


def test_a_model_is_asked_only_for_what_it_does(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="tiny makes text, not embeddings"):
        client.embeddings.create(model="tiny", input="a")
    with pytest.raises(openai.BadRequestError, match="encoder makes embeddings, not text"):
        client.chat.completions.create(model="encoder", messages=[{"role": "user", "content": "a"}])
    with pytest.raises(openai.BadRequestError, match="100 are more than the 32"):
        client.embeddings.create(model="encoder", input="a", dimensions=100)
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="none", input="a")


def test_the_models_that_are_served_are_listed_and_minilm_with_them(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list().data] == ["tiny", "encoder", "minilm"]


def test_a_key_that_is_sent_again_gets_the_same_vectors_under_the_same_receipt(
    client: openai.OpenAI,
) -> None:
    asked: dict[str, Any] = {
        "model": "encoder",
        "input": ["the sun", "the moon"],
        "extra_headers": {"Idempotency-Key": "k1"},
    }
    first, again = (client.embeddings.with_raw_response.create(**asked) for _ in range(2))
    assert first.headers["x-millicent-receipt"] == again.headers["x-millicent-receipt"]
    assert first.parse() == again.parse()


def test_a_maximum_cost_gives_every_vector_or_none(server: LiveServer, client: openai.OpenAI) -> None:
    texts = ["the sun rises and sets"] * 1000
    whole = client.embeddings.with_raw_response.create(model="encoder", input=texts)
    cost = float(whole.headers["x-millicent-cost-usd"])
    seen = len(server.receipts())
    with pytest.raises(openai.APIStatusError) as refused:
        client.embeddings.create(
            model="encoder", input=texts, extra_headers={"X-Millicent-Max-Cost-USD": f"{cost / 20:.9f}"}
        )
    assert refused.value.status_code == 402
    # Refused by its quote, without a receipt, or stopped on the way, with one that failed. Never some of the vectors.
    assert {one["status"] for one in server.receipts()[: len(server.receipts()) - seen]} <= {"failed"}


def test_embeddings_and_text_at_once_are_each_right_and_their_time_adds_up(
    server: LiveServer, client: openai.OpenAI, encoder: Path
) -> None:
    texts = [f"the sun rises and {'a b ' * (count % 9)}sets" for count in range(300)]

    def embed(first: int) -> list[list[float]]:
        found = client.embeddings.create(model="encoder", input=texts[first : first + 75])
        return [entry.embedding for entry in found.data]

    def chat(number: int) -> int:
        found = client.completions.create(
            model="tiny", prompt=f"once {number}", max_tokens=30, extra_body={"ignore_eos": True}
        )
        assert found.usage is not None
        return found.usage.completion_tokens

    with ThreadPoolExecutor(8) as pool:
        vectors = pool.map(embed, range(0, 300, 75))
        assert list(pool.map(chat, range(4))) == [30] * 4
        found = [vector for part in vectors for vector in part]
    np.testing.assert_allclose(found, expected(encoder, *texts), atol=1e-5)
    server.check_accounts()


@pytest.mark.model
def test_minilm_is_loaded_at_first_use_and_gives_the_vectors_of_sentence_transformers(
    server: LiveServer, client: openai.OpenAI, minilm_path: Path
) -> None:
    del minilm_path  # it is here, so that the server needn't fetch it
    found = client.embeddings.create(model="minilm", input=list(TEXTS), extra_body={"truncate_prompt_tokens": -1})
    golden = [np.frombuffer(base64.b64decode(vector), "<f4") for vector in json.loads(GOLDEN.read_text())]
    np.testing.assert_allclose([entry.embedding for entry in found.data], np.stack(golden), atol=1e-4, rtol=0)
    assert server.get("/ready")[1]["engines"][0]["models"]["minilm"] == "loaded"
