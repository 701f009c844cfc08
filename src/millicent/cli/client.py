"""A small client of our own server: what commands need of HTTP, from the standard library."""

from __future__ import annotations

import contextlib
import http.client
import os
import subprocess
import sys
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any
from urllib.parse import urlsplit

import msgspec

from millicent.core.errors import MillicentError, Unavailable

READY = "Millicent ready on "
_TIMEOUT_S = 600  # the server sends a comment every few seconds while it has nothing to say

# Dollars keep every digit on their way in.
_decoder = msgspec.json.Decoder(float_hook=Decimal)


@dataclass
class Answered:
    """What came besides the text: filled in while the answer is read, complete at its end."""

    receipt: str | None = None
    usage: dict[str, Any] = field(default_factory=dict)
    finish_reason: str | None = None


class Client:
    """Speaks to one server. A key is taken from `MILLICENT_API_KEY`."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise MillicentError(f"{url!r} is no address of a server: write it as http://127.0.0.1:8080.")
        self.url = url.rstrip("/")
        self._path = parts.path.rstrip("/")
        self._address = (parts.hostname, parts.port)
        self._connect = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection

    def models(self) -> list[str]:
        """Names that can be asked for. Raises Unavailable also where something else than a model server answers."""
        with self._request("GET", "/v1/models", None) as response:
            try:
                return [str(model["id"]) for model in _decoder.decode(response.read())["data"]]
            except (msgspec.DecodeError, KeyError, TypeError) as error:
                raise Unavailable(
                    f"what answers at {self.url} is no model server: look what else runs there."
                ) from error

    def answer(self, body: dict[str, Any], headers: dict[str, str]) -> tuple[str, Answered]:
        """The whole text at once, and what came with it."""
        with self._request("POST", "/v1/chat/completions", body, headers) as response:
            told = _decoder.decode(response.read())
            answered = Answered(response.getheader("X-Millicent-Receipt"), told.get("usage") or {})
        choice = told["choices"][0]
        answered.finish_reason = choice["finish_reason"]
        return choice["message"].get("content") or "", answered

    def quote(self, body: dict[str, Any]) -> dict[str, Any]:
        with self._request("POST", "/v1/quote", body) as response:
            quotes: dict[str, Any] = _decoder.decode(response.read())
        return quotes

    def chat(self, body: dict[str, Any], answered: Answered) -> Generator[str, None, None]:
        """The answer's text as it comes. Closing this early tells the server to stop."""
        body = body | {"stream": True, "stream_options": {"include_usage": True}}
        with self._request("POST", "/v1/chat/completions", body) as response:
            answered.receipt = response.getheader("X-Millicent-Receipt")
            for event in _events(response):
                if error := event.get("error"):
                    raise MillicentError(str(error["message"]), code=error.get("code"))
                answered.usage = event.get("usage") or answered.usage
                for choice in event["choices"]:
                    answered.finish_reason = choice["finish_reason"] or answered.finish_reason
                    if text := choice["delta"].get("content"):
                        yield text

    @contextlib.contextmanager
    def _request(
        self, method: str, path: str, body: object, more: Mapping[str, str] | None = None
    ) -> Iterator[http.client.HTTPResponse]:
        headers = {"Content-Type": "application/json", **(more or {})}
        if key := os.environ.get("MILLICENT_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        connection = self._connect(*self._address, timeout=_TIMEOUT_S)
        try:
            connection.request(method, self._path + path, None if body is None else msgspec.json.encode(body), headers)
            response = connection.getresponse()
            if response.status >= 400:
                raise _refusal(response)
            yield response
        except ConnectionRefusedError as error:
            raise Unavailable(f"no server answers at {self.url}: start one with `millicent serve`.") from error
        except (OSError, http.client.HTTPException) as error:
            raise Unavailable(f"{self.url}: {error or type(error).__name__}: look at the server's log.") from error
        finally:
            connection.close()


def _events(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    """Server-sent events until [DONE]; a stream that ends before it was cut off."""
    for line in response:
        if line.startswith(b"data:"):
            data = line[len(b"data:") :].strip()
            if data == b"[DONE]":
                return
            yield _decoder.decode(data)
    raise Unavailable("the answer was cut off: the server ended the stream early; its receipt tells what was used.")


def _refusal(response: http.client.HTTPResponse) -> MillicentError:
    body = response.read(1 << 20)
    try:
        message = str(_decoder.decode(body)["error"]["message"])
    except (msgspec.DecodeError, KeyError, TypeError):
        return Unavailable(f"the server says {response.status} {response.reason}: is it a Millicent?")
    return MillicentError(message)


@contextlib.contextmanager
def private_server(model: str, options: Sequence[str] = ()) -> Iterator[Client]:
    """A server of our own on a free port, for as long as this lasts. It writes to the same ledger as any other.

    `options` are further ones of `millicent serve`.
    """
    command = [sys.executable, "-m", "millicent", "serve", model, "--port", "0", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield Client(_ready_url(process))
        finally:
            process.terminate()
            process.communicate()


def _ready_url(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(READY):
            return line.removeprefix(READY).strip()
    raise Unavailable("the server that was started for this ended before it was ready: see the message above.")
