"""An HTTP server on a thread, for what a test has to be answered by."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread


class Handler(BaseHTTPRequestHandler):
    """Writes nothing of its own to stderr, which tests read."""

    def read_body(self) -> bytes:
        return self.rfile.read(int(self.headers["Content-Length"]))

    def send(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_json(self, body: object, status: int = 200) -> None:
        self.send(status, json.dumps(body).encode(), {"Content-Type": "application/json"})

    def log_message(self, *_: object) -> None:
        """Quiet."""


class _Server(ThreadingHTTPServer):
    def __init__(self, handler: type[Handler]) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.raised: list[BaseException] = []

    def handle_error(self, *_: object) -> None:
        """A client may leave whenever it likes, also before it has read all; anything else is the handler's fault."""
        error = sys.exception()
        if error is not None and not isinstance(error, ConnectionError):
            self.raised.append(error)


@contextmanager
def http_server(handler: type[Handler]) -> Iterator[str]:
    """Answers by `handler` for as long as the context lasts, at the address given.

    Raises:
        Exception: The first one that the handler raised.
    """
    with _Server(handler) as server:
        thread = Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()
    if server.raised:
        raise server.raised[0]
