"""What rules find: the nouns of this room."""

from __future__ import annotations

from typing import Literal

import msgspec

from millicent.ledger.queries import ReceiptFilter

Measure = Literal[
    "cost", "request_cost", "tokens", "latency", "target", "errors", "cache", "mix", "unpriced", "unattributed"
]


class Cause(msgspec.Struct, frozen=True):
    """`share` of the change, as a percentage, comes from this member of a dimension: a key, a user, a model."""

    dimension: str
    member: str
    percent: int


class Subject(msgspec.Struct, frozen=True, order=True):
    """What an alert is about. Of what is found twice about the same one, one alert is open."""

    rule: str
    kind: str
    figure: str
    dimension: str
    member: str

    @property
    def whose(self) -> str:
        """For a sentence."""
        return "everything" if self.dimension == "all" else named(self.dimension, self.member)


class Change(msgspec.Struct, frozen=True):
    """What is asked to know who caused it: how `measure` differs between the receipts `now` and the first of `before`
    that there are any of. Without these it is how it is shared out."""

    measure: Measure
    now: ReceiptFilter
    before: tuple[ReceiptFilter, ...] = ()
    rose: bool = True

    @property
    def receipts(self) -> dict[str, str]:
        """The filters of those that it is about, but for time."""
        fields = msgspec.structs.asdict(self.now)
        return {name: value for name, value in fields.items() if value is not None and name not in {"from_ns", "to_ns"}}


class Finding(msgspec.Struct, frozen=True):
    """Something is unusual now. `title` says what changed, in one sentence; `facts` are figures by name, as text with
    their unit, the one that is watched first; it is worst where `size` is largest. What goes on unchanged may leave
    title and facts empty. `causes` are who makes most of the change."""

    subject: Subject
    title: str
    facts: dict[str, str]
    since_ns: int
    size: float
    change: Change
    causes: tuple[Cause, ...] = ()


def named(dimension: str, member: str) -> str:
    """A member, for a sentence."""
    return f'{dimension} "{member}"' if member else f"what has no {dimension}"
