"""The engine's end of the socket: never blocks while there is work, never spins while there is none."""

from __future__ import annotations

import contextlib
import select
import socket

from millicent.engine.protocol import MAX_FRAME_BYTES, FromEngine, ToEngine, encode_frame, to_engine_decoder

_READ_BYTES = 1 << 18
# More unread output than this, and the engine pauses: it would otherwise buffer for a gateway that doesn't read.
_CONGESTED_BYTES = 4 << 20


class Disconnected(Exception):
    """The gateway is gone, or sends what isn't ours: there is nobody left to work for."""


class Connection:
    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._socket = sock
        self._incoming = bytearray()
        self._outgoing = bytearray()
        self._woken, self._waker = socket.socketpair()
        self._woken.setblocking(False)
        self._waker.setblocking(False)

    def wake(self) -> None:
        """Make a `receive` that waits return. Safe from any thread."""
        with contextlib.suppress(OSError):  # full of wakes already, or closed
            self._waker.send(b"\0")

    def close(self) -> None:
        """Nobody is woken any more. The gateway's socket is its owner's to close."""
        self._woken.close()
        self._waker.close()

    def send(self, frame: FromEngine) -> None:
        """Queue a frame and write what the socket takes now."""
        self._outgoing += encode_frame(frame)
        self._flush()

    def receive(self, *, wait: bool) -> list[ToEngine]:
        """Frames that have come. Blocks for one, or a `wake`, if `wait`; and while the gateway doesn't read."""
        while True:
            if self._outgoing:
                self._flush()
            frames = self._read()
            if frames or not (wait or len(self._outgoing) > _CONGESTED_BYTES):
                return frames
            readable, _, _ = select.select([self._socket, self._woken], [self._socket] if self._outgoing else [], [])
            if self._woken in readable:
                self._woken.recv(_READ_BYTES)
                wait = False

    def _flush(self) -> None:
        try:
            while self._outgoing:
                del self._outgoing[: self._socket.send(self._outgoing)]
        except BlockingIOError:
            return
        except OSError as error:
            raise Disconnected(f"the gateway no longer reads: {error}") from None

    def _read(self) -> list[ToEngine]:
        while True:
            try:
                data = self._socket.recv(_READ_BYTES)
            except BlockingIOError:
                break
            except OSError as error:
                raise Disconnected(f"the gateway's socket failed: {error}") from None
            if not data:
                raise Disconnected("the gateway closed the connection")
            self._incoming += data
            if len(data) < _READ_BYTES:
                break
        return self._frames()

    def _frames(self) -> list[ToEngine]:
        frames: list[ToEngine] = []
        position = 0
        while len(self._incoming) - position >= 4:
            size = int.from_bytes(self._incoming[position : position + 4], "big")
            if size > MAX_FRAME_BYTES:
                raise Disconnected(
                    f"the gateway announced a frame of {size} bytes; at most {MAX_FRAME_BYTES} are allowed"
                )
            end = position + 4 + size
            if len(self._incoming) < end:
                break
            try:
                frames.append(to_engine_decoder.decode(self._incoming[position + 4 : end]))
            except ValueError as error:  # msgspec's errors are ValueErrors
                raise Disconnected(f"the gateway sent a frame that doesn't decode: {error}") from None
            position = end
        del self._incoming[:position]
        return frames
