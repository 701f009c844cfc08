"""How answers are drawn, asked for with the official client: choices, log probabilities, biases, reuse."""

import json
import math
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from support.live import LiveServer, live_server
from support.tiny_models import SPECIAL_TOKENS, TinyLlama, write_tiny_model

HI: Any = [{"role": "user", "content": "hello there"}]
GO_ON = {"ignore_eos": True}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    folder = tmp_path_factory.mktemp("sampling")
    tiny = write_tiny_model(folder / "tiny", TinyLlama(context_tokens=8192))
    with live_server(folder / "home", [str(tiny)], '[engine]\ndtype = "fp32"\n') as live:
        yield live


@pytest.fixture
def client(server: LiveServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as made:
        yield made


def test_choices_are_drawn_from_seeds_of_their_own_on_one_receipt(server: LiveServer, client: openai.OpenAI) -> None:
    before = len(server.receipts())
    raw = client.chat.completions.with_raw_response.create(
        model="tiny", messages=HI, n=3, seed=7, max_tokens=12, extra_body=GO_ON
    )
    several = raw.parse()
    assert [choice.index for choice in several.choices] == [0, 1, 2]
    texts = [choice.message.content for choice in several.choices]
    assert len(set(texts)) == 3
    alone = client.chat.completions.create(model="tiny", messages=HI, seed=7, max_tokens=12, extra_body=GO_ON)
    assert alone.choices[0].message.content == texts[0]
    again = client.chat.completions.create(model="tiny", messages=HI, n=3, seed=7, max_tokens=12, extra_body=GO_ON)
    assert [choice.message.content for choice in again.choices] == texts
    assert several.usage is not None
    assert alone.usage is not None
    assert several.usage.prompt_tokens == alone.usage.prompt_tokens
    assert several.usage.completion_tokens == 36
    assert len(server.receipts()) == before + 3
    receipt = server.settled(raw.headers["x-millicent-receipt"])
    assert receipt["usage"]["output_text"]["tokens"] == 36
    server.check_accounts()


def test_streamed_choices_are_those_of_a_whole_answer_and_end_one_by_one(client: openai.OpenAI) -> None:
    asked: Any = {"model": "tiny", "messages": HI, "n": 3, "seed": 5, "max_tokens": 30, "logprobs": True}
    whole = client.chat.completions.create(**asked)
    texts: dict[int, str] = defaultdict(str)
    tokens: dict[int, list[str]] = defaultdict(list)
    reasons: dict[int, str] = {}
    for chunk in client.chat.completions.create(**asked, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            if choice.logprobs is not None and choice.logprobs.content is not None:
                tokens[choice.index] += [entry.token for entry in choice.logprobs.content]
            if choice.finish_reason is not None:
                assert choice.index not in reasons
                reasons[choice.index] = choice.finish_reason
    for choice in whole.choices:
        assert texts[choice.index] == choice.message.content
        assert reasons[choice.index] == choice.finish_reason
        assert choice.logprobs is not None
        assert tokens[choice.index] == [entry.token for entry in choice.logprobs.content or ()]


def test_several_prompts_are_answered_as_each_alone_on_one_receipt(server: LiveServer, client: openai.OpenAI) -> None:
    prompts = ["Once", "hello there, you"]
    asked: Any = {
        "model": "tiny", "n": 2, "seed": 9, "max_tokens": 8, "echo": True, "logprobs": 2, "extra_body": GO_ON,
    }  # fmt: skip
    before = len(server.receipts())
    raw = client.completions.with_raw_response.create(prompt=prompts, **asked)
    several = raw.parse()
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    assert len(server.receipts()) == before + 1
    alone = [client.completions.create(prompt=prompt, **asked) for prompt in prompts]
    for choice, expected in zip(several.choices, [each for one in alone for each in one.choices], strict=True):
        assert (choice.text, choice.finish_reason) == (expected.text, expected.finish_reason)
        assert choice.logprobs is not None
        assert expected.logprobs is not None
        assert choice.logprobs.tokens == expected.logprobs.tokens
        assert choice.logprobs.text_offset == expected.logprobs.text_offset
    assert [choice.text.startswith(prompts[choice.index // 2]) for choice in several.choices] == [True] * 4
    usages = [one.usage for one in (*alone, several) if one.usage is not None]
    assert usages[0].prompt_tokens + usages[1].prompt_tokens == usages[2].prompt_tokens
    assert [usage.completion_tokens for usage in usages] == [16, 16, 32]
    receipt = server.settled(raw.headers["x-millicent-receipt"])
    assert receipt["usage"]["output_text"]["tokens"] == 32
    texts: dict[int, str] = defaultdict(str)
    for chunk in client.completions.create(prompt=prompts, **asked, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == {choice.index: choice.text for choice in several.choices}
    server.check_accounts()


def test_several_prompts_are_refused_by_the_one_that_has_no_room(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="tiny", prompt=[[1], [1] * 8192], max_tokens=1)
    assert caught.value.code == "context_length_exceeded"


def test_a_client_that_goes_stops_all_choices(server: LiveServer) -> None:
    body = {"model": "tiny", "prompt": "all", "n": 3, "max_tokens": 100_000, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as response:
        next(response.iter_lines())
        receipt_id = response.headers["x-millicent-receipt"]
    receipt = server.settled(receipt_id)
    assert receipt["status"] == "cancelled"
    assert receipt["usage"]["output_text"]["tokens"] < 3 * 8000
    server.check_accounts()


def test_chat_log_probabilities_have_openais_shape(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=HI, temperature=0, max_tokens=6, logprobs=True, top_logprobs=3, extra_body=GO_ON
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert len(logprobs.content) == 6
    for entry in logprobs.content:
        assert len(entry.top_logprobs) == 3
        assert entry.top_logprobs[0].logprob == entry.logprob == max(one.logprob for one in entry.top_logprobs)
        assert sum(math.exp(one.logprob) for one in entry.top_logprobs) <= 1.0001
        assert bytes(entry.bytes or ()).decode("utf-8", "replace") == entry.token
    shown = b"".join(bytes(entry.bytes or ()) for entry in logprobs.content)
    for control in SPECIAL_TOKENS:  # which have a name and a probability, but no text
        shown = shown.replace(control.encode(), b"")
    assert shown.decode("utf-8", "replace") == answer.choices[0].message.content


def test_a_completion_echoes_and_scores_its_prompt(client: openai.OpenAI) -> None:
    prompt = "the weather in the north"
    scored = client.completions.create(model="tiny", prompt=prompt, echo=True, logprobs=2, max_tokens=0)
    assert scored.choices[0].text == prompt
    logprobs = scored.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert logprobs.token_logprobs is not None
    assert "".join(logprobs.tokens) == prompt
    first, *others = logprobs.model_dump()["token_logprobs"]
    assert first is None
    assert all(value < 0 for value in others)
    assert logprobs.text_offset == [len("".join(logprobs.tokens[:index])) for index in range(len(logprobs.tokens))]
    assert scored.usage is not None
    assert scored.usage.completion_tokens == 0
    longer = client.completions.create(
        model="tiny", prompt=prompt, echo=True, logprobs=2, max_tokens=3, temperature=0, extra_body=GO_ON
    )
    assert longer.choices[0].text.startswith(prompt)
    assert longer.choices[0].logprobs is not None
    assert len(longer.choices[0].logprobs.tokens or ()) == len(logprobs.tokens) + 3


def test_a_bias_decides_and_a_stop_token_ends(client: openai.OpenAI) -> None:
    letters = client.completions.create(
        model="tiny", prompt="x", max_tokens=4, logit_bias={"40": 100}, extra_body=GO_ON, logprobs=0
    )
    logprobs = letters.choices[0].logprobs
    assert logprobs is not None
    assert len(set(logprobs.tokens or ())) == 1
    stopped = client.completions.create(
        model="tiny", prompt="x", max_tokens=4, logit_bias={"40": 100}, extra_body={"stop_token_ids": [40]}
    )
    assert (stopped.choices[0].text, stopped.choices[0].finish_reason) == ("", "stop")
    assert stopped.usage is not None
    assert stopped.usage.completion_tokens == 1
    with pytest.raises(openai.BadRequestError, match="logit_bias") as caught:
        client.completions.create(model="tiny", prompt="x", logit_bias={"99999": 1})
    assert caught.value.param == "logit_bias"


def test_a_repeated_prompt_is_read_from_the_cache_and_says_so(server: LiveServer, client: openai.OpenAI) -> None:
    asked: Any = {"model": "tiny", "prompt": "a prefix that nobody else sends " * 8, "max_tokens": 3, "temperature": 0}
    answers = [client.completions.with_raw_response.create(**asked) for _ in range(2)]
    first, second = (answer.parse() for answer in answers)
    assert first.usage is not None
    assert second.usage is not None
    assert first.usage.prompt_tokens_details is not None
    assert second.usage.prompt_tokens_details is not None
    prompt = first.usage.prompt_tokens
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    assert second.usage.prompt_tokens_details.cached_tokens == (prompt - 1) // 16 * 16
    assert second.usage.prompt_tokens == prompt
    assert first.choices[0].text == second.choices[0].text
    leaves = server.settled(answers[1].headers["x-millicent-receipt"])["usage"]
    assert leaves["input_fresh"]["tokens"] + leaves["input_cache_read"]["tokens"] == prompt
    assert leaves["input_cache_read"]["provenance"] == "measured"


def test_a_prompt_is_cut_to_its_last_tokens_where_that_is_asked(client: openai.OpenAI) -> None:
    cut = client.completions.create(
        model="tiny", prompt="abcdefgh", echo=True, max_tokens=0, extra_body={"truncate_prompt_tokens": 3}
    )
    assert cut.choices[0].text == "fgh"
    whole = client.completions.create(
        model="tiny", prompt="x" * 20_000, max_tokens=5, extra_body={"truncate_prompt_tokens": -1} | GO_ON
    )
    assert whole.usage is not None
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (8187, 5)


def test_several_choices_come_again_under_an_idempotency_key(server: LiveServer) -> None:
    body = json.dumps({"model": "tiny", "prompt": "q", "n": 2, "max_tokens": 5, "logprobs": 1} | GO_ON).encode()
    first = server.request("POST", "/v1/completions", body, {"Idempotency-Key": "two-choices"})
    again = server.request("POST", "/v1/completions", body, {"Idempotency-Key": "two-choices"})
    assert first[0] == again[0] == 200
    assert first[1] == again[1]
    assert len(first[1]["choices"]) == 2
