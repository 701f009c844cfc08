"""A request as Gemini's `generateContent` takes it. What it can't take is refused by name."""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import quote

import msgspec

from millicent.core.errors import InvalidRequest
from millicent.core.request import ImagePart, Message, OutputFormat, Part, Request, Sampling, TextPart, Thinking, Tool
from millicent.wire.refusals import not_taken

_encoder = msgspec.json.Encoder()

_SAMPLING = {
    "temperature": "temperature",
    "top_p": "topP",
    "top_k": "topK",
    "presence_penalty": "presencePenalty",
    "frequency_penalty": "frequencyPenalty",
}
_READ_APART = ("seed", "logprobs")
_MOST_STOPS = 5
_MOST_SEED = 2**31 - 1
_MOST_CHOICES = 8
_MODES = {"auto": "AUTO", "none": "NONE", "required": "ANY"}
# From the third generation on thinking has levels; before, a number of tokens. Google's own translation of efforts.
_LEVELS = ("minimal", "low", "medium", "high")
_BUDGETS = {"none": 0, "minimal": 1024, "low": 1024, "medium": 8192, "high": 24576}
_GENERATION = re.compile(r"gemini-(\d+)")
# What Google documents for calls whose seal is gone, because they came through another dialect.
_UNSEALED = "skip_thought_signature_validator"


class Sent(msgspec.Struct, frozen=True):
    """`path` is added to the base address."""

    path: str
    body: bytes


def encode(request: Request, model: str, who: str) -> Sent:
    """The call for this request. Raises InvalidRequest for what `who`, the upstream, can't do."""
    name = quote(model.removeprefix("models/"), safe="")
    return Sent(f"/models/{name}:streamGenerateContent?alt=sse", _Encoding(request.as_asked(), model, who).made())


class _Encoding:
    def __init__(self, request: Request, model: str, who: str) -> None:
        self._request = request
        self._who = who
        generation = _GENERATION.search(model)
        self._has_levels = generation is not None and int(generation[1]) >= 3

    def made(self) -> bytes:
        request = self._request
        request.refuse_foreign()
        if request.messages is None:
            raise self._refuse("prompt", "anything but a chat and embeddings")
        self._check()
        body: dict[str, Any] = {"contents": self._contents(request.messages)}
        system = [part for each in request.messages if each.role == "system" for part in self._parts(each.content)]
        if system:
            body["systemInstruction"] = {"parts": system}
        if request.tools:
            body["tools"] = [{"functionDeclarations": [_declared(tool) for tool in request.tools]}]
            body["toolConfig"] = {"functionCallingConfig": self._choice()}
        if config := self._config():
            body["generationConfig"] = config
        return _encoder.encode(body)

    def _refuse(self, field: str, what: str | None = None) -> InvalidRequest:
        return not_taken(self._request, self._who, field, what)

    def _check(self) -> None:
        request, neutral = self._request, Request("", "", "")
        for field in Sampling.__struct_fields__:
            known = field in _SAMPLING or field in _READ_APART
            if not known and getattr(request.sampling, field) != getattr(neutral.sampling, field):
                raise self._refuse(field)
        for field in ("ignore_eos", "min_tokens", "stop_tokens"):
            if getattr(request.limits, field):
                raise self._refuse("stop_token_ids" if field == "stop_tokens" else field)
        for field in ("truncate_prompt_tokens", "priority"):
            if getattr(request, field) != getattr(neutral, field):
                raise self._refuse(field)
        if not request.parallel_tool_calls and request.tools and request.tool_choice != "none":
            raise self._refuse("parallel_tool_calls", "`parallel_tool_calls` false")
        if len(request.limits.stop) > _MOST_STOPS:
            raise self._refuse("stop", f"more than {_MOST_STOPS} stop strings")
        if request.choices > _MOST_CHOICES:
            raise self._refuse("n", f"`n` above {_MOST_CHOICES}")
        if request.sampling.seed is not None and not -_MOST_SEED <= request.sampling.seed <= _MOST_SEED:
            raise self._refuse("seed", "a `seed` of more than 32 bits")

    def _config(self) -> dict[str, Any]:
        request = self._request
        config: dict[str, Any] = {}
        for field, theirs in _SAMPLING.items():
            value = getattr(request.sampling, field)
            if value != getattr(Sampling(), field) or (field in request.restated and field != "top_k"):
                config[theirs] = value
        if request.sampling.seed is not None:
            config["seed"] = request.sampling.seed
        if request.sampling.logprobs is not None:
            config["responseLogprobs"] = True
            if request.sampling.logprobs:
                config["logprobs"] = request.sampling.logprobs
        if request.limits.max_tokens is not None:
            config["maxOutputTokens"] = request.limits.max_tokens
        if request.limits.stop:
            config["stopSequences"] = list(request.limits.stop)
        if request.choices > 1:
            config["candidateCount"] = request.choices
        if request.output_format is not None:
            config |= self._form(request.output_format)
        if request.thinking is not None and (thinking := self._thinking(request.thinking)):
            config["thinkingConfig"] = thinking
        return config

    def _form(self, form: OutputFormat) -> dict[str, Any]:
        if form.kind == "json_object":
            return {"responseMimeType": "application/json"}
        if form.kind == "json_schema":
            schema = msgspec.Raw(form.source.encode())
            return {"responseMimeType": "application/json", "responseJsonSchema": schema}
        raise self._refuse("response_format", f"`response_format` {form.kind}")

    def _thinking(self, wanted: Thinking) -> dict[str, Any]:
        """Whoever asks for thinking gets to see it. None at all can't be had of the models with levels."""
        if wanted.budget_tokens is not None:
            return {"thinkingBudget": wanted.budget_tokens, "includeThoughts": True}
        effort = wanted.effort
        if effort is None:
            return {"includeThoughts": True}
        if self._has_levels:
            if effort == "none":
                return {}
            if effort in _LEVELS:
                return {"thinkingLevel": effort, "includeThoughts": True}
        elif effort in _BUDGETS:
            budget = _BUDGETS[effort]
            return {"thinkingBudget": budget} | ({"includeThoughts": True} if budget else {})
        raise self._refuse("reasoning_effort", f"`reasoning_effort` {effort}")

    def _choice(self) -> dict[str, Any]:
        """Where a tool is strict the calls are held to what was declared, as they always are with `ANY`."""
        request = self._request
        if request.tool_name is not None:
            return {"mode": "ANY", "allowedFunctionNames": [request.tool_name]}
        if request.tool_choice == "auto" and any(tool.strict for tool in request.tools):
            return {"mode": "VALIDATED"}
        return {"mode": _MODES[request.tool_choice]}

    def _contents(self, messages: tuple[Message, ...]) -> list[dict[str, Any]]:
        """Answers of several tools are one turn there; so is what was split before a sealed thought."""
        contents: list[dict[str, Any]] = []
        named: dict[str, str] = {}
        before = ""
        for i, message in enumerate(messages):
            if message.name is not None:
                raise self._refuse(f"messages[{i}].name", "a `name` of a message's author")
            if message.role == "system":
                continue
            named |= {call.id: call.name for call in message.tool_calls}
            match message.role:
                case "tool":
                    parts = [self._response(message, named)]
                case "assistant":
                    parts = self._turn(message)
                case _:
                    parts = self._parts(message.content)
            joined = message.role == "tool" or (message.role == "assistant" and bool(message.thoughts))
            if joined and before == message.role:
                contents[-1]["parts"] += parts
            else:
                contents.append({"role": "model" if message.role == "assistant" else "user", "parts": parts})
            before = message.role
        if not contents:
            raise InvalidRequest("`messages` has nothing but instructions: add a user's message.", param="messages")
        return contents

    def _turn(self, message: Message) -> list[dict[str, Any]]:
        """What the model said. A seal belongs to the call after it, or to what was said; thoughts themselves don't go
        back there."""
        if any(thought.sealed is not None for thought in message.thoughts):
            raise self._refuse("messages", "a thought that another provider enciphered")
        seals = [thought.signature for thought in message.thoughts if thought.signature is not None]
        seal = seals[-1] if seals else None
        parts = self._parts(message.content)
        calls: list[dict[str, Any]] = [
            {"functionCall": {"id": call.id, "name": call.name, "args": msgspec.Raw((call.arguments or "{}").encode())}}
            for call in message.tool_calls
        ]
        if calls and (seal is not None or self._has_levels):
            calls[0]["thoughtSignature"] = seal or _UNSEALED
        elif seal is not None:
            parts = parts or [{"text": ""}]
            parts[-1]["thoughtSignature"] = seal
        return [*parts, *calls] or [{"text": ""}]

    def _response(self, message: Message, named: dict[str, str]) -> dict[str, Any]:
        called = message.tool_call_id or ""
        if called not in named:
            raise InvalidRequest(
                f"`messages` answers the call `{called[:100]}`, which is not among those before it: send that too.",
                param="messages",
            )
        if any(isinstance(part, ImagePart) for part in message.content):
            raise self._refuse("messages", "a picture in a tool's answer")
        answer = {"error" if message.failed else "output": message.text}
        return {"functionResponse": {"id": called, "name": named[called], "response": answer}}

    def _parts(self, content: str | tuple[Part, ...]) -> list[dict[str, Any]]:
        """Empty texts say nothing."""
        parts = (TextPart(content),) if isinstance(content, str) else content
        return [self._part(part) for part in parts if not (isinstance(part, TextPart) and not part.text)]

    def _part(self, part: Part) -> dict[str, Any]:
        match part:
            case TextPart():
                return {"text": part.text}
            case ImagePart(data=str(data)):
                return {"inlineData": {"mimeType": part.media_type, "data": data}}
            case ImagePart():
                raise self._refuse("messages", "a picture by its address: send its data; that")
            case _:
                raise self._refuse("messages", f"a `{part.kind}` part")


def _declared(tool: Tool) -> dict[str, Any]:
    body: dict[str, Any] = {"name": tool.name}
    if tool.description:
        body["description"] = tool.description
    return body | {"parametersJsonSchema": msgspec.Raw(tool.parameters.encode())}
