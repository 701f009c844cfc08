"""LiteLLM's library: a chat, a stream, a tool, an error."""

import json
import sys

import litellm

there = {
    "model": "openai/tiny",
    "api_base": f"{sys.argv[1]}/v1",
    "api_key": "unused",
    "num_retries": 0,
    "temperature": 0,
}
hello = [{"role": "user", "content": "hello"}]
answer = litellm.completion(**there, messages=hello, max_tokens=8)
assert answer.choices[0].message.content
headers = answer._hidden_params["additional_headers"]

pieces = [
    chunk.choices[0].delta.content or ""
    for chunk in litellm.completion(**there, messages=hello, max_tokens=8, stream=True)
]
assert "".join(pieces)

tool = json.loads(sys.argv[2])
called = litellm.completion(**there, messages=hello, max_tokens=200, tools=[tool], tool_choice="required")
assert json.loads(called.choices[0].message.tool_calls[0].function.arguments)["times"] in {1, 2, 3}

try:
    litellm.completion(**{**there, "model": "openai/nobody"}, messages=hello)
    raise SystemExit("a model that isn't there was found")
except litellm.NotFoundError as error:
    assert "nobody" in str(error)

print(json.dumps({"receipt": headers["llm_provider-x-millicent-receipt"], "cost": answer.usage.cost}))
