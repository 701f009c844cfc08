"""A request without a dialect: what every client's bytes become and every backend receives."""

from __future__ import annotations

from decimal import Decimal

import msgspec

from millicent.core.money import Money


class Message(msgspec.Struct, frozen=True):
    """One turn. `role` is system, user, assistant or tool."""

    role: str
    content: str
    name: str | None = None


class Sampling(msgspec.Struct, frozen=True):
    """How tokens are drawn. `top_k` 0 and `top_p` 1 switch those filters off; temperature 0 is greedy."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None


class Limits(msgspec.Struct, frozen=True):
    """When output ends. `max_tokens` None means as far as the context reaches. Stop strings are left out."""

    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False


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


class Request(msgspec.Struct, frozen=True):
    """`id` is the receipt's identifier. Exactly one of `messages`, `prompt` and `embedding` is set;
    a prompt is text or token ids and gets no chat template."""

    id: str
    dialect: str
    model: str
    messages: tuple[Message, ...] | None = None
    prompt: str | tuple[int, ...] | None = None
    embedding: Embedding | None = None
    sampling: Sampling = Sampling()
    limits: Limits = Limits()
    stream: bool = False
    attribution: Attribution = Attribution()
    latency_target_ms: int | None = None
    max_cost: Money | None = None
    outside_costs: tuple[OutsideCost, ...] = ()
