"""Server-sent events as they arrive from an upstream: bytes in any pieces to whole events."""

from __future__ import annotations

import msgspec

from millicent.core.errors import UpstreamError

# A picture in base64 fits; what is longer than this without a line's or an event's end is not an answer.
MAX_EVENT_BYTES = 16 << 20

_BOM = b"\xef\xbb\xbf"


class Event(msgspec.Struct, frozen=True):
    """`data` as the bytes it came as, its lines joined; `name` is empty where the server gave none."""

    data: bytes
    name: str = ""


class EventReader:
    """Takes pieces cut anywhere, inside a character or between CR and LF too. Comments, identifiers and retry times
    are left out, and so are events without data.

    A line ends with CRLF, CR or LF, an event with an empty line or, in `finish`, with the stream.
    """

    def __init__(self, max_event_bytes: int = MAX_EVENT_BYTES) -> None:
        self._max = max_event_bytes
        self._rest: list[bytes] = []  # of a line that hasn't ended
        self._rest_bytes = 0
        self._after_cr = False
        self._begun = False
        self._name = ""
        self._data: list[bytes] = []
        self._data_bytes = 0

    def feed(self, piece: bytes) -> list[Event]:
        """The events that are whole now. Raises UpstreamError for one that is too long."""
        if not piece:
            return []
        if self._after_cr and piece.startswith(b"\n"):
            piece = piece[1:]
        self._after_cr = piece.endswith(b"\r")
        events: list[Event] = []
        if piece.startswith(b"data: ") and not self._rest:
            self._begun = True  # without a byte order mark
        if self._between_events and b"\r" not in piece:
            piece = self._take_plain(piece, events)
        for line in piece.splitlines(keepends=True):
            if not line.endswith((b"\n", b"\r")):
                self._keep(line)
                break
            event = self._line(line.rstrip(b"\r\n"))
            if event is not None:
                events.append(event)
        return events

    @property
    def _between_events(self) -> bool:
        return self._begun and not (self._rest or self._data or self._name)

    def _take_plain(self, piece: bytes, events: list[Event]) -> bytes:
        """Whole events of one line of data, as servers send them nearly always; what comes after them."""
        begin = 0
        while piece.startswith(b"data: ", begin):
            end = piece.find(b"\n", begin)
            if end < 0 or piece[end + 1 : end + 2] != b"\n":
                break
            self._check(end - begin - 5)
            events.append(Event(piece[begin + 6 : end]))
            begin = end + 2
        return piece[begin:]

    def finish(self) -> list[Event]:
        """The event that the end of the stream cut short of its empty line, if there is one."""
        event = self._line(b"") if self._rest else None
        last = event or self._line(b"")
        return [] if last is None else [last]

    def _keep(self, part: bytes) -> None:
        self._rest.append(part)
        self._rest_bytes += len(part)
        self._check(self._rest_bytes)

    def _check(self, size: int) -> None:
        if size > self._max:
            raise UpstreamError(f"an event of more than {self._max} bytes came", code="upstream_garbled")

    def _line(self, line: bytes) -> Event | None:
        """A whole line; what it ends."""
        if self._rest:
            line = b"".join((*self._rest, line))
            self._rest.clear()
            self._rest_bytes = 0
        if not self._begun:
            self._begun = True
            line = line.removeprefix(_BOM)
        if not line:
            return self._dispatch()
        field, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if field == b"data":
            self._data.append(value)
            self._data_bytes += len(value) + 1
            self._check(self._data_bytes)
        elif field == b"event":
            self._name = value.decode("utf-8", "replace")
        return None

    def _dispatch(self) -> Event | None:
        name, self._name = self._name, ""
        if not self._data:
            return None
        event = Event(b"\n".join(self._data), name)
        self._data.clear()
        self._data_bytes = 0
        return event
