"""LangChain's ChatOpenAI: a chat, a stream, a tool, an error."""

import json
import sys

import openai
from langchain_openai import ChatOpenAI

there = {"base_url": f"{sys.argv[1]}/v1", "api_key": "unused", "max_retries": 0, "temperature": 0}
chat = ChatOpenAI(model="tiny", max_tokens=8, include_response_headers=True, **there)
answer = chat.invoke("hello")
assert answer.content
assert answer.usage_metadata["output_tokens"] <= 8
headers = answer.response_metadata["headers"]

assert "".join(chunk.content for chunk in chat.stream("hello"))

tool = json.loads(sys.argv[2])
called = ChatOpenAI(model="tiny", max_tokens=200, **there).bind_tools([tool], tool_choice="required").invoke("hello")
assert called.tool_calls[0]["name"] == tool["function"]["name"]
assert called.tool_calls[0]["args"]["times"] in {1, 2, 3}

try:
    ChatOpenAI(model="nobody", **there).invoke("hello")
    raise SystemExit("a model that isn't there was found")
except openai.NotFoundError as error:
    assert "nobody" in error.message

usage = answer.response_metadata["token_usage"]
print(json.dumps({"receipt": headers["x-millicent-receipt"], "cost": usage["cost"]}))
