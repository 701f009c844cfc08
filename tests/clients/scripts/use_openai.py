"""OpenAI's own client: a chat, a stream, a tool, an error."""

import json
import sys

import openai

client = openai.OpenAI(base_url=f"{sys.argv[1]}/v1", api_key="unused", max_retries=0)
asked = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 8, "temperature": 0}
raw = client.chat.completions.with_raw_response.create(**asked)
completion = raw.parse()
assert completion.choices[0].message.content
assert completion.usage.cost > 0

pieces, usage = [], None
for chunk in client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
    usage = chunk.usage or usage
    pieces += [choice.delta.content or "" for choice in chunk.choices]
assert "".join(pieces)
assert usage.completion_tokens <= 8

tool = json.loads(sys.argv[2])
called = client.chat.completions.create(**asked | {"max_tokens": 200}, tools=[tool], tool_choice="required")
call = called.choices[0].message.tool_calls[0].function
assert call.name == tool["function"]["name"]
assert json.loads(call.arguments)["times"] in {1, 2, 3}

try:
    client.chat.completions.create(**asked | {"model": "nobody"})
    raise SystemExit("a model that isn't there was found")
except openai.NotFoundError as error:
    assert "nobody" in error.message

print(json.dumps({"receipt": raw.headers["x-millicent-receipt"], "cost": completion.usage.cost}))
