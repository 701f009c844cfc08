"""Graded pairs, as they are kept in CSV files: what a difficulty score is learned from."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from millicent.core.errors import ConfigError
from millicent.routing.difficulty import Pair

_GRADES = {"true": 1.0, "false": 0.0}


def read_pairs(paths: Iterable[Path]) -> list[Pair]:
    """Three columns under a line of headings: the prompt, the weak model's grade, the strong one's; grades are numbers
    from 0 to 1, or true and false. Raises ConfigError naming the file and the line."""
    pairs: list[Pair] = []
    for path in paths:
        try:
            with path.open(encoding="utf-8", newline="") as file:
                rows = csv.reader(file)
                next(rows, None)
                pairs += [_pair(row, f"{path}:{rows.line_num}") for row in rows if row]
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise ConfigError(f"{path}: cannot be read as CSV ({error})") from error
    if not pairs:
        raise ConfigError("there are no pairs in what was given: write prompt, weak grade, strong grade in each line")
    return pairs


def read_contaminated(path: Path) -> list[str]:
    """Prompts that are to be left out, a JSON object in each line: its `eval_prompt`, or its `prompt`."""
    prompts = []
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from error
    for number, line in enumerate(lines, 1):
        try:
            told = msgspec.json.decode(line, type=dict[str, object])
        except msgspec.DecodeError as error:
            raise ConfigError(f"{path}:{number}: no JSON object ({error})") from error
        prompt = told.get("eval_prompt", told.get("prompt"))
        if not isinstance(prompt, str):
            raise ConfigError(f"{path}:{number}: has neither `eval_prompt` nor `prompt`")
        prompts.append(prompt)
    return prompts


def without(pairs: Sequence[Pair], contaminated: Iterable[str]) -> list[Pair]:
    """The pairs whose prompt isn't one of these, spaces aside."""
    known = {plain(prompt) for prompt in contaminated}
    return [pair for pair in pairs if plain(pair.prompt) not in known]


def plain(prompt: str) -> str:
    return " ".join(prompt.split())


def _pair(row: Sequence[str], at: str) -> Pair:
    if len(row) != 3:
        raise ConfigError(f"{at}: has {len(row)} columns: write prompt, weak grade, strong grade")
    return Pair(row[0], *(_grade(each, at) for each in row[1:]))


def _grade(text: str, at: str) -> float:
    try:
        grade = _GRADES.get(text.strip().lower())
        grade = float(text) if grade is None else grade
    except ValueError:
        grade = -1.0
    if not 0 <= grade <= 1:
        raise ConfigError(f"{at}: the grade {text[:40]!r} is no number from 0 to 1, nor true or false")
    return grade
