"""A device made of arithmetic: the scripted model, launched. Passes take time on a clock that moves when one is waited
for; what a pass draws can be seen when it lands, and not before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from millicent.core.clock import ManualClock
from millicent.engine.batch import Piece
from millicent.engine.cuda.ahead import Changes, Landed
from millicent.engine.sampler import Draw, sample
from support.scripted_model import ScriptedModel

if TYPE_CHECKING:
    from millicent.engine.cuda.ahead import Flight


class DeviceLost(Exception):
    """After this nothing works any more."""


class LaunchedModel(ScriptedModel):
    """`pass_ns` is how long the device works on a pass, and `pace` how fast its own clock goes; `log` tells what
    happened in which order."""

    def __init__(
        self,
        clock: ManualClock | None = None,
        *,
        pass_ns: int = 1000,
        pace: float = 1.0,
        step_tokens: int = 16,
        context_tokens: int = 256,
        before: Callable[[Sequence[Piece]], None] = lambda pieces: None,
    ) -> None:
        super().__init__(context_tokens=context_tokens, before=before)
        self.working_bytes = 0
        self.step_tokens = step_tokens
        self.clock = clock or ManualClock()
        self.pass_ns = pass_ns
        self.pace = pace
        self.free_ns = 0
        self.drawn: list[int | None] = []
        self.log: list[str] = []
        self.last: LaunchedPass | None = None

    def launch(self, pieces: Sequence[Piece], draws: Sequence[Draw]) -> LaunchedPass:
        assert self.last is None or self.last.brought, "what the pass before draws isn't settled"
        begun_ns = max(self.clock.monotonic_ns(), self.free_ns)
        known = [replace(piece, tokens=[self._known(token) for token in piece.tokens]) for piece in pieces]
        logits = self.forward(known)
        plain = [replace(draw, adjust=None) for draw in draws]
        self.drawn = sample(logits, plain) if plain else []
        self.last = LaunchedPass(self, len(self.batches) - 1, logits, begun_ns)
        self.log.append(f"launch {self.last.number}")
        return self.last

    def _known(self, token: int) -> int:
        if token >= 0:
            return token
        drawn = self.drawn[-1 - token]
        return 0 if drawn is None else drawn

    def is_lost(self, error: Exception) -> bool:
        return isinstance(error, DeviceLost)


class LaunchedPass:
    def __init__(self, model: LaunchedModel, number: int, logits: torch.Tensor, begun_ns: int) -> None:
        self.number = number
        self.brought = False
        self._model = model
        self._logits = logits
        self._tokens: list[int | None] = []
        self._scored: Sequence[int] = ()
        self._begun_ns = begun_ns
        self.end_ns = model.free_ns = max(model.clock.monotonic_ns(), model.free_ns) + model.pass_ns

    def redraw(self, rows: Sequence[int], draws: Sequence[Draw], changes: Changes) -> None:
        assert self._model.last is self, "another pass has taken the logits' place"
        scores = self._logits[list(rows)].clone()
        for row, token, factor, minus, plus in zip(
            changes.rows, changes.tokens, changes.factors, changes.minus, changes.plus, strict=True
        ):
            score = scores[int(row), int(token)]
            scores[int(row), int(token)] = (score * factor if score < 0 else score / factor) - minus + plus
        for row, allowed in changes.allowed.items():
            bits = torch.tensor([allowed[token // 8] >> token % 8 & 1 for token in range(scores.shape[1])])
            scores[row][bits == 0] = -torch.inf
        for row, token in zip(rows, sample(scores, [replace(draw, adjust=None) for draw in draws]), strict=True):
            self._model.drawn[row] = token
        self._model.log.append(f"redraw {self.number}")

    def bring(self, scored: Sequence[int]) -> None:
        self._tokens, self._scored, self.brought = list(self._model.drawn), scored, True

    def reached(self) -> bool:
        return self._model.clock.monotonic_ns() >= self.end_ns

    def land(self, before: Flight | None) -> Landed:
        assert self.brought
        self._model.clock.advance(max(0, self.end_ns - self._model.clock.monotonic_ns()))
        self._model.log.append(f"land {self.number}")
        since_ns = before.end_ns if isinstance(before, LaunchedPass) else self._begun_ns
        logits = {row: self._logits[row].numpy() for row in self._scored}
        return Landed(self._tokens, logits, round((self.end_ns - since_ns) * self._model.pace))
