"""JSON with anything in any place of it."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

_ANYTHING = [
    b"null", b"true", b"0", b"-1", b"1.5", b"1e308", b"1e999", b"9" * 30, b"-" + b"9" * 5000, b"NaN", b"Infinity",
    b'""', b'"x"', b'"%s"' % (b"9" * 5000), b'"a\\nb\\u0000"', b'"\\ud800"', b'"\xff"', b'"\xed\xa0\x80"',
    b"[]", b"{}", b"[null]", b"[[]]", b'[1,"x"]', b'{"a":1,"a":2}', b'{"\xff":1}', b'{"type":"text"}', b'{"type":1}',
    b"2147483648", b"9223372036854775807", b"3.0",
    b"[" * 900 + b"]" * 900, b"[" * 100_000 + b"]" * 100_000, b'"data:image/png;base64,"', b'"http://["', b'"x',
]  # fmt: skip


def _places(value: Any, at: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Every value's, and one of a field that nobody knows in every object."""
    yield at
    if isinstance(value, dict):
        yield (*at, "zz")
        for key, inner in value.items():
            yield from _places(inner, (*at, key))
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from _places(inner, (*at, i))


def _with_a_word(value: Any, at: tuple[str | int, ...]) -> bytes:
    """The body, with a word in that place that stands nowhere else."""
    if not at:
        return b'"@@"'
    changed = copy.deepcopy(value)
    inner = changed
    for key in at[:-1]:
        inner = inner[key]
    inner[at[-1]] = "@@"
    return json.dumps(changed).encode()


def anything_anywhere(body: Any) -> Iterator[bytes]:
    for at in _places(body):
        around = _with_a_word(body, at)
        for something in _ANYTHING:
            yield around.replace(b'"@@"', something)
