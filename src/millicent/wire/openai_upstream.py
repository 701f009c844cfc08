"""A request as an upstream that speaks OpenAI's dialect takes it. What it can't take is refused by name."""

from __future__ import annotations

from hashlib import blake2b
from typing import Any

import msgspec

from millicent.core.errors import InvalidRequest
from millicent.core.prompts import BYTES_PER_TOKEN
from millicent.core.request import FAILED_CALL, ImagePart, Message, OtherPart, OutputFormat, Request, TextPart, Tool
from millicent.wire.openai_servers import Server
from millicent.wire.refusals import not_taken

_encoder = msgspec.json.Encoder()

# Fields of sampling, by the value that changes nothing.
_NEUTRAL: dict[str, float] = {
    "temperature": 1.0,
    "top_p": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "top_k": 0,
    "min_p": 0.0,
    "typical_p": 1.0,
    "repetition_penalty": 1.0,
}
_STANDARD = frozenset({"temperature", "top_p", "presence_penalty", "frequency_penalty"})


class Sent(msgspec.Struct, frozen=True):
    """`path` is added to the base address."""

    path: str
    body: bytes


# Shorter prompts aren't cached at OpenAI: 1,024 tokens.
_LEAST_CACHED_BYTES = 1024 * BYTES_PER_TOKEN


def encode(
    request: Request, model: str, server: Server, who: str, service_tier: str | None = None, *, cache_key: bool = False
) -> Sent:
    """The call for this request. Raises InvalidRequest for what `who`, the upstream, can't do. `service_tier` is what
    the placement is charged at, where it isn't the usual. With `cache_key`, a tenant's prompts that begin alike are
    sent to one cache, unless the caller says to which."""
    encoding = _Encoding(request.as_asked(), model, server, who)
    if cache_key and server.cache_key and request.hashed is not None and request.hashed.length >= _LEAST_CACHED_BYTES:
        tenant = (request.attribution.key or "").encode()
        begins = blake2b(tenant, key=request.hashed.segments[0].chain, digest_size=16)
        encoding.body["prompt_cache_key"] = begins.hexdigest()
    if service_tier is not None:
        encoding.body["service_tier"] = service_tier
    return Sent(*encoding.made())


class _Encoding:
    def __init__(self, request: Request, model: str, server: Server, who: str) -> None:
        self._request = request
        self._server = server
        self._who = who
        self.body: dict[str, Any] = {"model": model}

    def made(self) -> tuple[str, bytes]:
        request, body = self._request, self.body
        if not request.dialect.startswith("openai."):
            request.refuse_foreign()
        if request.embedding is not None:
            return "/embeddings", self._embeddings()
        body["stream"] = True
        if self._server.include_usage:
            body["stream_options"] = {"include_usage": True}
            if self._server.running_usage and request.answers == 1:  # with several, it would be one answer's
                body["stream_options"]["continuous_usage_stats"] = True
        self._sampling()
        self._limits()
        self._thinking()
        if request.output_format is not None:
            self._format(request.output_format)
        if request.messages is None:
            path = "/completions"
            self._completion()
        else:
            path = "/chat/completions"
            self._chat(request.messages)
        body |= self._extra()
        return path, _encoder.encode(body)

    def _extra(self) -> dict[str, Any]:
        """What is known only in OpenAI's dialects; hints of others mean nothing here."""
        if not self._request.dialect.startswith("openai."):
            return {}
        return {field: msgspec.Raw(extra.json.encode()) for field, extra in self._request.extra.items()}

    def _refuse(self, field: str, what: str | None = None) -> InvalidRequest:
        return not_taken(self._request, self._who, field, what)

    def _set(self, field: str, value: Any) -> None:
        """One of OpenAI's own fields."""
        if field in self._server.lacks:
            raise self._refuse(field)
        self.body[self._server.names.get(field, field)] = value

    def _extend(self, field: str, value: Any) -> None:
        """An extension."""
        if field not in self._server.takes:
            raise self._refuse(field)
        self.body[self._server.takes[field]] = value

    def _sampling(self) -> None:
        request = self._request
        sampling = request.sampling
        for field, neutral in _NEUTRAL.items():
            value = getattr(sampling, field)
            known = field in _STANDARD or field in self._server.takes
            if value != neutral or (known and field in request.restated):
                self._set(field, value) if field in _STANDARD else self._extend(field, value)
        if sampling.seed is not None:
            self._set("seed", sampling.seed)
        if sampling.logit_bias:
            self._set("logit_bias", {str(token): bias for token, bias in sampling.logit_bias.items()})
        if request.choices > 1:
            self._set("n", request.choices)
        if request.priority:
            self._extend("priority", request.priority)

    def _limits(self) -> None:
        request = self._request
        limits = request.limits
        if limits.max_tokens is not None:
            self.body["max_tokens" if request.messages is None else self._server.max_tokens] = limits.max_tokens
        if limits.stop:
            self._set("stop", list(limits.stop))
        for field, value in (
            ("min_tokens", limits.min_tokens),
            ("stop_token_ids", list(limits.stop_tokens)),
            ("ignore_eos", limits.ignore_eos),
            ("truncate_prompt_tokens", request.truncate_prompt_tokens),
        ):
            if value:
                self._extend(field, value)

    def _thinking(self) -> None:
        wanted, server = self._request.thinking, self._server
        if wanted is None:
            return
        if wanted.budget_tokens is not None:
            if server.effort != "reasoning":
                raise self._refuse("reasoning_effort", "a number of tokens to think for")
            self.body["reasoning"] = {"max_tokens": wanted.budget_tokens}
            return
        effort = wanted.effort
        if effort is None or (effort == "none" and effort not in server.efforts):
            return
        if effort not in server.efforts:
            raise self._refuse("reasoning_effort", f"`reasoning_effort` {effort}")
        match server.effort:
            case "reasoning_effort":
                self.body["reasoning_effort"] = effort
            case "reasoning":
                self.body["reasoning"] = {"effort": effort}
            case "thinking":
                self.body["thinking"] = {"type": "disabled"}
            case "chat_template_kwargs":
                self.body["chat_template_kwargs"] = {"enable_thinking": False}

    def _format(self, form: OutputFormat) -> None:
        """SGLang and vLLM have fields of their own for what OpenAI has none."""
        if form.kind not in self._server.formats:
            raise self._refuse("response_format", f"`response_format` {form.kind}")
        match form.kind:
            case "json_object":
                self.body["response_format"] = {"type": "json_object"}
            case "json_schema":
                schema: dict[str, Any] = {"name": form.name, "schema": msgspec.Raw(form.source.encode())}
                if form.strict is not None:
                    schema["strict"] = form.strict
                self.body["response_format"] = {"type": "json_schema", "json_schema": schema}
            case "regex" if self._server.title == "vLLM":
                self.body["structured_outputs"] = {"regex": form.source}
            case "regex" | "lark":
                form_body = {"type": "grammar", "syntax": form.kind, "definition": form.source}
                self.body["response_format"] = form_body

    def _completion(self) -> None:
        request = self._request
        if not self._server.completions:
            raise InvalidRequest(
                f"{self._who} has no text completions, only chat: send `messages` to /v1/chat/completions.",
                param="prompt",
                code="unsupported_parameter",
            )
        prompts = [prompt if isinstance(prompt, str) else list(prompt) for prompt in request.prompts]
        if len(prompts) > 1 and not self._server.several_prompts:
            raise self._refuse("prompt", "`prompt` with more than one text")
        self.body["prompt"] = prompts if len(prompts) > 1 else prompts[0]
        if request.sampling.logprobs is not None:
            self._set("logprobs", request.sampling.logprobs)
        if request.echo:
            self._set("echo", True)

    def _chat(self, messages: tuple[Message, ...]) -> None:
        request = self._request
        self.body["messages"] = [self._message(message, i) for i, message in enumerate(messages)]
        if request.sampling.logprobs is not None:
            self._set("logprobs", True)
            if request.sampling.logprobs:
                self._set("top_logprobs", request.sampling.logprobs)
        if not request.tools:
            return
        self.body["tools"] = [_tool(tool) for tool in request.tools]
        if request.tool_name is not None:
            self._set("tool_choice", {"type": "function", "function": {"name": request.tool_name}})
        elif request.tool_choice != "auto":
            self._set("tool_choice", self._server.required if request.tool_choice == "required" else "none")
        if not request.parallel_tool_calls:
            self._set("parallel_tool_calls", False)

    def _message(self, message: Message, index: int) -> dict[str, Any]:
        body: dict[str, Any] = {"role": message.role, "content": self._content(message, index)}
        if message.name is not None:
            if "name" in self._server.lacks:
                raise self._refuse(f"messages[{index}].name")
            body["name"] = message.name
        if message.tool_calls:
            body["content"] = body["content"] or None
            body["tool_calls"] = [
                {
                    "id": self._call_id(call.id),
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for call in message.tool_calls
            ]
        if message.tool_call_id is not None:
            body["tool_call_id"] = self._call_id(message.tool_call_id)
        if message.thoughts and self._server.thoughts is not None:
            body[self._server.thoughts] = "".join(thought.text for thought in message.thoughts)
        return body

    def _call_id(self, given: str) -> str:
        """As given, or what stands for it where only short ones are taken; the same every time."""
        length = self._server.call_id_length
        if length is None or (len(given) == length and given.isalnum()):
            return given
        return blake2b(given.encode(), digest_size=16, person=b"call id").hexdigest()[:length]

    def _content(self, message: Message, index: int) -> str | list[Any]:
        if message.failed:
            failed = TextPart(FAILED_CALL + message.text)
            images = [part for part in message.content if isinstance(part, ImagePart)]
            message = msgspec.structs.replace(message, content=(failed, *images) if images else failed.text)
        if isinstance(message.content, str):
            return message.content
        return [self._part(part, f"messages[{index}].content") for part in message.content]

    def _part(self, part: TextPart | ImagePart | OtherPart, where: str) -> Any:
        match part:
            case TextPart():
                return {"type": "text", "text": part.text}
            case ImagePart():
                url = part.url if part.url is not None else f"data:{part.media_type};base64,{part.data}"
                image = {"url": url} if part.detail is None else {"url": url, "detail": part.detail}
                return {"type": "image_url", "image_url": image}
            case _:
                if not self._request.dialect.startswith("openai."):
                    raise self._refuse(where, f"a `{part.kind}` part")
                return msgspec.Raw(part.json.encode())

    def _embeddings(self) -> bytes:
        request, body = self._request, self.body
        assert request.embedding is not None
        if not self._server.embeddings:
            raise self._refuse("model", "an embedding")
        wanted = request.embedding
        inputs = [text if isinstance(text, str) else list(text) for text in wanted.inputs]
        body["input"] = inputs[0] if len(inputs) == 1 and isinstance(inputs[0], str) else inputs
        body["encoding_format"] = "float"
        if wanted.dimensions is not None:
            self._set("dimensions", wanted.dimensions)
        told = "truncate_prompt_tokens" in self._server.takes
        if wanted.truncate_tokens is not None and (told or "truncate_tokens" not in request.assumed):
            self._extend("truncate_prompt_tokens", wanted.truncate_tokens)
        body |= self._extra()
        return _encoder.encode(body)


def _tool(tool: Tool) -> dict[str, Any]:
    function: dict[str, Any] = {"name": tool.name}
    if tool.description:
        function["description"] = tool.description
    function["parameters"] = msgspec.Raw(tool.parameters.encode())
    if tool.strict is not None:
        function["strict"] = tool.strict
    return {"type": "function", "function": function}
