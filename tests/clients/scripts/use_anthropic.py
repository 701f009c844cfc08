"""Anthropic's own client: a message, a stream, a tool, an error."""

import json
import sys

import anthropic

client = anthropic.Anthropic(base_url=sys.argv[1], api_key="unused", max_retries=0)
asked = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "hello"}],
    "max_tokens": 8,
    "extra_body": {"temperature": 0},
}
raw = client.messages.with_raw_response.create(**asked)
message = raw.parse()
assert message.content[0].text
assert message.usage.output_tokens <= 8

with client.messages.stream(**asked) as stream:
    assert "".join(stream.text_stream)

function = json.loads(sys.argv[2])["function"]
tool = {"name": function["name"], "input_schema": function["parameters"]}
called = client.messages.create(**asked | {"max_tokens": 200}, tools=[tool], tool_choice={"type": "any"})
block = next(block for block in called.content if block.type == "tool_use")
assert block.input["times"] in {1, 2, 3}

try:
    client.messages.create(**asked | {"model": "nobody"})
    raise SystemExit("a model that isn't there was found")
except anthropic.NotFoundError as error:
    assert "nobody" in error.message

print(json.dumps({"receipt": raw.headers["x-millicent-receipt"], "cost": message.usage.to_dict()["cost"]}))
