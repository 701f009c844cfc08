"""A request without a dialect: what every client's bytes become and every backend receives."""

from __future__ import annotations

from decimal import Decimal
from typing import Literal

import msgspec

from millicent.core.errors import InvalidRequest
from millicent.core.money import Money
from millicent.core.prompts import Prompt

_MOST_CHARACTERS = 256
# A mark that the prompt is to be cached up to here, and for how long.
CacheMark = Literal["5m", "1h"]
# What comes before a tool's answer that says its call went wrong, where a dialect has no other place for that.
FAILED_CALL = "The call failed:\n"


class ToolCall(msgspec.Struct, frozen=True):
    """A call that the assistant made. `arguments` is a JSON object, as text."""

    id: str
    name: str
    arguments: str
    cache: CacheMark | None = None


class Tool(msgspec.Struct, frozen=True):
    """A function that the model may call. `parameters` is a JSON schema of its arguments, as text. `strict`: whether a
    provider is to hold calls to it, where the caller said."""

    name: str
    description: str
    parameters: str
    cache: CacheMark | None = None
    strict: bool | None = None


class TextPart(msgspec.Struct, frozen=True, tag="text"):
    text: str
    cache: CacheMark | None = None


class ImagePart(msgspec.Struct, frozen=True, tag="image"):
    """A picture: `data` in base64 with its `media_type`, or the `url` where it lies. `detail` is a provider's word."""

    media_type: str | None = None
    data: str | None = None
    url: str | None = None
    detail: str | None = None
    cache: CacheMark | None = None


class OtherPart(msgspec.Struct, frozen=True, tag="other"):
    """A part that only its own dialect knows, as the JSON it came as: sound, a file. It goes to an upstream of that
    dialect, or is refused by its `kind`. `at` names it in the request."""

    kind: str
    json: str
    at: str


class Thought(msgspec.Struct, frozen=True):
    """What was thought before an earlier answer. `signature` is the provider's seal on it, without which it can't be
    sent back; `sealed` is a thought that is shown to nobody, as the provider enciphered it."""

    text: str = ""
    signature: str | None = None
    sealed: str | None = None


Part = TextPart | ImagePart | OtherPart


class Message(msgspec.Struct, frozen=True):
    """One turn. `role` is system, user, assistant or tool; an assistant's may hold calls, a tool's answers one.

    `content` has parts only where plain text doesn't say it all. `failed`: the tool says that its call went wrong.
    """

    role: str
    content: str | tuple[Part, ...]
    name: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    thoughts: tuple[Thought, ...] = ()
    failed: bool = False

    @property
    def text(self) -> str:
        """All its text, in order."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content if isinstance(part, TextPart))


class Sampling(msgspec.Struct, frozen=True):
    """How tokens are drawn. The defaults switch every filter and penalty off; temperature 0 is greedy.

    `logit_bias` is added to tokens' logits. `logprobs` asks for each output token's log probability and that many of
    the likeliest tokens' beside it; None asks for none. `prompt_logprobs` asks for the prompt's too.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    logprobs: int | None = None
    prompt_logprobs: bool = False


class Limits(msgspec.Struct, frozen=True):
    """When output ends. `max_tokens` None means as far as the context reaches. Stop strings and tokens are left out.

    Before `min_tokens` nothing but `max_tokens` ends it.
    """

    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    stop_tokens: tuple[int, ...] = ()


class OutputFormat(msgspec.Struct, frozen=True):
    """What the answer must be: any JSON object, or what `source` describes: a JSON schema, a regular expression, a Lark
    grammar (llguidance's dialect). A schema's `name`, and whether a provider is to hold to it, as the caller said."""

    kind: Literal["json_object", "json_schema", "regex", "lark"]
    source: str = ""
    name: str = "answer"
    strict: bool | None = None


class Attribution(msgspec.Struct, frozen=True):
    """Whom the receipt is for. Every field is optional; absent is shown as unattributed."""

    key: str | None = None
    team: str | None = None
    user: str | None = None
    feature: str | None = None
    tier: str | None = None
    conversation: str | None = None
    run: str | None = None
    tags: dict[str, str] = {}


def name_of(text: str, where: str) -> str:
    """Somebody's or something's name as attribution has it: a printable line, without the spaces around it. Raises
    InvalidRequest naming `where`."""
    name = text.strip()
    if len(name) > _MOST_CHARACTERS:
        what = f"`{where}` has {len(name)} characters: shorten it to {_MOST_CHARACTERS} at most."
        raise InvalidRequest(what, param=where)
    if not name.isprintable():
        raise InvalidRequest(f"`{where}` holds control characters: remove them.", param=where)
    return name


class OutsideCost(msgspec.Struct, frozen=True):
    """A cost that a caller tells of: retrieval, a tool, a check made elsewhere. `role` and `meter` are those of lines.

    `incurred_at_ns` None: when it is told. `id` is the caller's own: the same one again is the same cost.
    """

    role: str
    meter: str
    quantity: Decimal
    unit: str
    amount: Money
    note: str | None = None
    incurred_at_ns: int | None = None
    id: str | None = None


class Embedding(msgspec.Struct, frozen=True):
    """Texts, or their tokens, each to become a vector. `dimensions` keeps so many of its numbers, as a unit vector.

    What is longer than `truncate_tokens` is cut off there (-1: where the model's length ends); None refuses it.
    """

    inputs: tuple[str | tuple[int, ...], ...]
    dimensions: int | None = None
    truncate_tokens: int | None = None


class Thinking(msgspec.Struct, frozen=True):
    """How much to think before the answer: a word, or a number of tokens. Effort `none` asks for none."""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    budget_tokens: int | None = None


class Extra(msgspec.Struct, frozen=True):
    """A field that only the request's own dialect knows, as JSON, and what to say where it can't be honoured; nothing
    where it is a harmless hint."""

    json: str
    refusal: str | None
    code: str = "unknown_parameter"


class Request(msgspec.Struct, frozen=True):
    """`id` is the receipt's identifier. Exactly one of `messages`, `prompt` and `embedding` is set;
    a prompt is text or token ids and gets no chat template.

    `choices` answers are drawn, all on one receipt. `echo` puts the prompt before each. `truncate_prompt_tokens` keeps
    that many of the prompt's last tokens, -1 as many as the context has room for. Lower `priority` is served earlier.

    `further_prompts` are those of the same call after `prompt`. Each has its own `choices`: answer `i * choices + j` is
    prompt i's j-th.

    Of the `tools` only `tool_name` may be called, where it is set.

    `extra` are fields that an upstream of the same dialect may know; every other backend calls `refuse_foreign`.

    `continues`: the last message, an assistant's, is how the answer begins: what comes goes on from there.

    `restated` names sampling's fields that were written out with the value they have anyway: an upstream's own default
    may be another.

    `assumed` names fields of `sampling` and `embedding` that were left out and to which its dialect then gives a value:
    our engine takes that, and a server elsewhere does what it does by itself (`as_asked`).

    `hashed` is its prompt without its words, from admission on.
    """

    id: str
    dialect: str
    model: str
    messages: tuple[Message, ...] | None = None
    prompt: str | tuple[int, ...] | None = None
    further_prompts: tuple[str | tuple[int, ...], ...] = ()
    embedding: Embedding | None = None
    sampling: Sampling = Sampling()
    limits: Limits = Limits()
    output_format: OutputFormat | None = None
    tools: tuple[Tool, ...] = ()
    tool_choice: Literal["auto", "none", "required"] = "auto"
    tool_name: str | None = None
    parallel_tool_calls: bool = True
    stream: bool = False
    choices: int = 1
    echo: bool = False
    truncate_prompt_tokens: int | None = None
    priority: int = 0
    attribution: Attribution = Attribution()
    latency_target_ms: int | None = None
    max_cost: Money | None = None
    outside_costs: tuple[OutsideCost, ...] = ()
    thinking: Thinking | None = None
    extra: dict[str, Extra] = {}
    restated: tuple[str, ...] = ()
    assumed: tuple[str, ...] = ()
    continues: bool = False
    hashed: Prompt | None = None

    @property
    def prompts(self) -> tuple[str | tuple[int, ...], ...]:
        """All of them, in order; none where there are messages, or texts to embed."""
        return () if self.prompt is None else (self.prompt, *self.further_prompts)

    @property
    def prompt_text(self) -> str:
        """Of those of its prompts that came as text."""
        return "\n\n".join(prompt for prompt in self.prompts if isinstance(prompt, str))

    @property
    def answers(self) -> int:
        """How many there are to be."""
        return self.choices * (1 + len(self.further_prompts))

    def as_asked(self) -> Request:
        """Without what of its sampling its caller left out."""
        if not self.assumed:
            return self
        neutral = Sampling()
        left_out = {field: getattr(neutral, field) for field in self.assumed if hasattr(neutral, field)}
        return msgspec.structs.replace(self, sampling=msgspec.structs.replace(self.sampling, **left_out))

    def refuse_foreign(self) -> None:
        """Raise InvalidRequest naming a field or a part that only the request's own dialect knows, if there is one; or
        where the answer is to go on from a message of the assistant's."""
        if self.continues:
            raise InvalidRequest(
                f"The last of `messages` is the assistant's, and model `{self.model}` doesn't continue what is begun: "
                "end with a user's message.",
                param="messages",
                code="unsupported_parameter",
            )
        for field, extra in self.extra.items():
            if extra.refusal is not None:
                raise InvalidRequest(extra.refusal, param=field, code=extra.code)
        for message in self.messages or ():
            for part in message.content if isinstance(message.content, tuple) else ():
                if isinstance(part, OtherPart):
                    raise InvalidRequest(
                        f"`{part.at}` is a `{part.kind}` part, which model `{self.model}` doesn't take: leave it out.",
                        param=f"{part.at}.type",
                        code="unsupported_parameter",
                    )

    @property
    def thinking_field(self) -> str:
        """What its dialect calls how much to think."""
        if self.dialect == "anthropic.messages":
            budget = self.thinking is not None and self.thinking.budget_tokens is not None
            return "thinking.budget_tokens" if budget else "output_config.effort"
        if self.dialect == "openai.responses":
            return "reasoning.effort"
        return "think" if self.dialect.startswith("ollama.") else "reasoning_effort"

    def refuse_thinking(self) -> None:
        """Raise InvalidRequest where more or less thinking is asked for; none is as good as not asked."""
        thinking = self.thinking or Thinking()
        if thinking.effort in {None, "none"} and thinking.budget_tokens is None:
            return
        field, family = self.thinking_field, self.dialect.partition(".")[0]
        advice = {"anthropic": "", "ollama": " or send true or false"}.get(family, ' or send "none"')
        raise InvalidRequest(
            f"`{field}` is not supported by model `{self.model}`: leave it out{advice}.",
            param=field,
            code="unsupported_parameter",
        )

    def refuse_images(self) -> None:
        """Raise InvalidRequest naming the message that holds a picture, if one does."""
        for i, message in enumerate(self.messages or ()):
            if isinstance(message.content, tuple) and any(isinstance(part, ImagePart) for part in message.content):
                # Elsewhere one of a client's messages can be several of ours.
                others = {"openai.chat": f"messages[{i}].content", "ollama.generate": "images"}
                where = others.get(self.dialect, "messages")
                raise InvalidRequest(
                    f"`{where}` holds an image, and model `{self.model}` reads only text: leave it out, or ask a model "
                    "that takes images.",
                    param=where,
                    code="unsupported_parameter",
                )
