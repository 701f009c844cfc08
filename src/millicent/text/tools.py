"""Tools: how a model is told of them, how it is made to call them, and how its calls are found in its text.

Three ways of writing calls are known, each the one its models were trained on:

- tagged: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, anywhere in the text, several in a row. Qwen's,
  and that of every model whose template knows no tools: those are told of it in the system message.
- listed: `[TOOL_CALLS] [{"name": ..., "arguments": {...}}, ...]`, where an answer ends. Mistral's.
- bare: an answer that is nothing but `{"name": ..., "parameters": {...}}`. Llama 3's, which makes one call at a time.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

from millicent.core.chunks import CallPiece, merge_pieces
from millicent.core.errors import InvalidRequest
from millicent.core.request import FAILED_CALL, Message, OutputFormat, Request, Tool, ToolCall
from millicent.text.grammars import format_grammar, json_term, parse_schema


@dataclass(frozen=True)
class ToolFormat:
    """`in_template`: the model's own template tells it of the tools, and writes calls and results. `listed`: one
    opening and closing hold all calls. `short_ids`: it takes no identifiers of calls but nine letters and digits."""

    opening: str
    closing: str
    arguments: str
    in_template: bool
    listed: bool = False
    short_ids: bool = False

    def write(self, call: ToolCall) -> str:
        body = f'{{"name": {json.dumps(call.name, ensure_ascii=False)}, "{self.arguments}": {call.arguments}}}'
        return f"{self.opening}\n{body}\n{self.closing}" if self.opening else body


_TAGGED = ToolFormat("<tool_call>", "</tool_call>", "arguments", in_template=True)
_TOLD = ToolFormat("<tool_call>", "</tool_call>", "arguments", in_template=False)
_LISTED = ToolFormat("[TOOL_CALLS]", "]", "arguments", in_template=True, listed=True, short_ids=True)
_BARE = ToolFormat("", "", "parameters", in_template=True)
# Control tokens that a model writes where it calls: they are text to whoever looks for calls.
CALL_TOKENS = frozenset({_LISTED.opening})


def tool_format(template: str) -> ToolFormat:
    """The format of the model with this chat template."""
    if not re.search(r"\btools\b", template):
        return _TOLD
    if "<tool_call>" in template and "<function=" not in template:
        return _TAGGED
    if _LISTED.opening in template and "[ARGS]" not in template:  # newer ones of Mistral's write calls otherwise
        return _LISTED
    if "<|python_tag|>" in template or '"parameters"' in template:
        return _BARE
    return _TOLD


# Telling the model.


def tool_entries(tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """The tools as templates take them."""
    return [
        {
            "type": "function",
            "function": {
                "name": tool.name,
                "description": tool.description,
                "parameters": json.loads(tool.parameters),
            },
        }
        for tool in tools
    ]


def message_entries(messages: Sequence[Message], tools: Sequence[Tool], form: ToolFormat) -> list[dict[str, Any]]:
    """The messages as templates take them; with the tools and their calls written out where the template knows none."""
    if form.in_template:
        return [_entry(message, form) for message in messages]
    told = [_written(message, form) for message in messages]
    if tools:
        listed = "\n".join(json.dumps(entry, ensure_ascii=False) for entry in tool_entries(tools))
        before = told.pop(0)["content"] + "\n\n" if told and told[0]["role"] == "system" else ""
        told.insert(0, {"role": "system", "content": before + _PROMPT.format(tools=listed)})
    return told


_PROMPT = """You may call functions to help with what the user asks. These are the functions, one JSON object per line:
<tools>
{tools}
</tools>

To call a function, answer with its name and its arguments as JSON, between these tags:
<tool_call>
{{"name": "the function's name", "arguments": {{"the argument's name": "its value"}}}}
</tool_call>"""


def _entry(message: Message, form: ToolFormat) -> dict[str, Any]:
    entry: dict[str, Any] = {"role": message.role, "content": _told(message)}
    if message.name is not None:
        entry["name"] = message.name
    if message.tool_call_id is not None:
        entry["tool_call_id"] = _call_id(message.tool_call_id, form)
    if message.tool_calls:
        entry["tool_calls"] = [
            {
                "id": _call_id(call.id, form),
                "type": "function",
                "function": {"name": call.name, "arguments": json.loads(call.arguments)},
            }
            for call in message.tool_calls
        ]
    return entry


def _told(message: Message) -> str:
    """Its text; templates have no other place for what went wrong."""
    return FAILED_CALL + message.text if message.failed else message.text


def _call_id(given: str, form: ToolFormat) -> str:
    return hashlib.blake2b(given.encode(), digest_size=5).hexdigest()[:9] if form.short_ids else given


def _written(message: Message, form: ToolFormat) -> dict[str, Any]:
    if message.role == "tool":
        return {"role": "user", "content": f"<tool_response>\n{_told(message)}\n</tool_response>"}
    calls = [form.write(call) for call in message.tool_calls]
    plain = Message(message.role, "\n".join([message.text, *calls] if message.text else calls), message.name)
    return _entry(plain if calls else message, form)


# Making it call.


def answer_grammar(request: Request, form: ToolFormat) -> str:
    """What the answer may be; empty where it may be anything. Raises InvalidRequest."""
    wanted = request.output_format
    if not request.tools or request.tool_choice == "none":
        return format_grammar(wanted) if wanted is not None else ""
    tools = [tool for tool in request.tools if request.tool_name in {None, tool.name}]
    rules = [f"tool_{index}: {_body(tool, form)}" for index, tool in enumerate(tools)]
    rules.append("body: " + " | ".join(f"tool_{index}" for index in range(len(tools))))
    several = bool(form.opening) and request.parallel_tool_calls
    if form.listed:
        rules.append(r'bodies: body (", " body)*' if several else "bodies: body")
        inside, calls = '" [" bodies "]"', "call"
    else:
        inside, calls = rf'"\n" body "\n{form.closing}"', r'call ("\n" call)*' if several else "call"
    rules.append(f'call: "{form.opening}" {inside}' if form.opening else "call: body")
    if request.tool_choice == "required":
        return "\n".join([f"start: {calls}", *rules])
    if wanted is not None:
        return "\n".join([f"start: {calls} | answer", "answer: " + _json_answer(wanted), *rules])
    if not form.opening:  # what begins like a call is one from there on
        heads = "|".join(re.escape(_head(tool, form)).replace("/", r"\/") for tool in tools)
        return "\n".join(["start: call | OTHER", rf"OTHER: /(.|\n)*/ & ~/({heads})(.|\n)*/", *rules])
    rules.append(rf'begun[lazy]: TEXT "{form.opening}"')
    rules.append(f"called: begun {inside}")
    rules.append(r"TEXT: /(.|\n)*/")
    return "\n".join(["start: called* TEXT" if several and not form.listed else "start: called | TEXT", *rules])


def _head(tool: Tool, form: ToolFormat) -> str:
    return f'{{"name": {json.dumps(tool.name)}, "{form.arguments}": '


def _body(tool: Tool, form: ToolFormat) -> str:
    return f'{json.dumps(_head(tool, form))} {json_term({"type": "object"} | parse_schema(tool.parameters))} "}}"'


def _json_answer(wanted: OutputFormat) -> str:
    if wanted.kind not in {"json_object", "json_schema"}:
        raise InvalidRequest(
            "response_format: a grammar doesn't go with `tools`; send a JSON schema, or leave one of them out",
            param="response_format",
        )
    return format_grammar(wanted).removeprefix("start: ")


# Finding its calls.


class _State(Enum):
    TEXT = auto()
    HEAD = auto()
    ARGUMENTS = auto()
    TAIL = auto()


class ToolCallParser:
    """One answer's text as it comes: what is content, and what belongs to which call.

    It goes by characters, so where the pieces are cut changes nothing. What begins like a call but names no known tool,
    or has no arguments, is content after all. Once a call's arguments have begun they are passed on as they come; an
    answer that is cut off leaves them unfinished.
    """

    def __init__(self, form: ToolFormat, names: Sequence[str]) -> None:
        self.calls = 0
        self._opening = form.opening
        self._closing = form.closing
        self._listed = form.listed
        self._names = frozenset(names)
        self._before = form.opening  # what stands before the call that may be about to begin
        self._head = re.compile(rf'\s*\{{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"{form.arguments}"\s*:\s*\{{')
        self._state = _State.TEXT if form.opening else _State.HEAD
        self._held = ""  # what isn't decided
        self._depth = 0
        self._in_string = self._escaped = False
        self._content: list[str] = []
        self._pieces: list[CallPiece] = []

    def feed(self, text: str) -> tuple[str, tuple[CallPiece, ...]]:
        """The content and the pieces of calls that this adds."""
        for character in text:
            match self._state:
                case _State.TEXT:
                    self._text(character)
                case _State.HEAD:
                    self._begin(character)
                case _State.ARGUMENTS:
                    self._argument(character)
                case _State.TAIL:
                    self._end(character)
        return self._news()

    def finish(self) -> tuple[str, tuple[CallPiece, ...]]:
        """What was held back, now that no more text comes."""
        if self._state is not _State.TAIL and self._held.strip():
            self._content.append(self._held)
        self._held = ""
        return self._news()

    def _news(self) -> tuple[str, tuple[CallPiece, ...]]:
        content, pieces = "".join(self._content), merge_pieces(self._pieces)
        self._content, self._pieces = [], []
        return content, pieces

    def _text(self, character: str) -> None:
        self._held += character
        if self._opening and self._held.endswith(self._opening):
            self._content.append(self._between(self._held.removesuffix(self._opening)))
            self._held = self._opening
            self._state = _State.HEAD
            return
        kept = next(
            (size for size in range(min(len(self._held), len(self._opening)), 0, -1)
             if self._held.endswith(self._opening[:size])), 0,
        )  # fmt: skip
        decided = self._held[: len(self._held) - kept]
        if self.calls and not decided.strip():
            return  # white space between calls is nobody's
        self._content.append(decided)
        self._held = self._held[len(decided) :]

    def _between(self, text: str) -> str:
        return text if text.strip() or not self.calls else ""

    def _begin(self, character: str) -> None:
        self._held += character
        body = self._held[len(self._before) :]
        if self._listed and self._before == self._opening and body.strip() == "[":
            self._before = self._held
            return
        if (found := self._head.fullmatch(body)) and (name := _unquoted(found[1])) in self._names:
            self._pieces.append(CallPiece(self.calls, name, "{"))
            self.calls += 1
            self._held = ""
            self._depth, self._in_string, self._escaped = 1, False, False
            self._state = _State.ARGUMENTS
        elif found or self._cannot_begin("".join(body.split())) or self._closed(body):
            self._content.append(self._held)
            self._held = ""
            self._before = self._opening
            self._state = _State.TEXT

    def _cannot_begin(self, body: str) -> bool:
        if self._listed and self._before == self._opening and body:
            return True  # it is no list
        return not _BEGINNING.startswith(body[: len(_BEGINNING)])

    def _closed(self, body: str) -> bool:
        return bool(self._closing) and body.endswith(self._closing)

    def _argument(self, character: str) -> None:
        self._pieces.append(CallPiece(self.calls - 1, "", character))
        if self._in_string:
            if self._escaped:
                self._escaped = False
            elif character == "\\":
                self._escaped = True
            elif character == '"':
                self._in_string = False
        elif character == '"':
            self._in_string = True
        elif character in "{[":
            self._depth += 1
        elif character in "}]":
            self._depth -= 1
            if self._depth == 0:
                self._state = _State.TAIL

    def _end(self, character: str) -> None:
        self._held += character
        ending = "".join(self._held.split())
        wanted = "}" + self._closing
        if self._listed and ending == "},":
            self._before = self._held
            self._state = _State.HEAD
        elif ending == wanted:
            self._held = ""
            self._before = self._opening
            self._state = _State.TEXT
        elif not wanted.startswith(ending):  # the model left the end out, and went on
            self._state = _State.TEXT
            self._before = self._opening
            held, self._held = self._held.lstrip().removeprefix("}"), ""
            for each in held:  # too short to hold another beginning whole
                self._text(each)


_BEGINNING = '{"name":"'


def _unquoted(text: str) -> str:
    try:
        return str(json.loads(text))
    except ValueError:
        return ""
