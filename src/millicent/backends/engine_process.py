"""One engine process and the socket to it: started, listened to, and noticed when it is gone."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import msgspec

from millicent.core.errors import Unavailable
from millicent.engine.protocol import (
    MAX_FRAME_BYTES,
    EngineConfig,
    FromEngine,
    Hello,
    Shutdown,
    ToEngine,
    encode_frame,
    from_engine_decoder,
)

_HELLO_TIMEOUT_S = 120.0  # importing torch from a cold disk takes a while
_EXIT_TIMEOUT_S = 5.0
_LARGEST_LOG_BYTES = 4 << 20
_LONGEST_FOLDER_BYTES = 75


class _Link(asyncio.Protocol):
    """Cuts the byte stream into frames. Bytes that aren't frames end the connection: the engine cannot be trusted."""

    def __init__(self, on_frame: Callable[[FromEngine], None]) -> None:
        loop = asyncio.get_running_loop()
        self.transport: asyncio.Transport | None = None
        self.hello: asyncio.Future[Hello] = loop.create_future()
        self.lost: asyncio.Future[None] = loop.create_future()
        self.complaint = ""
        self._on_frame = on_frame
        self._incoming = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # Stream transports only come here; uvloop's aren't subclasses of asyncio's.
        self.transport = cast("asyncio.Transport", transport)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - the signature is asyncio's
        if not self.lost.done():
            self.lost.set_result(None)

    def data_received(self, data: bytes) -> None:
        self._incoming += data
        position = 0
        while len(self._incoming) - position >= 4 and not self.complaint:
            size = int.from_bytes(self._incoming[position : position + 4], "big")
            end = position + 4 + size
            if size > MAX_FRAME_BYTES:
                self.distrust(f"announced a frame of {size} bytes, over the limit of {MAX_FRAME_BYTES}")
            elif len(self._incoming) < end:
                break
            else:
                self._take(self._incoming[position + 4 : end])
                position = end
        del self._incoming[:position]

    def distrust(self, complaint: str) -> None:
        self.complaint = complaint
        assert self.transport is not None
        self.transport.abort()

    def _take(self, body: bytearray) -> None:
        try:
            frame = from_engine_decoder.decode(body)
        except ValueError as error:  # msgspec's errors are ValueErrors
            self.distrust(f"sent a frame that doesn't decode ({error})")
            return
        if isinstance(frame, Hello):
            if not self.hello.done():
                self.hello.set_result(frame)
        else:
            self._on_frame(frame)


class EngineProcess:
    """A running engine that has said Hello. Frames go to `on_frame`, in order, until `gone` returns."""

    def __init__(self, process: asyncio.subprocess.Process, link: _Link) -> None:
        self._process = process
        self._link = link
        self.pid = process.pid
        self.hello: Hello = link.hello.result()

    @classmethod
    async def start(
        cls, command: Sequence[str], config: EngineConfig, log_file: Path, on_frame: Callable[[FromEngine], None]
    ) -> EngineProcess:
        """Raises Unavailable if no engine comes up."""
        loop = asyncio.get_running_loop()
        link = _Link(on_frame)
        directory = _socket_directory()
        try:
            server = await loop.create_unix_server(lambda: link, str(directory / "engine"))
            try:
                process = await _spawn(command, config, directory / "engine", log_file)
                try:
                    await _await_hello(process, link, log_file)
                except BaseException:
                    await _end(process, link)
                    raise
            finally:
                server.close()
        finally:
            shutil.rmtree(directory, ignore_errors=True)
        return cls(process, link)

    def send(self, frame: ToEngine) -> None:
        """Queue a frame. What is sent to an engine that is going is lost, and `gone` says so."""
        assert self._link.transport is not None
        self._link.transport.write(encode_frame(frame))

    def give_up(self, complaint: str) -> None:
        """It is not to be relied on any more: `gone` will say so."""
        self._link.distrust(complaint)

    async def gone(self) -> str:
        """Waits for the connection to end, sees to it that the process does, and says why."""
        await self._link.lost
        return await _end(self._process, self._link)

    async def stop(self) -> None:
        """Ask it to leave; make it, if a long step keeps it from hearing."""
        self.send(Shutdown())
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._process.wait(), _EXIT_TIMEOUT_S)
        await _end(self._process, self._link, patience_s=0)


def _socket_directory() -> Path:
    """One of our own, gone once connected. A socket's path has room for about 100 characters: where the folder for
    temporary files is too deep for that, another is used."""
    deep = len(os.fsencode(tempfile.gettempdir())) > _LONGEST_FOLDER_BYTES
    return Path(tempfile.mkdtemp(prefix="millicent-", dir="/tmp" if deep else None))  # noqa: S108 - made anew, for us alone


async def _spawn(
    command: Sequence[str], config: EngineConfig, socket: Path, log_file: Path
) -> asyncio.subprocess.Process:
    environment = dict(os.environ)
    # OpenMP's threads spin after each parallel region unless told not to, and take the gateway's time.
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    environment.setdefault("GOMP_SPINCOUNT", "0")
    environment.setdefault("KMP_BLOCKTIME", "0")
    log_file.parent.mkdir(parents=True, exist_ok=True)
    _rotate(log_file)
    with log_file.open("ab") as log:
        return await asyncio.create_subprocess_exec(
            *command,
            "--socket",
            str(socket),
            "--config",
            msgspec.json.encode(config).decode(),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment,
        )


def _rotate(log_file: Path) -> None:
    """An engine's log that has grown large becomes the one before, of which there is one: at each start, since a
    process that writes to its file can't be given another. An engine says little but why it fails."""
    with contextlib.suppress(FileNotFoundError):
        if log_file.stat().st_size > _LARGEST_LOG_BYTES:
            log_file.replace(log_file.with_suffix(".log.1"))


async def _await_hello(process: asyncio.subprocess.Process, link: _Link, log_file: Path) -> None:
    exited = asyncio.ensure_future(process.wait())
    try:
        news: set[asyncio.Future[Any]] = {exited, link.hello, link.lost}
        await asyncio.wait(news, timeout=_HELLO_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED)
    finally:
        exited.cancel()
    if link.hello.done():
        return
    if process.returncode is not None or link.lost.done():
        raise Unavailable(f"the engine process ended before it was ready; {log_file} says why")
    raise Unavailable(f"the engine process didn't answer within {_HELLO_TIMEOUT_S:.0f} s; {log_file} may say why")


async def _end(process: asyncio.subprocess.Process, link: _Link, patience_s: float = 1.0) -> str:
    """Close the connection and kill what doesn't leave by itself; in words, how it ended."""
    if link.transport is not None:
        link.transport.abort()
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(process.wait(), patience_s)
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        code = await process.wait()
    else:
        code = process.returncode
    if link.complaint:
        return link.complaint
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"exited with status {code}"
