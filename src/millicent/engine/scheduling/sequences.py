"""A sequence as the scheduler sees it."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True, eq=False)
class Sequence:
    """`tokens` is the prompt and the output so far: whoever samples a token appends it.

    `computed` rows have their keys and values in `blocks`; `reached` is the most that ever had, so rows between the
    two were thrown away by a preemption. `0 <= computed <= reached <= len(tokens)`, and while the sequence waits for
    its next forward pass `computed < len(tokens)`. The first `named` blocks are known to the pool by their `keys`.

    `tenant` and `priority` (lower is earlier) decide its place; `deadline_ns` is monotonic, None without one. Unless
    `reuses`, all its rows are computed. `cached_tokens` is how many weren't when it first began. `every_row` asks for
    the logits of all its rows. `guesses` of the tokens that come next are checked where there is room for them; each
    was right so far with `acceptance`.
    """

    id: int
    tokens: list[int]
    tenant: int = 0
    priority: int = 0
    deadline_ns: int | None = None
    reuses: bool = True
    every_row: bool = False
    prompt_tokens: int = field(init=False)
    computed: int = 0
    reached: int = 0
    cached_tokens: int | None = None
    blocks: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    named: int = 0
    arrival: int = 0
    overtaken: int = 0
    guesses: list[int] = field(default_factory=list)
    acceptance: float = 0.5

    def __post_init__(self) -> None:
        self.prompt_tokens = len(self.tokens)

    @property
    def output_tokens(self) -> int:
        return len(self.tokens) - self.prompt_tokens

    @property
    def decodes(self) -> bool:
        """Only the row of its last token, which it made itself, is missing."""
        return self.output_tokens > 0 and self.computed == len(self.tokens) - 1 >= self.reached

    @property
    def place(self) -> tuple[bool, int, int]:
        """Its place in its tenant's queue: the earliest deadline, then the earliest arrival."""
        return (self.deadline_ns is None, self.deadline_ns or 0, self.arrival)
