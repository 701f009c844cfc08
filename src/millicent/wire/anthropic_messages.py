"""Anthropic messages: `POST /v1/messages` and `POST /v1/messages/count_tokens`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import msgspec

from millicent.core.errors import InvalidRequest
from millicent.core.request import Extra, Limits, OutputFormat, Request, Sampling, Thinking, Tool
from millicent.wire import anthropic_content as content
from millicent.wire import openai_generation as generation
from millicent.wire.anthropic_common import check_version
from millicent.wire.attribution import read_attribution
from millicent.wire.decoding import decode_at, decode_with_extra, refuse_unless_neutral
from millicent.wire.openai_common import ModelName
from millicent.wire.output_format import schema_text

DIALECT = "anthropic.messages"
BETA_HEADER = "anthropic-beta"

_Share = Annotated[float, msgspec.Meta(ge=0, le=1)]


class MessageBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    role: Literal["user", "assistant", "system"]
    content: content.Content


class Metadata(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    user_id: Annotated[str, msgspec.Meta(max_length=256)] | None = None


class CustomTool(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`eager_input_streaming` is a hint: arguments come as they are made anyway."""

    name: Annotated[str, msgspec.Meta(pattern="^[a-zA-Z0-9_-]{1,128}$")]
    input_schema: dict[str, Any]
    type: str | None = None
    description: str | None = None
    cache_control: content.CacheControl | None = None
    strict: bool | None = None
    eager_input_streaming: bool | None = None
    allowed_callers: Any = None
    defer_loading: Any = None
    input_examples: Any = None


class Auto(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="auto"):
    disable_parallel_tool_use: bool | None = None


class AnyTool(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="any"):
    disable_parallel_tool_use: bool | None = None


class OneTool(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="tool"):
    name: str
    disable_parallel_tool_use: bool | None = None


class NoTool(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="none"):
    disable_parallel_tool_use: bool | None = None


class Enabled(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="enabled"):
    budget_tokens: Annotated[int, msgspec.Meta(ge=1, le=10_000_000)]
    display: Literal["summarized", "omitted"] | None = None


class Adaptive(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="adaptive"):
    display: Literal["summarized", "omitted"] | None = None


class Disabled(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="disabled"):
    """As long as nobody says otherwise."""


class JsonFormat(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="json_schema"):
    schema: dict[str, Any]


class OutputConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: JsonFormat | None = None


class MessagesBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A null is as good as a field left out."""

    # honoured
    model: ModelName
    messages: list[MessageBody]
    max_tokens: Annotated[int, msgspec.Meta(ge=0, le=10_000_000)] | None = None
    system: content.Content | None = None
    stream: bool | None = None
    temperature: _Share | None = None
    top_p: _Share | None = None
    top_k: Annotated[int, msgspec.Meta(ge=0)] | None = None
    stop_sequences: Annotated[list[generation.StopString], msgspec.Meta(max_length=16)] | None = None
    tools: Annotated[list[msgspec.Raw], msgspec.Meta(max_length=128)] | None = None
    tool_choice: Auto | AnyTool | OneTool | NoTool | None = None
    thinking: Enabled | Adaptive | Disabled | None = None
    output_config: OutputConfig | None = None
    metadata: Metadata | None = None
    # harmless hints: they ask for nothing that changes an answer
    cache_control: content.CacheControl | None = None
    service_tier: Literal["auto", "standard_only"] | None = None
    # refused by name unless neutral: what they bring has no place in an answer here
    container: Any = None
    mcp_servers: Any = None


_NEUTRAL: dict[str, tuple[Any, ...]] = {"container": (), "mcp_servers": ([],)}
_NEUTRAL_IN_TOOL: dict[str, tuple[Any, ...]] = {
    "allowed_callers": (["direct"],),
    "defer_loading": (False,),
    "input_examples": ([],),
}

_decoder = msgspec.json.Decoder(MessagesBody)
_KNOWN = frozenset(MessagesBody.__struct_fields__)


class _Kind(msgspec.Struct, frozen=True):
    type: str | None = None


_kind = msgspec.json.Decoder(_Kind)
_tool = msgspec.json.Decoder(CustomTool)


def decode(body: bytes, headers: Mapping[str, str], receipt_id: str) -> tuple[Request, None]:
    """Raises InvalidRequest, naming the field."""
    request = _decode(body, headers, receipt_id)
    if request.limits.max_tokens is None:
        raise InvalidRequest(
            "Missing required field `max_tokens`.", param="max_tokens", code="missing_required_parameter"
        )
    return request, None


def decode_count(body: bytes, headers: Mapping[str, str], receipt_id: str) -> Request:
    """What is to be counted: the same, and its answer's length doesn't matter. Raises InvalidRequest."""
    return _decode(body, headers, receipt_id)


def _decode(body: bytes, headers: Mapping[str, str], receipt_id: str) -> Request:
    check_version(headers)
    asked, extra = decode_with_extra(body, _decoder, _KNOWN)
    refuse_unless_neutral(asked, _NEUTRAL)
    if not asked.messages:
        raise InvalidRequest("`messages` is empty: send at least one message.", param="messages")
    messages = list(content.read_system(asked.system))
    for i, message in enumerate(asked.messages):
        messages += content.read_messages(message.role, message.content, f"messages[{i}]")
    tools = _read_tools(asked.tools or ())
    choice, name = _read_choice(asked.tool_choice, tools)
    return Request(
        id=receipt_id,
        dialect=DIALECT,
        model=asked.model,
        messages=tuple(messages),
        sampling=Sampling(
            temperature=1.0 if asked.temperature is None else asked.temperature,
            top_p=1.0 if asked.top_p is None else asked.top_p,
            top_k=asked.top_k or 0,
        ),
        limits=Limits(asked.max_tokens, tuple(asked.stop_sequences or ())),
        output_format=_output_format(asked.output_config),
        tools=tools,
        tool_choice=choice,
        tool_name=name,
        parallel_tool_calls=not (asked.tool_choice and asked.tool_choice.disable_parallel_tool_use),
        stream=bool(asked.stream),
        attribution=read_attribution(headers, user=asked.metadata.user_id if asked.metadata else None),
        thinking=_thinking(asked),
        extra=_extra(asked, headers) | extra,
        restated=tuple(field for field in ("temperature", "top_p") if getattr(asked, field) == 1.0),
        continues=messages[-1].role == "assistant",
    )


def _thinking(asked: MessagesBody) -> Thinking | None:
    effort = asked.output_config.effort if asked.output_config else None
    match asked.thinking:
        case Enabled(budget_tokens=budget):
            return Thinking(effort, budget)
        case Adaptive():
            return Thinking(effort)
        case Disabled():
            return Thinking("none")
        case _:
            return None


def _output_format(config: OutputConfig | None) -> OutputFormat | None:
    if config is None or config.format is None:
        return None
    return OutputFormat("json_schema", schema_text(config.format.schema, "output_config.format.schema"))


def _extra(asked: MessagesBody, headers: Mapping[str, str]) -> dict[str, Extra]:
    """What only an upstream of this dialect makes something of. A beta by itself asks for nothing: the fields that come
    with it do."""
    extra = {}
    if asked.cache_control is not None:
        extra["cache_control"] = _hint(asked.cache_control)
    if BETA_HEADER in headers:
        extra[BETA_HEADER] = _hint(headers[BETA_HEADER])
    if isinstance(asked.thinking, Enabled | Adaptive) and asked.thinking.display == "omitted":
        extra["thinking"] = _only_there(asked.thinking, "thinking.display")
    if not isinstance(asked.thinking, Enabled | Adaptive) and asked.output_config and asked.output_config.effort:
        extra["output_config"] = _only_there(asked.output_config, "output_config.effort")
    return extra


def _hint(value: object) -> Extra:
    return Extra(msgspec.json.encode(value).decode(), None)


def _only_there(value: object, field: str) -> Extra:
    refusal = f"`{field}` is not supported by this server: leave it out."
    return Extra(msgspec.json.encode(value).decode(), refusal, "unsupported_parameter")


def _read_tools(tools: Sequence[msgspec.Raw]) -> tuple[Tool, ...]:
    read: dict[str, Tool] = {}
    for i, raw in enumerate(tools):
        where = f"tools[{i}]"
        kind = decode_at(raw, _kind, where).type
        if kind not in {None, "custom"}:
            raise InvalidRequest(
                f"`{where}` is a `{kind}` tool: this server takes only `custom` ones, with a schema of their own.",
                param=f"{where}.type",
                code="unsupported_parameter",
            )
        tool = decode_at(raw, _tool, where)
        refuse_unless_neutral(tool, _NEUTRAL_IN_TOOL, where)
        if tool.name in read:
            raise InvalidRequest(
                f"`{where}.name` is `{tool.name}`, like an earlier tool's: give each its own.", param=f"{where}.name"
            )
        if tool.input_schema.get("type") != "object":
            at = f"{where}.input_schema.type"
            raise InvalidRequest(f"`{at}` must be `object`: arguments have names.", param=at)
        schema = schema_text(tool.input_schema, f"{where}.input_schema")
        cache = content.cache_of(tool.cache_control)
        read[tool.name] = Tool(tool.name, tool.description or "", schema, cache, tool.strict)
    return tuple(read.values())


def _read_choice(
    choice: Auto | AnyTool | OneTool | NoTool | None, tools: Sequence[Tool]
) -> tuple[Literal["auto", "none", "required"], str | None]:
    """Whether a tool is to be called, and which."""
    match choice:
        case OneTool(name=name):
            if name not in {tool.name for tool in tools}:
                raise InvalidRequest(
                    f"`tool_choice` names `{name}`, which is not in `tools`: add it.", param="tool_choice.name"
                )
            return "required", name
        case AnyTool():
            if not tools:
                raise InvalidRequest(
                    "`tool_choice` is `any`, and there are no `tools`: send some.", param="tool_choice"
                )
            return "required", None
        case NoTool():
            return "none", None
        case _:
            return "auto", None
