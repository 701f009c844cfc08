"""What a backend answers with: text or vectors as they come, then exactly one end."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from enum import StrEnum

import msgspec

from millicent.core.errors import MillicentError
from millicent.core.money import Money
from millicent.core.usage import Usage


class FinishReason(StrEnum):
    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    ERROR = "error"
    TOOL_CALLS = "tool_calls"
    CONTENT_FILTER = "content_filter"  # a provider's, or the model's own refusal


class Candidate(msgspec.Struct, frozen=True):
    """A token, as the bytes it stands for, and its log probability."""

    content: bytes
    logprob: float


class TokenLogprob(msgspec.Struct, frozen=True):
    """A token of the answer, or of the prompt, whose first has no probability. `top`: the likeliest in its place."""

    content: bytes
    logprob: float | None
    top: tuple[Candidate, ...] = ()


class CallPiece(msgspec.Struct, frozen=True):
    """Part of a call of a tool, the answer's `index`-th. The name comes whole, with the first piece; the arguments are
    JSON, piece by piece."""

    index: int
    name: str
    arguments: str


class Text(msgspec.Struct, frozen=True):
    """Decoded output of one choice, whole characters only. `tokens` is how many output tokens stand behind it (may be
    0). `logprobs` holds an entry for each token since the last chunk, where they were asked for.

    `cached_tokens` is how many of the prompt's tokens came from a cache; None until that is known. `signature` is a
    provider's seal on the reasoning before it; `sealed` a thought that it enciphered. `stop` is the stop string that
    ended the choice, which is not in its text.
    """

    text: str
    tokens: int
    choice: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()
    cached_tokens: int | None = None
    calls: tuple[CallPiece, ...] = ()
    reasoning: str = ""
    signature: str = ""
    sealed: str = ""
    stop: str = ""


def merge_texts(texts: Iterable[Text], *, in_order: bool = False) -> tuple[Text, ...]:
    """One text per choice that has any, in the order of choices.

    `in_order` gives several where one would lose what came after what: a thought after what was said, or after another
    that was sealed.
    """
    by_choice: dict[int, list[list[Text]]] = {}
    for text in texts:
        runs = by_choice.get(text.choice)
        if runs is None:
            runs = by_choice[text.choice] = [[]]
        if in_order and (text.reasoning or text.signature or text.sealed) and _is_over(runs[-1], text):
            runs.append([])
        runs[-1].append(text)
    return tuple(_merged(run) for _, runs in sorted(by_choice.items()) for run in runs)


def _is_over(run: list[Text], thought: Text) -> bool:
    """Looks back no further than to the last that isn't of the same thought."""
    for part in reversed(run):
        if part.text or part.calls or part.sealed or (part.signature and not thought.sealed):
            return True
        if part.reasoning:
            return False
    return False


def _merged(parts: list[Text]) -> Text:
    if len(parts) == 1 and len(parts[0].calls) < 2:
        return parts[0]
    # Most are nothing but text.
    more = [
        part
        for part in parts
        if part.logprobs or part.calls or part.reasoning or part.signature or part.sealed or part.stop
    ]
    return Text(
        "".join([part.text for part in parts]),
        sum([part.tokens for part in parts]),
        parts[0].choice,
        tuple(logprob for part in more for logprob in part.logprobs),
        parts[-1].cached_tokens,
        merge_pieces(piece for part in more for piece in part.calls) if more else (),
        "".join(part.reasoning for part in more),
        "".join(part.signature for part in more),
        "".join(part.sealed for part in more),
        "".join(part.stop for part in more),
    )


def merge_pieces(pieces: Iterable[CallPiece]) -> tuple[CallPiece, ...]:
    """One piece per call, in the order of calls."""
    merged: dict[int, tuple[str, list[str]]] = {}
    for piece in pieces:
        name, arguments = merged.setdefault(piece.index, (piece.name, []))
        arguments.append(piece.arguments)
        merged[piece.index] = (name or piece.name, arguments)
    return tuple(CallPiece(index, name, "".join(parts)) for index, (name, parts) in sorted(merged.items()))


class Vector(msgspec.Struct, frozen=True):
    """The vector of input number `index`, little-endian float32; `input_tokens` is what was read for it."""

    index: int
    values: bytes
    input_tokens: int

    @property
    def line(self) -> str:
        """As text, in which an answer keeps it until it is written or given again."""
        return f"{self.index} {base64.b64encode(self.values).decode()}\n"


def vector_lines(text: str) -> list[str]:
    """The base64 of each vector in an answer's lines, in the order of the inputs."""
    found = (line.split(" ") for line in text.splitlines())
    return [values for _, values in sorted((int(index), values) for index, values in found)]


class End(msgspec.Struct, frozen=True):
    """The last chunk. `error` is set exactly when `reason` is error; usage covers what was done until then.

    `choices` says how each choice ended, where there are several; `reason` is then length if any was cut off.
    `served_model` and `reported_cost` are what a provider says that it ran, and what it says that it charges, and
    `upstream_id` its own name for the answer.
    """

    reason: FinishReason
    usage: Usage
    error: MillicentError | None = None
    choices: tuple[FinishReason, ...] = ()
    served_model: str | None = None
    reported_cost: Money | None = None
    upstream_id: str | None = None


Chunk = Text | Vector | End
