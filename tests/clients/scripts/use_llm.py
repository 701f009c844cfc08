"""Simon Willison's `llm`, by its own configuration: a prompt, a stream, an error. It shows no headers."""

import json
import os
import sys
import tempfile
from pathlib import Path

home = tempfile.mkdtemp()
os.environ["LLM_USER_PATH"] = home
models = [
    {"model_id": name, "model_name": name, "api_base": f"{sys.argv[1]}/v1", "api_key_name": "millicent"}
    for name in ("tiny", "nobody")
]
Path(home, "extra-openai-models.yaml").write_text(json.dumps(models))
Path(home, "keys.json").write_text(json.dumps({"millicent": "unused"}))

import llm  # noqa: E402 - it reads its configuration when it is imported

model = llm.get_model("tiny")
answer = model.prompt("hello", max_tokens=8, temperature=0, stream=False)
assert answer.text()
assert answer.usage().output <= 8

assert "".join(model.prompt("hello", max_tokens=8, temperature=0))

try:
    llm.get_model("nobody").prompt("hello", stream=False).text()
    raise SystemExit("a model that isn't there was found")
except Exception as error:  # noqa: BLE001 - whichever of its own it makes of a 404
    assert "nobody" in str(error)

print(json.dumps({}))
