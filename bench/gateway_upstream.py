"""A fake upstream for bench/gateway.py, as quick as Python lets it be: OpenAI's chat completions, whole and streamed.

    python bench/gateway_upstream.py PORT

An answer has `max_tokens` tokens of a word each. A stream is one event per token: all in one write, or, for a model
named `paced`, an event every 5 ms in a write of its own. It parses no more of HTTP than the bench's clients send.
"""

from __future__ import annotations

import asyncio
import json
import sys
from functools import cache
from typing import Any, cast

import msgspec

_PACE_S = 0.005
_WORD = " word"


class Asked(msgspec.Struct):
    model: str
    max_tokens: int = 4
    stream: bool = False


_decoder = msgspec.json.Decoder(Asked)


def _usage(tokens: int) -> dict[str, int]:
    return {"prompt_tokens": 9, "completion_tokens": tokens, "total_tokens": 9 + tokens}


@cache
def whole(model: str, tokens: int) -> bytes:
    message = {"role": "assistant", "content": _WORD * tokens}
    body = {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1_767_225_600,
        "model": model,
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        "usage": _usage(tokens),
    }
    encoded = json.dumps(body).encode()
    head = f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {len(encoded)}\r\n\r\n"
    return head.encode() + encoded


@cache
def events(model: str, tokens: int) -> tuple[bytes, ...]:
    """The pieces of a chunked answer, the head being the first and the end of the body the last."""
    shared = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1_767_225_600, "model": model}

    def event(choices: list[dict[str, Any]], **more: Any) -> bytes:
        return b"data: " + json.dumps({**shared, "choices": choices, **more}).encode() + b"\n\n"

    def choice(delta: dict[str, str], reason: str | None = None) -> list[dict[str, Any]]:
        return [{"index": 0, "delta": delta, "finish_reason": reason}]

    pieces = [
        event(choice({"role": "assistant", "content": ""})),
        *[event(choice({"content": _WORD}))] * tokens,
        event(choice({}, "stop")),
        event([], usage=_usage(tokens)) + b"data: [DONE]\n\n",
    ]
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    return (head, *(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces), b"0\r\n\r\n")


class Upstream(asyncio.Protocol):
    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, found, body = self._received.partition(b"\r\n\r\n")
        if not found:
            return
        length = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0] or 0)
        if len(body) < length:
            return
        self._received = body[length:]
        self._answer(_decoder.decode(body[:length]))

    def _answer(self, asked: Asked) -> None:
        assert self._transport is not None
        if not asked.stream:
            self._transport.write(whole(asked.model, asked.max_tokens))
        elif asked.model == "paced":
            self._pace(events(asked.model, asked.max_tokens), 0)
        else:
            self._transport.write(b"".join(events(asked.model, asked.max_tokens)))

    def _pace(self, pieces: tuple[bytes, ...], sent: int) -> None:
        assert self._transport is not None
        self._transport.write(pieces[sent])
        if sent + 1 < len(pieces) and not self._transport.is_closing():
            asyncio.get_running_loop().call_later(_PACE_S, self._pace, pieces, sent + 1)


async def main(port: int) -> None:
    server = await asyncio.get_running_loop().create_server(Upstream, "127.0.0.1", port, backlog=2048)
    await server.serve_forever()


if __name__ == "__main__":
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main(int(sys.argv[1])))
