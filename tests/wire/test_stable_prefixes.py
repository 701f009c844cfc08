"""What goes on from a prompt begins, at every provider, exactly as that prompt did: else no cache could find it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millicent.core.request import ImagePart, Message, Request, TextPart, Thought, Tool, ToolCall
from millicent.wire import anthropic_upstream, gemini_upstream, openai_upstream
from millicent.wire.openai_servers import SERVERS

TOOLS = (Tool("weather", "of a city", '{"type":"object","properties":{"city":{"type":"string"}}}'), Tool("b", "", "{}"))
WORDS = st.text("abc é", min_size=1, max_size=6).filter(str.strip)
USER = st.builds(
    Message, st.just("user"), WORDS | st.lists(st.builds(TextPart, WORDS), min_size=1, max_size=2).map(tuple)
)
PICTURE = st.just(Message("user", (TextPart("this"), ImagePart("image/png", "aGk="))))
ANSWER = st.builds(
    Message, st.just("assistant"), WORDS, thoughts=st.sampled_from([(), (Thought("hm", signature="c2VhbA=="),)])
)
# A call and its answer, after which the user may go on.
CALLED = st.just(
    (
        Message("assistant", "", tool_calls=(ToolCall("call_1", "weather", '{"city": "Rome"}'),)),
        Message("tool", "sunny", tool_call_id="call_1"),
    )
)
TURNS = st.lists(st.tuples(USER | PICTURE, ANSWER.map(lambda message: (message,)) | CALLED), min_size=1, max_size=5)


def anthropic(request: Request) -> list[Any]:
    body = json.loads(anthropic_upstream.encode(request, "there", "It").body)
    blocks = [[message["role"], block] for message in body["messages"] for block in message["content"]]
    return [*body["tools"], *body["system"], *blocks]


def gemini(request: Request) -> list[Any]:
    body = json.loads(gemini_upstream.encode(request, "there", "It").body)
    parts = [[content["role"], part] for content in body["contents"] for part in content["parts"]]
    return [body["tools"], body["systemInstruction"], *parts]


def openai_like(server: str) -> Any:
    def blocks(request: Request) -> list[Any]:
        body = json.loads(openai_upstream.encode(request, "there", SERVERS[server], "It", cache_key=True).body)
        return [body["tools"], *body["messages"]]

    return blocks


WAYS = {
    "anthropic": anthropic,
    "gemini": gemini,
    **{server: openai_like(server) for server in ("openai", "vllm", "mistral")},
}


@pytest.mark.parametrize("blocks", WAYS.values(), ids=WAYS)
@settings(max_examples=30, deadline=None)
@given(turns=TURNS)
def test_a_prompt_that_goes_on_begins_as_it_did(blocks: Any, turns: list[tuple[Message, tuple[Message, ...]]]) -> None:
    messages = [Message("system", "Be brief.")]
    before: list[Any] = []
    for user, answered in turns:
        messages.append(user)
        sent = blocks(Request("rcpt_1", "test", "m", messages=tuple(messages), tools=TOOLS))
        assert sent[: len(before)] == before
        before = sent
        messages.extend(answered)
