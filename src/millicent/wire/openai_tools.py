"""Tools in OpenAI's chat: what may be called, what was called, and the calls of an answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec

from millicent.core.chunks import CallPiece
from millicent.core.errors import InvalidRequest
from millicent.core.receipts import Receipt
from millicent.core.request import Tool, ToolCall
from millicent.wire.output_format import schema_text

Name = Annotated[str, msgspec.Meta(pattern="^[a-zA-Z0-9_-]{1,64}$")]


class Function(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`strict` false is taken as true where a call is enforced: its arguments follow the schema either way."""

    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FunctionTool(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="function"):
    function: Function


class Named(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str


class NamedChoice(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="function"):
    function: Named


class CalledFunction(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    arguments: str


class Called(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="function"):
    id: str
    function: CalledFunction
    index: int | None = None


Tools = Annotated[list[FunctionTool], msgspec.Meta(max_length=128)]
Choice = Literal["auto", "none", "required"] | NamedChoice


def read_tools(functions: Sequence[Function], inside: str = ".function") -> tuple[Tool, ...]:
    """`inside` is where in a tool its function's fields stand."""
    read: dict[str, Tool] = {}
    for index, function in enumerate(functions):
        where = f"tools[{index}]{inside}"
        if function.name in read:
            raise InvalidRequest(
                f"`{where}.name` is `{function.name}`, like an earlier tool's: give each its own.",
                param=f"{where}.name",
            )
        parameters = function.parameters or {"type": "object", "properties": {}}
        if parameters.get("type", "object") != "object":
            raise InvalidRequest(
                f"`{where}.parameters.type` must be `object`: arguments have names.", param=f"{where}.parameters"
            )
        source = schema_text(parameters, f"{where}.parameters")
        read[function.name] = Tool(function.name, function.description or "", source, strict=function.strict)
    return tuple(read.values())


def read_choice(choice: Choice | None, tools: Sequence[Tool]) -> tuple[Literal["auto", "none", "required"], str | None]:
    """Whether a tool is to be called, and which."""
    if isinstance(choice, NamedChoice):
        name = choice.function.name
        if name not in {tool.name for tool in tools}:
            raise InvalidRequest(f"`tool_choice` names `{name}`, which is not in `tools`: add it.", param="tool_choice")
        return "required", name
    if choice == "required" and not tools:
        raise InvalidRequest("`tool_choice` is `required`, and there are no `tools`: send some.", param="tool_choice")
    return choice or "auto", None


def read_calls(calls: Sequence[Called], where: str) -> tuple[ToolCall, ...]:
    """Calls of an earlier answer, sent back."""
    for index, call in enumerate(calls):
        check_arguments(sent_back(call.function.arguments), f"{where}.tool_calls[{index}].function.arguments")
    return tuple(ToolCall(call.id, call.function.name, sent_back(call.function.arguments)) for call in calls)


def sent_back(arguments: str) -> str:
    """Some clients send back nothing for no arguments."""
    return arguments if arguments.strip() else "{}"


def check_arguments(arguments: str, where: str) -> None:
    """Raises InvalidRequest where they are no JSON object."""
    try:
        found = msgspec.json.decode(arguments.encode("utf-8", "surrogatepass"))
    except (msgspec.DecodeError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise InvalidRequest(f"`{where}` is not a JSON object: send it as the answer had it.", param=where)


def call_id(receipt: Receipt, choice: int, index: int) -> str:
    """The same whenever the answer is given again."""
    return f"call_{receipt.id.removeprefix('rcpt_')}_{choice}_{index}"


def calls_body(receipt: Receipt, choice: int, calls: Sequence[CallPiece]) -> list[dict[str, Any]]:
    """The calls of a whole answer."""
    return [
        {
            "id": call_id(receipt, choice, call.index),
            "type": "function",
            "function": {"name": call.name, "arguments": call.arguments},
        }
        for call in calls
    ]


def piece_body(receipt: Receipt, choice: int, piece: CallPiece) -> dict[str, Any]:
    """A call's piece in a stream: the first has its identifier and its name."""
    if not piece.name:
        return {"index": piece.index, "function": {"arguments": piece.arguments}}
    return {
        "index": piece.index,
        "id": call_id(receipt, choice, piece.index),
        "type": "function",
        "function": {"name": piece.name, "arguments": piece.arguments},
    }
