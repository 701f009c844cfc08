"""What rules find: the nouns of this room."""

from __future__ import annotations

import msgspec


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
        if self.dimension == "all":
            return "everything"
        return f"{self.dimension} `{self.member}`" if self.member else f"what has no {self.dimension}"


class Finding(msgspec.Struct, frozen=True):
    """Something is unusual now. `title` says what changed, in one sentence; `facts` are figures by name, as text with
    their unit; `causes` are who makes most of it."""

    subject: Subject
    title: str
    facts: dict[str, str]
    since_ns: int
    causes: tuple[Cause, ...] = ()
