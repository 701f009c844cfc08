"""Pydantic AI: a run, a stream, an output made with a tool, an error. It shows no headers."""

import asyncio
import json
import sys
from typing import Literal

from pydantic import BaseModel
from pydantic_ai import Agent
from pydantic_ai.exceptions import ModelHTTPError
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

provider = OpenAIProvider(base_url=f"{sys.argv[1]}/v1", api_key="unused")


class Found(BaseModel):
    times: Literal[1, 2, 3]


async def main() -> None:
    tiny = OpenAIChatModel("tiny", provider=provider)
    agent = Agent(tiny, model_settings={"max_tokens": 8, "temperature": 0})
    answer = await agent.run("hello")
    assert answer.output

    async with agent.run_stream("hello") as stream:
        assert [piece async for piece in stream.stream_text(delta=True)]

    found = await Agent(tiny, output_type=Found, model_settings={"max_tokens": 200, "temperature": 0}).run("hello")
    assert found.output.times in {1, 2, 3}

    try:
        await Agent(OpenAIChatModel("nobody", provider=provider)).run("hello")
        raise SystemExit("a model that isn't there was found")
    except ModelHTTPError as error:
        assert error.status_code == 404
        assert "nobody" in str(error.body)


asyncio.run(main())
print(json.dumps({}))
