"""Ollama's own client: a chat, a stream, an error. It shows no headers, so the receipt is the newest one."""

import json
import sys

import ollama

client = ollama.Client(host=sys.argv[1])
hello = [{"role": "user", "content": "hello"}]
options = {"num_predict": 8, "temperature": 0}
answer = client.chat(model="tiny", messages=hello, options=options)
assert answer.message.content
assert answer.eval_count <= 8

pieces = list(client.chat(model="tiny", messages=hello, options=options, stream=True))
assert "".join(piece.message.content or "" for piece in pieces)
assert pieces[-1].done

assert "tiny" in [model.model.removesuffix(":latest") for model in client.list().models]

try:
    client.chat(model="nobody", messages=hello)
    raise SystemExit("a model that isn't there was found")
except ollama.ResponseError as error:
    assert error.status_code == 404
    assert "nobody" in error.error

print(json.dumps({}))
