"""The default model, through the official client, as a newcomer would meet it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from support.live import LiveServer, live_server

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def server(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    config = f'[engine]\ndeterministic = true\n[models."smollm2:135m"]\npath = "{smollm2_path}"\n'
    with live_server(tmp_path_factory.mktemp("real") / "home", ["smollm2:135m"], config) as live:
        yield live


@pytest.fixture
def client(server: LiveServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as made:
        yield made


@pytest.mark.parametrize(
    ("question", "expected"), [("What is the capital city of Japan?", "Tokyo"), ("What is 2 + 2?", "4")]
)
def test_the_model_answers_and_a_stream_says_the_same(client: openai.OpenAI, question: str, expected: str) -> None:
    asked: dict[str, Any] = {
        "model": "smollm2:135m",
        "messages": [{"role": "user", "content": question}],
        "temperature": 0,
        "max_tokens": 48,
    }
    whole = client.chat.completions.create(**asked).choices[0].message.content
    assert whole is not None
    assert expected in whole
    chunks = client.chat.completions.create(**asked, stream=True)
    streamed = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert streamed == whole
