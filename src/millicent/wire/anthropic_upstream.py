"""A request as Anthropic's Messages take it. What they can't take is refused by name."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, get_args

import msgspec

from millicent.core.errors import InvalidRequest
from millicent.core.request import CacheMark, ImagePart, Message, OtherPart, Part, Request, Sampling, TextPart, Tool
from millicent.wire.anthropic_content import MediaType
from millicent.wire.anthropic_messages import BETA_HEADER, DIALECT
from millicent.wire.refusals import not_taken

# The dialect wants a limit; a request without one gets this, which every model there can make.
DEFAULT_MAX_TOKENS = 8192

_encoder = msgspec.json.Encoder()
_MEDIA_TYPES = get_args(MediaType)
_TAKEN = ("temperature", "top_p", "top_k")
_EFFORTS = {"minimal": "low"}
# What of a call counts as input.
_COUNTED = ("model", "system", "messages", "tools", "tool_choice", "thinking")


class Sent(msgspec.Struct, frozen=True):
    body: bytes
    headers: dict[str, str]
    max_tokens: int


def encode(request: Request, model: str, who: str, *, priority: bool = False) -> Sent:
    """The call for this request. Raises InvalidRequest for what `who`, the upstream, can't do."""
    return _Encoding(request.as_asked(), who).made(model, priority=priority)


def counting(sent: Sent) -> bytes:
    """The body that asks for the number of this call's input tokens."""
    fields = msgspec.json.decode(sent.body, type=dict[str, msgspec.Raw])
    return _encoder.encode({field: fields[field] for field in _COUNTED if field in fields})


def read_count(body: bytes) -> int:
    """Raises msgspec.DecodeError for what is no answer to that."""
    return msgspec.json.decode(body, type=_Counted).input_tokens


class _Counted(msgspec.Struct, frozen=True):
    input_tokens: int


class _Encoding:
    def __init__(self, request: Request, who: str) -> None:
        self._request = request
        self._who = who
        self._ours = request.dialect == DIALECT

    def made(self, model: str, *, priority: bool) -> Sent:
        request = self._request
        if not self._ours:
            request.refuse_foreign()
        if request.messages is None:
            raise self._refuse("prompt" if request.embedding is None else "model", "anything but a chat")
        self._check()
        limit = request.limits.max_tokens
        max_tokens = DEFAULT_MAX_TOKENS if limit is None else limit
        tier = "auto" if priority else "standard_only"
        body: dict[str, Any] = {"model": model, "max_tokens": max_tokens, "stream": True, "service_tier": tier}
        first = next((i for i, each in enumerate(request.messages) if each.role != "system"), len(request.messages))
        if system := [block for each in request.messages[:first] for block in self._blocks(each.content, "messages")]:
            body["system"] = system
        body["messages"] = self._messages(request.messages[first:])
        for field in _TAKEN:
            value = getattr(request.sampling, field)
            if value != getattr(Sampling(), field) or field in request.restated:
                body[field] = value
        if request.limits.stop:
            body["stop_sequences"] = list(request.limits.stop)
        self._tools(body)
        self._output(body)
        headers = {}
        for field, extra in request.extra.items():
            if field == BETA_HEADER:
                headers[field] = msgspec.json.decode(extra.json, type=str)
            elif self._ours:
                body[field] = msgspec.Raw(extra.json.encode())
        return Sent(_encoder.encode(body), headers, max_tokens)

    def _refuse(self, field: str, what: str | None = None) -> InvalidRequest:
        return not_taken(self._request, self._who, field, what)

    def _check(self) -> None:
        request, neutral = self._request, Request("", "", "")
        for field in Sampling.__struct_fields__:
            if field not in _TAKEN and getattr(request.sampling, field) != getattr(neutral.sampling, field):
                raise self._refuse(field)
        if request.sampling.temperature > 1:
            raise self._refuse("temperature", "a `temperature` above 1")
        for field in ("ignore_eos", "min_tokens", "stop_tokens"):
            if getattr(request.limits, field):
                raise self._refuse("stop_token_ids" if field == "stop_tokens" else field)
        for field, shown in (
            ("choices", "n"),
            ("truncate_prompt_tokens", "truncate_prompt_tokens"),
            ("priority", "priority"),
        ):
            if getattr(request, field) != getattr(neutral, field):
                raise self._refuse(shown)

    def _messages(self, messages: Iterable[Message]) -> list[dict[str, Any]]:
        """A tool's answers, and what the user says after them, are one message there; so is what was split before a
        sealed thought."""
        made: list[dict[str, Any]] = []
        before: Message | None = None
        for i, message in enumerate(messages):
            if message.name is not None:
                raise self._refuse(f"messages[{i}].name", "a `name` of a message's author")
            content = self._message(message)
            tools_turn = before is not None and before.role == "tool" and message.role in {"tool", "user"}
            split = before is not None and before.role == message.role == "assistant" and bool(message.thoughts)
            if tools_turn or split:
                made[-1]["content"] += content
            else:
                made.append({"role": "user" if message.role == "tool" else message.role, "content": content})
            before = message
        return made

    def _message(self, message: Message) -> list[Any]:
        if message.role == "tool":
            return [self._result(message)]
        blocks: list[Any] = []
        for thought in message.thoughts:
            if thought.sealed is not None:
                blocks.append({"type": "redacted_thinking", "data": thought.sealed})
            elif thought.signature is not None:
                blocks.append({"type": "thinking", "thinking": thought.text, "signature": thought.signature})
        blocks += self._blocks(message.content, "messages")
        for call in message.tool_calls:
            arguments = msgspec.Raw((call.arguments or "{}").encode())
            block = {"type": "tool_use", "id": call.id, "name": call.name, "input": arguments}
            blocks.append(block | _marked(call.cache))
        return blocks

    def _result(self, message: Message) -> dict[str, Any]:
        """The mark on its last part stands on the whole, which ends there too."""
        block: dict[str, Any] = {"type": "tool_result", "tool_use_id": message.tool_call_id}
        content, mark = message.content, None
        if isinstance(content, tuple) and content and not isinstance(content[-1], OtherPart):
            mark = content[-1].cache
            content = (*content[:-1], msgspec.structs.replace(content[-1], cache=None))
        if isinstance(content, str):
            block["content"] = content
        elif parts := self._blocks(content, "messages"):
            block["content"] = parts
        if message.failed:
            block["is_error"] = True
        return block | _marked(mark)

    def _blocks(self, content: str | tuple[Part, ...], where: str) -> list[Any]:
        """Empty texts are refused there, and say nothing."""
        parts = (TextPart(content),) if isinstance(content, str) else content
        return [self._part(part, where) for part in parts if not (isinstance(part, TextPart) and not part.text)]

    def _part(self, part: Part, where: str) -> Any:
        match part:
            case TextPart():
                return {"type": "text", "text": part.text} | _marked(part.cache)
            case ImagePart(url=str(url)):
                return {"type": "image", "source": {"type": "url", "url": url}} | _marked(part.cache)
            case ImagePart():
                if part.media_type not in _MEDIA_TYPES:
                    raise self._refuse(where, f"a picture that is `{part.media_type}`")
                source = {"type": "base64", "media_type": part.media_type, "data": part.data}
                return {"type": "image", "source": source} | _marked(part.cache)
            case _:
                return msgspec.Raw(part.json.encode())

    def _tools(self, body: dict[str, Any]) -> None:
        request = self._request
        if not request.tools:
            return
        body["tools"] = [_tool(tool) for tool in request.tools]
        choice: dict[str, Any] = {"type": "any" if request.tool_choice == "required" else request.tool_choice}
        if request.tool_name is not None:
            choice = {"type": "tool", "name": request.tool_name}
        if not request.parallel_tool_calls and request.tool_choice != "none":
            choice["disable_parallel_tool_use"] = True
        if choice != {"type": "auto"}:
            body["tool_choice"] = choice

    def _output(self, body: dict[str, Any]) -> None:
        request, config = self._request, dict[str, Any]()
        if (form := request.output_format) is not None:
            if form.kind != "json_schema":
                raise self._refuse("response_format", f"`response_format` {form.kind}")
            config["format"] = {"type": "json_schema", "schema": msgspec.Raw(form.source.encode())}
        if (thinking := request.thinking) is not None:
            if thinking.budget_tokens is not None:
                body["thinking"] = {"type": "enabled", "budget_tokens": thinking.budget_tokens}
            else:
                body["thinking"] = {"type": "disabled" if thinking.effort == "none" else "adaptive"}
            if thinking.effort is not None and thinking.effort != "none":
                config["effort"] = _EFFORTS.get(thinking.effort, thinking.effort)
        if config:
            body["output_config"] = config


def _marked(mark: CacheMark | None) -> dict[str, Any]:
    if mark is None:
        return {}
    return {"cache_control": {"type": "ephemeral"} | ({} if mark == "5m" else {"ttl": mark})}


def _tool(tool: Tool) -> dict[str, Any]:
    body: dict[str, Any] = {"name": tool.name, "input_schema": msgspec.Raw(tool.parameters.encode())}
    if tool.description:
        body["description"] = tool.description
    if tool.strict is not None:
        body["strict"] = tool.strict
    return body | _marked(tool.cache)
