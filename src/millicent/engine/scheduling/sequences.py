"""A sequence as the scheduler sees it."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True, eq=False)
class Sequence:
    """`tokens` is the prompt and the output so far: whoever samples a token appends it.

    `computed` rows have their keys and values in `blocks`; `reached` is the most that ever had, so rows between the
    two were thrown away by a preemption. `0 <= computed <= reached <= len(tokens)`, and while the sequence waits for
    its next forward pass `computed < len(tokens)`.
    """

    id: int
    tokens: list[int]
    prompt_tokens: int = field(init=False)
    computed: int = 0
    reached: int = 0
    blocks: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.prompt_tokens = len(self.tokens)

    @property
    def output_tokens(self) -> int:
        return len(self.tokens) - self.prompt_tokens
