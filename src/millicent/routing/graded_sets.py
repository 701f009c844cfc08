"""A set of prompts with what a good answer to each is: what models are compared by."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import msgspec

from millicent.core.chunks import Text
from millicent.core.errors import ConfigError
from millicent.core.request import Message, Request
from millicent.routing.checks import Checks
from millicent.routing.config import VerifyConfig


class _Line(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    max_tokens: int | None = None
    expect: str | None = None
    pattern: str | None = None
    json_schema: dict[str, Any] | None = None
    judge: str | None = None


class Item(msgspec.Struct, frozen=True):
    """`id` follows from what the line says: a line that is changed is another item."""

    id: str
    body: dict[str, Any]
    question: str
    expect: str | None
    checks: Checks
    judged_by: str | None

    def passes(self, answer: str) -> bool:
        """All but the judge."""
        if self.expect is not None and answer.strip() != self.expect.strip():
            return False
        return self.checks.failure((Text(answer, 0),)) is None

    def asked_of_judge(self, answer: str) -> dict[str, Any]:
        """A request to the judge, for an item that has one."""
        asked = Request(id=self.id, dialect="openai.chat", model="", messages=(Message("user", self.question),))
        judged = self.checks.asked_of_judge(asked, (Text(answer, 0),))
        return {
            "model": judged.model,
            "messages": [{"role": each.role, "content": each.text} for each in judged.messages or ()],
            "max_tokens": judged.limits.max_tokens,
            "temperature": 0,
        }


class Graded(msgspec.Struct, frozen=True):
    """One model's answer to one item, as it is kept: without a word of the answer."""

    item: str
    model: str
    passed: bool
    cost_usd: str | None
    judge_cost_usd: str | None
    latency_ms: int
    receipt: str | None


def read_set(path: Path, judge: str | None) -> list[Item]:
    """A JSON object in each line: `prompt` or `messages`, perhaps `max_tokens`; and one or more of `expect` (the whole
    answer, spaces around it aside), `pattern`, `json_schema` and `judge`, a question for the model `judge`. Raises
    ConfigError naming the line."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from error
    items = [_item(line, f"{path}:{number}", judge) for number, line in enumerate(lines, 1) if line.strip()]
    if not items:
        raise ConfigError(f"{path}: holds no prompts: write a JSON object in each line")
    if len({item.id for item in items}) < len(items):
        raise ConfigError(f"{path}: holds the same line twice: take one out")
    return items


def read_graded(path: Path) -> dict[tuple[str, str], Graded]:
    """What was graded before, by item and model. A last line that was cut off is taken away. Raises ConfigError."""
    if not path.exists():
        return {}
    lines = path.read_bytes().splitlines(keepends=True)
    if lines and not lines[-1].endswith(b"\n"):
        path.write_bytes(b"".join(lines[:-1]))
        lines.pop()
    try:
        found = [msgspec.json.decode(line, type=Graded) for line in lines]
    except msgspec.DecodeError as error:
        raise ConfigError(f"{path}: not what `eval` keeps ({error}): name another file with --results") from error
    return {(each.item, each.model): each for each in found}


def _item(line: bytes, at: str, judge: str | None) -> Item:
    try:
        told = msgspec.json.decode(line, type=_Line)
    except msgspec.DecodeError as error:
        raise ConfigError(f"{at}: {error}") from error
    if (told.prompt is None) == (told.messages is None):
        raise ConfigError(f"{at}: needs either `prompt` or `messages`")
    graders = (told.expect, told.pattern, told.json_schema, told.judge)
    if all(each is None for each in graders):
        raise ConfigError(f"{at}: nothing grades the answer: give expect, pattern, json_schema or judge")
    if told.judge is not None and judge is None:
        raise ConfigError(f"{at}: `judge` needs a model that judges: give --judge MODEL")
    messages = told.messages or [{"role": "user", "content": told.prompt}]
    config = VerifyConfig(pattern=told.pattern, json_schema=told.json_schema, judge=judge)
    if told.judge is not None:
        config = msgspec.structs.replace(config, judge_question=told.judge)
    body: dict[str, Any] = {"messages": messages, "temperature": 0}
    if told.max_tokens is not None:
        body["max_tokens"] = told.max_tokens
    judged_by = None if told.judge is None else judge
    said = "\n".join(f"{each.get('role')}: {each.get('content')}" for each in messages)
    name = hashlib.sha256(msgspec.json.encode([told, judged_by])).hexdigest()[:16]
    return Item(name, body, told.prompt or said, told.expect, Checks(config, at), judged_by)
