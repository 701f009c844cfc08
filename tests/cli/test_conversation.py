"""`chat` and `run`, against a server that says what the test tells it to."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from millicent.cli import run
from millicent.cli.client import Answered, Client
from support.http_server import Handler, http_server
from support.tiny_models import write_tiny_model

RECEIPT = "rcpt_00000000000000000000000001"
USAGE = {
    "prompt_tokens": 31,
    "completion_tokens": 2,
    "cost": 0.000034,
    "cost_details": {"accelerator_cost": 0.000034, "provenance": "assumed"},
}


def event(body: object) -> bytes:
    return b"data: " + json.dumps(body).encode() + b"\n\n"


def delta(text: str, finish: str | None = None) -> bytes:
    return event({"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": finish}], "usage": None})


ANSWER = [
    b": waiting\n\n",
    delta("Bonjour, "),
    delta("monde"),
    event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}),
    event({"choices": [], "usage": USAGE}),
    b"data: [DONE]\n\n",
]


class Told(Handler):
    """Serves `answer`, or refuses with `refusal`; keeps what it was asked."""

    protocol_version = "HTTP/1.1"
    answer: list[bytes]
    refusal: tuple[int, bytes] | None
    asked: list[dict[str, Any]]
    keys: list[str | None]

    def do_GET(self) -> None:
        self.send_json({"object": "list", "data": [{"id": "tiny"}]})

    def do_POST(self) -> None:
        self.asked.append(json.loads(self.read_body()))
        self.keys.append(self.headers["Authorization"])
        if self.refusal:
            self.send(*self.refusal)
            return
        self.send_response(200)
        self.send_header("X-Millicent-Receipt", RECEIPT)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        with suppress(ConnectionError):  # a client may leave at an error, before the end
            for piece in self.answer:
                self.wfile.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
            self.wfile.write(b"0\r\n\r\n")


@contextmanager
def told_server(answer: list[bytes], refusal: tuple[int, bytes] | None = None) -> Iterator[tuple[str, type[Told]]]:
    told = type("ToldHere", (Told,), {"answer": answer, "refusal": refusal, "asked": [], "keys": []})
    with http_server(told) as url:
        yield url, told


def test_run_prints_the_answer_and_its_cost_beside_it(capsys: pytest.CaptureFixture[str]) -> None:
    with told_server(ANSWER) as (url, told):
        assert (
            run(["run", "tiny", "hello", "--url", url, "--max-tokens", "5", "--temperature", "0", "--seed", "7"]) == 0
        )
    out, err = capsys.readouterr()
    assert out == "Bonjour, monde\n"
    assert err == f"[31 tokens in, 2 out; 3.4 millicents (assumed); receipt {RECEIPT}]\n"
    assert told.asked == [
        {
            "model": "tiny",
            "messages": [{"role": "user", "content": "hello"}],
            "max_tokens": 5,
            "temperature": 0.0,
            "seed": 7,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ]


def test_what_a_model_writes_moves_no_cursor_of_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ("run", "tiny", "hello", "--url")
    with told_server([delta("\x1b]0;title\x07a\x1b[2Jb\tc\nd\x9b31m\r"), *ANSWER[3:]]) as (url, _):
        assert run((*asked, url)) == 0
        assert capsys.readouterr().out == "\x1b]0;title\x07a\x1b[2Jb\tc\nd\x9b31m\r\n", "a pipe gets what came"
        monkeypatch.setattr("sys.stdout.isatty", lambda: True)
        assert run((*asked, url)) == 0
        assert capsys.readouterr().out == "?]0;title?a?[2Jb\tc\nd?31m?\n"


def test_run_prints_json_with_every_digit_of_the_cost(capsys: pytest.CaptureFixture[str]) -> None:
    usage = event({"choices": [], "usage": USAGE}).replace(b"3.4e-05", b"0.000000000000000000000034")
    with told_server([ANSWER[1], usage, ANSWER[-1]]) as (url, _):
        assert run(["run", "tiny", "hello", "--url", url, "--json"]) == 0
    out, _ = capsys.readouterr()
    assert json.loads(out)["receipt"] == RECEIPT
    assert json.loads(out)["text"] == "Bonjour, "
    assert "3.4e-23" in out.lower() or "0.000000000000000000000034" in out


def test_what_is_unpriced_is_said_to_be(capsys: pytest.CaptureFixture[str]) -> None:
    usage = event({"choices": [], "usage": {**USAGE, "cost": None, "prompt_tokens": None}})
    with told_server([usage, ANSWER[-1]]) as (url, _):
        assert run(["run", "tiny", "hello", "--url", url]) == 0
    assert "[unknown tokens in, 2 out; unpriced (assumed)" in capsys.readouterr().err


def test_run_reads_the_prompt_from_stdin(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stdin", StringIO("from a pipe"))
    with told_server(ANSWER) as (url, told):
        assert run(["run", "tiny", "-", "--url", url]) == 0
    assert told.asked[0]["messages"] == [{"role": "user", "content": "from a pipe"}]


@pytest.mark.parametrize(
    ("answer", "refusal", "message"),
    [
        ([], (404, b'{"error": {"message": "No model `tiny` here."}}'), "No model `tiny` here."),
        ([], (502, b"<html>bad gateway</html>"), "the server says 502 Bad Gateway: is it a Millicent?"),
        ([], (400, b'{"detail": "x"}'), "the server says 400 Bad Request: is it a Millicent?"),
        ([ANSWER[1], event({"error": {"message": "The engine ended."}})], None, "The engine ended."),
        ([ANSWER[1]], None, "the answer was cut off"),
    ],
)
def test_what_the_server_refuses_is_one_line(
    answer: list[bytes], refusal: tuple[int, bytes] | None, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with told_server(answer, refusal) as (url, _):
        assert run(["run", "tiny", "hello", "--url", url]) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1


def test_a_key_in_the_environment_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILLICENT_API_KEY", "mk-1")
    with told_server(ANSWER) as (url, told):
        assert run(["run", "tiny", "hello", "--url", url]) == 0
    assert told.keys == ["Bearer mk-1"]


def test_chat_remembers_the_turns_and_shows_each_cost(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", StringIO("one\n\ntwo\n/bye\nthree\n"))
    with told_server(ANSWER) as (url, told):
        assert run(["chat", "--url", url, "--system", "Be brief."]) == 0
    out, err = capsys.readouterr()
    assert out == "Bonjour, monde\nBonjour, monde\n"
    assert err.count("3.4 millicents (assumed)") == 2
    assert [turn["content"] for turn in told.asked[1]["messages"]] == ["Be brief.", "one", "Bonjour, monde", "two"]


def test_chat_goes_on_after_an_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stdin", StringIO("one\ntwo\n"))
    with told_server([], (429, b'{"error": {"message": "Too many at once."}}')) as (url, told):
        assert run(["chat", "--url", url]) == 0
    assert capsys.readouterr().err.count("error: Too many at once.") == 2
    assert [len(body["messages"]) for body in told.asked] == [1, 1]


def test_without_a_server_chat_says_how_to_start_one(capsys: pytest.CaptureFixture[str]) -> None:
    with told_server([]) as (url, _):
        pass
    assert run(["chat", "--url", url]) == 1
    assert capsys.readouterr().err == f"error: no server answers at {url}: start one with `millicent serve`.\n"


@pytest.mark.parametrize("url", ["127.0.0.1:8080", "ftp://x", "http://"])
def test_an_address_that_is_none_is_refused(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["chat", "--url", url]) == 1
    assert "is no address of a server" in capsys.readouterr().err


def test_stopping_an_answer_early_closes_the_connection() -> None:
    with told_server(ANSWER) as (url, _):
        answered = Answered()
        answer = Client(url).chat({"model": "tiny", "messages": []}, answered)
        assert next(answer) == "Bonjour, "
        answer.close()
        assert answered.receipt == RECEIPT


def test_run_starts_a_server_of_its_own_where_none_serves_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MILLICENT_HOME", str(tmp_path / "home"))
    tiny = write_tiny_model(tmp_path / "mine")
    with told_server([]) as (url, told):
        assert run(["run", str(tiny), "hello", "--url", url, "--max-tokens", "3", "--json"]) == 0
        assert told.asked == []
    answer = json.loads(capsys.readouterr().out)
    assert answer["model"] == "mine"
    assert run(["receipts", answer["receipt"]]) == 0
    assert "succeeded" in capsys.readouterr().out


def test_a_server_that_cannot_start_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MILLICENT_HOME", str(tmp_path / "home"))
    (tmp_path / "broken.gguf").write_bytes(b"not a model")
    with told_server([]) as (url, _):
        assert run(["run", str(tmp_path / "broken.gguf"), "hello", "--url", url]) == 1
    first, second = capfd.readouterr().err.splitlines()[-2:]
    assert "broken.gguf" in first
    assert second.startswith("error: the server that was started for this ended")
