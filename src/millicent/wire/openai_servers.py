"""What each server that speaks OpenAI's dialect makes of it: the one table of their quirks.

A field that a server lacks is refused by name before anything is sent; one under another name is renamed. What is not
in the table is as OpenAI's API description says. `docs/backends.md` tells where each row is from.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import msgspec

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh"]

_EFFORTS: frozenset[Effort] = frozenset({"none", "minimal", "low", "medium", "high", "xhigh"})
_COMMON_EFFORTS: frozenset[Effort] = frozenset({"none", "low", "medium", "high"})
_OPENAI_FORMATS = frozenset({"json_object", "json_schema"})


class Server(msgspec.Struct, frozen=True, kw_only=True):
    """`lacks` are fields of OpenAI's that it refuses or ignores; `takes` are extensions, under its own names; `names`
    what it calls fields of OpenAI's.

    `effort` is the field that says how much to think, and `efforts` the words it takes there. `thoughts` is the field
    of a message that holds what was thought before it. `running_usage`: each chunk can have the usage so far;
    `usage_of_each`: that of each of several answers comes by itself.
    `cache_key`: prompts of one `prompt_cache_key` are sent where their beginning is cached.
    """

    title: str
    base_url: str | None = None
    key_header: Literal["Authorization", "api-key"] = "Authorization"
    max_tokens: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    lacks: frozenset[str] = frozenset()
    takes: Mapping[str, str] = {}
    names: Mapping[str, str] = {}
    formats: frozenset[str] = _OPENAI_FORMATS
    include_usage: bool = True
    running_usage: bool = False
    usage_of_each: bool = False
    effort: Literal["reasoning_effort", "reasoning", "thinking", "chat_template_kwargs"] | None = None
    efforts: frozenset[Effort] = frozenset()
    thoughts: Literal["reasoning_content", "reasoning"] | None = None
    required: Literal["required", "any"] = "required"
    call_id_length: int | None = None  # it takes only identifiers of so many letters and digits
    cache_key: bool = False
    completions: bool = True
    several_prompts: bool = True  # in one call for text
    embeddings: bool = True


def _same(*names: str) -> dict[str, str]:
    return {name: name for name in names}


SERVERS: dict[str, Server] = {
    "openai": Server(
        title="OpenAI",
        base_url="https://api.openai.com/v1",
        max_tokens="max_completion_tokens",
        effort="reasoning_effort",
        efforts=_EFFORTS,
        cache_key=True,
    ),
    "azure": Server(
        title="Azure OpenAI",
        key_header="api-key",
        max_tokens="max_completion_tokens",
        effort="reasoning_effort",
        efforts=_EFFORTS,
    ),
    "mistral": Server(
        title="Mistral",
        base_url="https://api.mistral.ai/v1",
        lacks=frozenset({"logit_bias", "logprobs", "name"}),
        names={"seed": "random_seed"},
        include_usage=False,  # it is on the last chunk anyway, and unknown fields are refused
        effort="reasoning_effort",
        efforts=frozenset({"none", "high"}),
        required="any",
        call_id_length=9,
        completions=False,
    ),
    "groq": Server(
        title="Groq",
        base_url="https://api.groq.com/openai/v1",
        max_tokens="max_completion_tokens",
        lacks=frozenset({"n", "logit_bias", "logprobs", "name"}),
        effort="reasoning_effort",
        efforts=_COMMON_EFFORTS,
        completions=False,
        embeddings=False,
    ),
    "deepseek": Server(
        title="DeepSeek",
        base_url="https://api.deepseek.com",
        lacks=frozenset({"n", "seed", "logit_bias", "parallel_tool_calls"}),
        formats=frozenset({"json_object"}),
        effort="thinking",
        efforts=frozenset({"none"}),
        thoughts="reasoning_content",
        completions=False,
        embeddings=False,
    ),
    "openrouter": Server(
        title="OpenRouter",
        several_prompts=False,
        base_url="https://openrouter.ai/api/v1",
        lacks=frozenset({"n"}),
        takes=_same("top_k", "min_p", "repetition_penalty"),
        effort="reasoning",
        efforts=_EFFORTS,
        thoughts="reasoning",
    ),
    "vllm": Server(
        title="vLLM",
        takes=_same(
            "top_k",
            "min_p",
            "repetition_penalty",
            "min_tokens",
            "stop_token_ids",
            "ignore_eos",
            "truncate_prompt_tokens",
            "priority",
        ),
        formats=_OPENAI_FORMATS | {"regex"},
        running_usage=True,
        effort="reasoning_effort",
        efforts=_COMMON_EFFORTS,
        thoughts="reasoning",
    ),
    "sglang": Server(
        title="SGLang",
        takes=_same("top_k", "min_p", "repetition_penalty", "min_tokens", "stop_token_ids", "ignore_eos"),
        effort="reasoning_effort",
        efforts=_COMMON_EFFORTS,
        thoughts="reasoning_content",
    ),
    "tgi": Server(
        title="TGI",
        lacks=frozenset({"n", "logit_bias", "parallel_tool_calls"}),
        embeddings=False,
    ),
    "llama.cpp": Server(
        title="llama.cpp",
        usage_of_each=True,
        takes=_same("top_k", "min_p", "typical_p", "ignore_eos") | {"repetition_penalty": "repeat_penalty"},
        effort="chat_template_kwargs",
        efforts=frozenset({"none"}),
        thoughts="reasoning_content",
    ),
    "lmstudio": Server(
        title="LM Studio",
        several_prompts=False,
        lacks=frozenset({"n", "logprobs", "parallel_tool_calls"}),
        takes=_same("top_k") | {"repetition_penalty": "repeat_penalty"},
        formats=frozenset({"json_schema"}),
    ),
    "mlx": Server(
        title="mlx-lm",
        several_prompts=False,
        lacks=frozenset({"n", "logprobs", "tool_choice", "parallel_tool_calls"}),
        takes=_same("top_k", "min_p", "repetition_penalty"),
        formats=frozenset(),
        embeddings=False,
    ),
    "transformers": Server(
        title="transformers serve",
        several_prompts=False,
        lacks=frozenset(
            {
                "n",
                "logprobs",
                "presence_penalty",
                "frequency_penalty",  # taken for another penalty
                "logit_bias",
                "tool_choice",
                "parallel_tool_calls",
            }
        ),
        formats=frozenset(),
        include_usage=False,  # it is on the last chunk anyway
        effort="chat_template_kwargs",
        efforts=frozenset({"none"}),
        thoughts="reasoning_content",
        embeddings=False,
    ),
    "ollama": Server(
        title="Ollama",
        several_prompts=False,
        base_url="http://127.0.0.1:11434/v1",
        lacks=frozenset({"n", "logit_bias", "tool_choice", "parallel_tool_calls"}),
        effort="reasoning_effort",
        efforts=_COMMON_EFFORTS,
        thoughts="reasoning",
    ),
    "millicent": Server(
        title="Millicent",
        takes=_same(
            "top_k",
            "min_p",
            "typical_p",
            "repetition_penalty",
            "min_tokens",
            "stop_token_ids",
            "ignore_eos",
            "truncate_prompt_tokens",
            "priority",
        ),
        formats=_OPENAI_FORMATS | {"regex", "lark"},
        running_usage=True,
        effort="reasoning_effort",
        efforts=_EFFORTS,
        thoughts="reasoning_content",
    ),
    # A server that nothing is known of: what all have in common, and its own refusals for the rest.
    "compatible": Server(title="an OpenAI-compatible server", effort="reasoning_effort", efforts=_EFFORTS),
}
