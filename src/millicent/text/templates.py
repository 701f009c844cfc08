"""Chat templates: a model's own Jinja, run in a sandbox, in which a message's content cannot speak for the template.

A template writes its turns with special tokens (`<|im_start|>`). If a user's text holds the same characters, it must
stay text. So each message is rendered with a guard, a character that occurs in none of them, put inside whatever
looks like a special token, and at its edges where it could complete one with its neighbour. What the template does
with content (trim, split, compare) works as before; what comes out and still looks like a special token is the
template's own. The guards are taken out again before the rest is encoded as plain text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from datetime import datetime
from itertools import chain
from typing import TYPE_CHECKING, Any

from millicent.core.clock import NS_PER_S, Clock
from millicent.core.errors import InvalidRequest, ModelError

if TYPE_CHECKING:
    import jinja2

# A template comes with a model, from anywhere. A long conversation takes some thousand turns.
_MOST_TURNS = 300_000
_MOST_CHARACTERS = 1 << 26
_turns_left: ContextVar[int] = ContextVar("turns_left")


class ChatTemplate:
    """`tokens` are the names that templates expect: bos_token, eos_token and the like.

    A rendering may take `_MOST_TURNS` turns of loops and calls of macros, and make `_MOST_CHARACTERS`.
    """

    def __init__(self, source: str, tokens: Mapping[str, str], clock: Clock) -> None:
        self.source = source
        self._tokens = dict(tokens)
        self._clock = clock
        self._compiled: jinja2.Template | None = None

    def render(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = (), *, thinking: bool = True
    ) -> str:
        """Without `thinking`, the template is told so by the name that most know; others ignore it."""
        import jinja2

        switch = {} if thinking else {"enable_thinking": False}

        if self._compiled is None:
            self._compiled = self._compile()
        _turns_left.set(_MOST_TURNS)
        try:
            return _joined(
                self._compiled.generate(
                    messages=messages, tools=tools or None, add_generation_prompt=True, **switch, **self._tokens
                )
            )
        except jinja2.TemplateError as error:
            reason = error.message or type(error).__name__
        except (
            TypeError,
            ValueError,
            LookupError,
            AttributeError,
            ArithmeticError,
            RecursionError,
            MemoryError,
        ) as error:
            reason = str(error) or type(error).__name__
        raise InvalidRequest(
            f"messages: this model's chat template cannot take them ({reason}); change the roles or their order",
            param="messages",
        )

    def _compile(self) -> jinja2.Template:
        import jinja2
        from jinja2 import nodes
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        class Environment(ImmutableSandboxedEnvironment):
            def call(self, /, *args: Any, **kwargs: Any) -> Any:
                _spend_turn()
                return super().call(*args, **kwargs)

        environment = Environment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
        environment.filters["tojson"] = _to_json
        environment.filters["counted"] = _counted
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = self._strftime_now

        def counted(iterable: Any) -> nodes.Filter:
            return nodes.Filter(iterable, "counted", [], [], None, None, environment=environment)

        try:
            tree = environment.parse(self.source)
            for loop in tree.find_all(nodes.For):
                loop.iter = counted(loop.iter)
            for call in tree.find_all(nodes.Call):
                if isinstance(call.node, nodes.Name) and call.node.name == "loop":  # a loop that enters itself
                    call.args = list(map(counted, call.args))
            return environment.from_string(tree)
        except jinja2.TemplateSyntaxError as error:
            raise ModelError(
                f"the model's chat template is not valid Jinja (line {error.lineno}: {error.message}); "
                "use /v1/completions or another build of the model"
            ) from None

    def _strftime_now(self, form: str) -> str:
        return datetime.fromtimestamp(self._clock.now_ns() / NS_PER_S).astimezone().strftime(form)


def _spend_turn() -> None:
    left = _turns_left.get() - 1
    if left < 0:
        _raise_exception(f"it takes more than {_MOST_TURNS} turns")
    _turns_left.set(left)


def _counted(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        _spend_turn()
        yield value


def _joined(pieces: Iterable[str]) -> str:
    found: list[str] = []
    characters = 0
    for piece in pieces:
        characters += len(piece)
        if characters > _MOST_CHARACTERS:
            _raise_exception(f"it makes more than {_MOST_CHARACTERS} characters")
        found.append(piece)
    return "".join(found)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON: Jinja's own filter escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    import jinja2

    raise jinja2.TemplateError(message)


class SpecialTokens:
    """The texts that stand for one control token each, and how to keep them out of what users wrote.

    `strips` holds those that swallow white space on their left and right.
    """

    def __init__(self, tokens: Mapping[str, int], strips: Mapping[str, tuple[bool, bool]]) -> None:
        self._tokens = dict(tokens)
        longest_first = sorted(tokens, key=len, reverse=True)
        self._found = _alternatives(_with_strips(token, *strips.get(token, (False, False))) for token in longest_first)
        # A guard goes between two characters, so a token of a single one cannot be guarded.
        guarded = [token for token in longest_first if len(token) > 1]
        self._guarded = _alternatives(re.escape(token) for token in guarded)
        self._beginnings = tuple({token[:end] for token in guarded for end in range(1, len(token))})
        self._endings = tuple({token[start:] for token in guarded for start in range(1, len(token))})

    def guard(self, values: Any) -> tuple[str, Any]:
        """The guard that was chosen, and what templates are given (texts in lists and mappings), guarded."""
        guard = _unused_character(_texts(values))
        return guard, self._guarded_value(values, guard)

    def _guarded_value(self, value: Any, guard: str) -> Any:
        if isinstance(value, str):
            return self._guard_text(value, guard)
        if isinstance(value, dict):
            return {self._guarded_value(key, guard): self._guarded_value(each, guard) for key, each in value.items()}
        if isinstance(value, list | tuple):
            return [self._guarded_value(each, guard) for each in value]
        return value

    def encode(self, text: str, encode_plain: Callable[[str], list[int]]) -> list[int]:
        """Token ids of a text whose special tokens count; what lies between goes to `encode_plain`."""
        tokens: list[int] = []
        position = 0
        for match in self._found.finditer(text):
            tokens += encode_plain(text[position : match.start()])
            found = match[0]
            tokens.append(self._tokens[found] if found in self._tokens else self._tokens[found.strip()])
            position = match.end()
        return tokens + encode_plain(text[position:])

    def _guard_text(self, text: str, guard: str) -> str:
        # Again until nothing is left, because matches may overlap.
        while self._guarded.search(text):
            text = self._guarded.sub(lambda match: match[0][0] + guard + match[0][1:], text)
        bare = text.strip()
        if not bare:
            return text
        start = text.index(bare)
        end = start + len(bare)
        left = guard if bare.startswith(self._endings) else ""
        right = guard if bare.endswith(self._beginnings) else ""
        return text[:start] + left + bare + right + text[end:]


def _alternatives(patterns: Iterable[str]) -> re.Pattern[str]:
    return re.compile("|".join(patterns) or r"(?!)")


def _with_strips(token: str, left: bool, right: bool) -> str:
    space = r"\s*"
    return (space if left else "") + re.escape(token) + (space if right else "")


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, each in value.items():
            yield from _texts(key)
            yield from _texts(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _texts(each)


def _unused_character(texts: Iterable[str]) -> str:
    """A character that is in none of the texts: noncharacters first, which text isn't meant to hold."""
    used = set(chain.from_iterable(texts))
    for code in chain(range(0xFDD0, 0xFDF0), range(0xE000, 0x110000)):
        if chr(code) not in used:
            return chr(code)
    raise InvalidRequest("messages: they hold every private character of Unicode; leave one out", param="messages")
