"""A server elsewhere, under the tester's thumb: it keeps what it is sent and answers in bytes, cut as it is told."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

Handler = Callable[["Call"], Awaitable[None]]


@dataclass
class Call:
    """One request, and the connection that waits for its answer."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    gone: asyncio.Event = field(default_factory=asyncio.Event)  # the caller was seen to have left

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def whole(self, body: bytes, kind: str = "application/json", status: str = "200 OK", more: str = "") -> None:
        head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n{more}\r\n"
        await self.send(head.encode() + body)

    async def stream(self, pieces: Iterable[bytes], *, end: bool = True, more: str = "") -> None:
        head = f"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n{more}\r\n"
        await self.send(head.encode())
        for piece in filter(None, pieces):  # an empty chunk is the end
            await self.send(b"%x\r\n%s\r\n" % (len(piece), piece))
        if end:
            await self.send(b"0\r\n\r\n")

    async def until_gone(self) -> None:
        """Wait for the caller to leave."""
        with contextlib.suppress(ConnectionError):
            while await self.reader.read(1024):
                pass
        self.gone.set()


@dataclass
class FakeUpstream:
    """`answer` handles each call; `calls` are those that came."""

    answer: Handler
    calls: list[Call] = field(default_factory=list)
    port: int = 0
    connections: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while (call := await _read(reader, writer)) is not None:
                self.calls.append(call)
                await self.answer(call)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()


async def _read(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Call | None:
    head = await reader.readuntil(b"\r\n\r\n")
    line, *rest = head.decode().split("\r\n")
    method, path, _ = line.split(" ")
    headers = {name.lower(): value for name, _, value in (each.partition(": ") for each in rest if each)}
    body = await reader.readexactly(int(headers.get("content-length", "0")))
    return Call(method, path, headers, body, reader, writer)


@contextlib.asynccontextmanager
async def fake_upstream(answer: Handler) -> AsyncIterator[FakeUpstream]:
    """In the caller's event loop."""
    fake = FakeUpstream(answer)
    server = await asyncio.start_server(fake.serve, "127.0.0.1", 0)
    fake.port = server.sockets[0].getsockname()[1]
    try:
        yield fake
    finally:
        server.close()
        for call in fake.calls:
            call.writer.close()


@contextlib.contextmanager
def fake_upstream_in_a_thread(answer: Handler) -> Iterator[FakeUpstream]:
    """For servers and clients that block."""
    loop = asyncio.new_event_loop()
    fake = FakeUpstream(answer)
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    async def start() -> asyncio.Server:
        return await asyncio.start_server(fake.serve, "127.0.0.1", 0)

    server = asyncio.run_coroutine_threadsafe(start(), loop).result(60)
    fake.port = server.sockets[0].getsockname()[1]

    async def stop() -> None:
        server.close()
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    try:
        yield fake
    finally:
        asyncio.run_coroutine_threadsafe(stop(), loop).result(60)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def events(*bodies: Any, done: bool = True) -> bytes:
    """As OpenAI writes them."""
    lines = [b"data: " + json.dumps(body, ensure_ascii=False).encode() + b"\n\n" for body in bodies]
    return b"".join(lines) + (b"data: [DONE]\n\n" if done else b"")


def chunk(
    delta: dict[str, Any] | None = None, reason: str | None = None, *, index: int = 0, **more: Any
) -> dict[str, Any]:
    """A chunk of chat; without `delta` one without choices."""
    choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}
    return {
        "id": "chatcmpl-9", "object": "chat.completion.chunk", "created": 1_750_000_000,
        "model": "gpt-4o-mini-2024-07-18", "system_fingerprint": "fp_1",
        "choices": [] if delta is None else [choice], **more,
    }  # fmt: skip


USAGE = {
    "prompt_tokens": 19, "completion_tokens": 10, "total_tokens": 29,
    "prompt_tokens_details": {"cached_tokens": 8, "audio_tokens": 0},
    "completion_tokens_details": {
        "reasoning_tokens": 4, "audio_tokens": 0, "accepted_prediction_tokens": 0, "rejected_prediction_tokens": 0,
    },
}  # fmt: skip


def said(*texts: str, usage: dict[str, Any] | None = USAGE, reason: str = "stop") -> bytes:
    """A streamed answer of chat."""
    bodies = [chunk({"role": "assistant", "content": "", "refusal": None})]
    bodies += [chunk({"content": text}) for text in texts]
    bodies.append(chunk({}, reason))
    if usage is not None:
        bodies.append(chunk(usage=usage))
    return events(*bodies)


def split(data: bytes, size: int = 1) -> Sequence[bytes]:
    """In pieces of so many bytes."""
    return [data[start : start + size] for start in range(0, len(data), size)]
