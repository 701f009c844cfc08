"""OpenAI Responses: `POST /v1/responses`. It brings the whole conversation, or goes on from one that is stored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

import msgspec

from millicent.core.errors import InvalidRequest, MillicentError
from millicent.core.request import Extra, Limits, Message, OutputFormat, Request, Sampling, Thinking, Tool
from millicent.wire import openai_common as common
from millicent.wire import openai_generation as generation
from millicent.wire import openai_response_items as response_items
from millicent.wire import openai_stored_responses as stored
from millicent.wire import openai_tools, output_format
from millicent.wire.attribution import read_attribution
from millicent.wire.decoding import decode_at, decode_body, refuse_unless_neutral
from millicent.wire.field_names import FieldNames

DIALECT = "openai.responses"

_Penalty = Annotated[float, msgspec.Meta(ge=-2, le=2)]
_LOGPROBS = "message.output_text.logprobs"
_UNSAID = msgspec.Raw(b"null")
_Includable = Literal[
    "message.output_text.logprobs",
    "reasoning.encrypted_content",
    "message.input_image.image_url",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
]


class JsonObject(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="json_object"):
    """Any JSON object."""


class SchemaFormat(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="json_schema"):
    """`strict` false is taken as true here: the answer follows the schema either way. An upstream is told."""

    name: output_format.Name
    schema: dict[str, Any]
    description: str | None = None
    strict: bool | None = None


class TextConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    format: output_format.TextFormat | JsonObject | SchemaFormat | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class Reasoning(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where a summary is asked for, what was thought is given as one, in full."""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None
    context: Any = None
    mode: Any = None


class StreamOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    include_obfuscation: bool | None = None


class ResponsesBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A null is as good as a field left out."""

    # honoured
    model: common.ModelName
    input: str | list[msgspec.Raw] | None = None
    instructions: str | None = None
    stream: bool | None = None
    max_output_tokens: generation.Tokens | None = None
    temperature: Annotated[float, msgspec.Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, msgspec.Meta(ge=0, le=1)] | None = None
    presence_penalty: _Penalty | None = None
    frequency_penalty: _Penalty | None = None
    top_logprobs: Annotated[int, msgspec.Meta(ge=0, le=generation.MAX_LOGPROBS)] | None = None
    include: list[_Includable] | None = None
    tools: Annotated[list[msgspec.Raw], msgspec.Meta(max_length=128)] | None = None
    tool_choice: msgspec.Raw = _UNSAID
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    reasoning: Reasoning | None = None
    truncation: Literal["auto", "disabled"] | None = None
    metadata: dict[str, str] | None = None
    user: str | None = None
    store: bool | None = None  # unsaid, an answer is stored wherever answers are
    previous_response_id: str | None = None
    safety_identifier: str | None = None  # whom the receipt is for, where there is no `user`
    # harmless hints: they ask for nothing that changes an answer; the first two an upstream of OpenAI's gets
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: Any = None
    service_tier: str | None = None  # what the placement is charged at decides
    stream_options: StreamOptions | None = None
    max_tool_calls: Annotated[int, msgspec.Meta(ge=1)] | None = None  # of OpenAI's own tools, which aren't run here
    # refused by name unless neutral: what they ask for has no place here
    conversation: Any = None
    background: Any = None
    prompt: Any = None
    context_management: Any = None
    moderation: Any = None
    image: Any = None
    access_programs: Any = None


_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "background": (False,),
    "prompt": (),
    "context_management": ([],),
    "moderation": (),
    "image": ({"context_compression": "auto"}, {"context_compression": "disabled"}),
    "access_programs": ({"cyber": "standard"},),
}
_NEUTRAL_IN_REASONING: dict[str, tuple[Any, ...]] = {"context": ("auto",), "mode": ("standard",)}


class FunctionTool(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    type: str
    name: openai_tools.Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    defer_loading: Any = None
    allowed_callers: Any = None
    output_schema: Any = None
    asynchronous: Any = msgspec.field(default=None, name="async")


_NEUTRAL_IN_TOOL: dict[str, tuple[Any, ...]] = {
    "defer_loading": (False,),
    "allowed_callers": (["direct"],),
    "output_schema": (),
    "asynchronous": (False,),
}


class _Kind(msgspec.Struct, frozen=True):
    type: str


class NamedTool(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    type: str
    name: str


class AllowedTools(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    type: str
    mode: Literal["auto", "required"]
    tools: Annotated[list[msgspec.Raw], msgspec.Meta(min_length=1, max_length=128)]


class Shape(msgspec.Struct, frozen=True):
    """What an answer has besides what was said: `echo` are fields of the request, as JSON, as it shows them again.

    `input` is what this request itself brought, a JSON array, where the answer is to be stored.
    """

    echo: dict[str, str]
    summary: bool = False
    logprobs: bool = False
    previous: str | None = None
    input: str | None = None


_decoder = msgspec.json.Decoder(ResponsesBody)
_KNOWN = frozenset(ResponsesBody.__struct_fields__)
_kind = msgspec.json.Decoder(_Kind)
_tool = msgspec.json.Decoder(FunctionTool)
_word = msgspec.json.Decoder(Literal["auto", "none", "required"])
_named = msgspec.json.Decoder(NamedTool)
_allowed = msgspec.json.Decoder(AllowedTools)

_Choice = Literal["auto", "none", "required"]


def decode(
    body: bytes,
    headers: Mapping[str, str],
    receipt_id: str,
    earlier: stored.Earlier | None = None,
    *,
    stores: bool = False,
) -> tuple[Request, Shape]:
    """`earlier` is what the request goes on from or refers to, where there is that; `stores`: answers are stored here
    unless a request says no. Raises InvalidRequest, naming the field."""
    asked = decode_body(body, _decoder, _KNOWN)
    _refuse_kept(asked, stores=stores)
    own = stored.resolved(_items(asked), earlier or stored.Earlier()) if stores else _items(asked)
    refuse_unless_neutral(asked, _NEUTRAL)
    reasoning = asked.reasoning or Reasoning()
    refuse_unless_neutral(reasoning, _NEUTRAL_IN_REASONING, "reasoning")
    tools = _read_tools(asked.tools or ())
    choice, name, callable_tools = _read_choice(asked.tool_choice, tools)
    wants_logprobs = bool(asked.top_logprobs) or _LOGPROBS in (asked.include or ())
    request = Request(
        id=receipt_id,
        dialect=DIALECT,
        model=asked.model,
        messages=_messages(asked, own, earlier),
        sampling=Sampling(
            temperature=1.0 if asked.temperature is None else asked.temperature,
            top_p=1.0 if asked.top_p is None else asked.top_p,
            presence_penalty=asked.presence_penalty or 0.0,
            frequency_penalty=asked.frequency_penalty or 0.0,
            logprobs=(asked.top_logprobs or 0) if wants_logprobs else None,
        ),
        limits=Limits(asked.max_output_tokens),
        output_format=_output_format(asked.text),
        tools=callable_tools,
        tool_choice=choice,
        tool_name=name,
        parallel_tool_calls=asked.parallel_tool_calls is not False,
        stream=bool(asked.stream),
        truncate_prompt_tokens=-1 if asked.truncation == "auto" else None,
        attribution=read_attribution(headers, user=asked.user or asked.safety_identifier, metadata=asked.metadata),
        thinking=Thinking(reasoning.effort) if reasoning.effort else None,
        extra=_extra(asked),
        restated=tuple(field for field in ("temperature", "top_p") if getattr(asked, field) == 1.0),
    )
    summary = bool(reasoning.summary or reasoning.generate_summary)
    kept = msgspec.json.encode(own).decode() if stores and asked.store is not False else None
    echo = _echo(asked, request, tools, is_stored=kept is not None)
    return request, Shape(echo, summary, wants_logprobs, asked.previous_response_id, kept)


def _refuse_kept(asked: ResponsesBody, *, stores: bool) -> None:
    for field in ("conversation",) if stores else ("conversation", "previous_response_id"):
        if getattr(asked, field) is not None:
            advice = "go on from a response with `previous_response_id`, or " if stores else ""
            raise InvalidRequest(
                f"`{field}` names what isn't kept here: {advice}send the whole conversation as `input`.",
                param=field,
                code="unsupported_parameter",
            )


def _items(asked: ResponsesBody) -> list[msgspec.Raw]:
    if asked.input is None:
        raise InvalidRequest("Missing required field `input`.", param="input", code="missing_required_parameter")
    if not asked.input:
        raise InvalidRequest("`input` is empty: send at least one message.", param="input")
    if isinstance(asked.input, str):
        return [msgspec.Raw(msgspec.json.encode({"type": "message", "role": "user", "content": asked.input}))]
    return asked.input


def _messages(asked: ResponsesBody, own: Sequence[msgspec.Raw], earlier: stored.Earlier | None) -> tuple[Message, ...]:
    first = (Message("system", asked.instructions),) if asked.instructions else ()
    before = response_items.read(earlier.items) if earlier is not None else ()
    return (*first, *before, *response_items.read(own))


def _output_format(text: TextConfig | None) -> OutputFormat | None:
    match text.format if text is not None else None:
        case JsonObject():
            return OutputFormat("json_object")
        case SchemaFormat(name=name, schema=schema, strict=strict):
            return OutputFormat("json_schema", output_format.schema_text(schema, "text.format.schema"), name, strict)
        case _:
            return None


def _read_tools(tools: Sequence[msgspec.Raw]) -> tuple[Tool, ...]:
    functions = []
    for i, raw in enumerate(tools):
        where = f"tools[{i}]"
        kind = decode_at(raw, _kind, where).type
        if kind != "function":
            raise InvalidRequest(
                f"`{where}` is a `{kind}` tool: this server runs none of OpenAI's own, and takes only functions.",
                param=f"{where}.type",
                code="unsupported_parameter",
            )
        tool = decode_at(raw, _tool, where)
        refuse_unless_neutral(tool, _NEUTRAL_IN_TOOL, where)
        functions.append(openai_tools.Function(tool.name, tool.description, tool.parameters, tool.strict))
    return openai_tools.read_tools(functions, inside="")


def _read_choice(raw: msgspec.Raw, tools: Sequence[Tool]) -> tuple[_Choice, str | None, tuple[Tool, ...]]:
    """Whether a tool is to be called, which, and of which."""
    if bytes(raw).strip() == b"null":
        return "auto", None, tuple(tools)
    if not bytes(raw).lstrip().startswith(b"{"):
        word = decode_at(raw, _word, "tool_choice")
        return *openai_tools.read_choice(word, tools), tuple(tools)
    kind = decode_at(raw, _kind, "tool_choice").type
    if kind == "function":
        named = openai_tools.NamedChoice(openai_tools.Named(_name(raw, "tool_choice")))
        return *openai_tools.read_choice(named, tools), tuple(tools)
    if kind != "allowed_tools":
        raise _no_such_choice(kind, "tool_choice")
    allowed = decode_at(raw, _allowed, "tool_choice")
    names = set()
    for i, each in enumerate(allowed.tools):
        where = f"tool_choice.tools[{i}]"
        if (kind := decode_at(each, _kind, where).type) != "function":
            raise _no_such_choice(kind, where)
        names.add(_name(each, where))
    if unknown := names - {tool.name for tool in tools}:
        raise InvalidRequest(
            f"`tool_choice` allows `{min(unknown)}`, which is not in `tools`: add it.", param="tool_choice.tools"
        )
    return allowed.mode, None, tuple(tool for tool in tools if tool.name in names)


def _name(raw: msgspec.Raw, where: str) -> str:
    return decode_at(raw, _named, where).name


def _no_such_choice(kind: str, where: str) -> InvalidRequest:
    return InvalidRequest(
        f"`{where}` is of type `{kind}`: this server runs none of OpenAI's own tools, only functions can be chosen.",
        param=f"{where}.type",
        code="unsupported_parameter",
    )


def _extra(asked: ResponsesBody) -> dict[str, Extra]:
    """What only an upstream of OpenAI's makes something of, under chat's names."""
    extra = {}
    for field in ("prompt_cache_key", "prompt_cache_retention", "safety_identifier"):
        if getattr(asked, field) is not None:
            extra[field] = Extra(msgspec.json.encode(getattr(asked, field)).decode(), None)
    verbosity = asked.text.verbosity if asked.text else None
    if verbosity is not None:
        refusal = f"`text.verbosity` {verbosity} is not supported by this server: leave it out."
        neutral = verbosity == "medium"
        extra["verbosity"] = Extra(f'"{verbosity}"', None if neutral else refusal, "unsupported_parameter")
    return extra


def _echo(asked: ResponsesBody, request: Request, tools: Sequence[Tool], *, is_stored: bool) -> dict[str, str]:
    text, reasoning = asked.text or TextConfig(), asked.reasoning or Reasoning()
    form: Any = text.format or output_format.TextFormat()
    if isinstance(form, SchemaFormat):
        form = {"type": "json_schema"} | msgspec.structs.asdict(form) | {"strict": bool(form.strict)}
    fields = {
        "instructions": asked.instructions,
        "max_output_tokens": asked.max_output_tokens,
        "max_tool_calls": asked.max_tool_calls,
        "metadata": asked.metadata or {},
        "parallel_tool_calls": request.parallel_tool_calls,
        "presence_penalty": request.sampling.presence_penalty,
        "previous_response_id": asked.previous_response_id,
        "frequency_penalty": request.sampling.frequency_penalty,
        "prompt_cache_key": asked.prompt_cache_key,
        "reasoning": {"effort": reasoning.effort, "summary": reasoning.summary or reasoning.generate_summary},
        "safety_identifier": asked.safety_identifier,
        "store": is_stored,
        "temperature": request.sampling.temperature,
        "text": {"format": form, "verbosity": text.verbosity or "medium"},
        "tool_choice": "auto" if bytes(asked.tool_choice).strip() == b"null" else asked.tool_choice,
        "tools": [_tool_body(tool) for tool in tools],
        "top_logprobs": asked.top_logprobs or 0,
        "top_p": request.sampling.top_p,
        "truncation": asked.truncation or "disabled",
        "user": asked.user,
    }
    return {field: msgspec.json.encode(value).decode() for field, value in fields.items()}


def _tool_body(tool: Tool) -> dict[str, Any]:
    return {
        "type": "function",
        "name": tool.name,
        "description": tool.description or None,
        "parameters": msgspec.Raw(tool.parameters.encode()),
        "strict": tool.strict,
    }


_NAMES = FieldNames(
    {
        "messages": "input",
        "prompt": "input",
        "max_tokens": "max_output_tokens",
        "max_completion_tokens": "max_output_tokens",
        "response_format": "text.format",
        "reasoning_effort": "reasoning.effort",
        "truncate_prompt_tokens": "truncation",
        "verbosity": "text.verbosity",
        "logprobs": "top_logprobs",
    }
)


def error_body(error: MillicentError, receipt_id: str | None = None) -> dict[str, Any]:
    """OpenAI's shape, with the field to blame as this dialect calls it."""
    body = common.error_body(error, receipt_id)
    body["error"]["message"], body["error"]["param"] = _NAMES.told(error)
    return body


FAMILY = replace(common.FAMILY, error_body=error_body)
