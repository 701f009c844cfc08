"""A request's steps among their neighbours: who shared the device with it, pass by pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from millicent.core.steps import SeenStep
from millicent.dashboard import tables
from millicent.dashboard.charts import SIDE
from millicent.dashboard.figures import Figure
from millicent.dashboard.tables import Cell, Column, Table

LANES = 9
_SLIVER = SIDE / 1500  # what comes closer than this is drawn as one


class Stretch(NamedTuple):
    """Steps of one kind in a row, in the drawing's coordinates."""

    x: str
    width: str
    kind: Literal["prefill", "decode"]


class Lane(NamedTuple):
    """One request's part in the steps; `own` is the receipt's that is looked at."""

    receipt: str | None
    own: bool
    stretches: tuple[Stretch, ...]


class Timeline(NamedTuple):
    lanes: tuple[Lane, ...]
    others: int  # neighbours without a lane of their own
    steps: int
    own_steps: int
    span_ns: int


def timeline(receipt_id: str, steps: Sequence[SeenStep]) -> Timeline | None:
    """None where its steps aren't known any more."""
    if not steps:
        return None
    start_ns, end_ns = steps[0].start_ns, max(step.start_ns + step.wall_ns for step in steps)
    lanes: dict[str | None, list[tuple[SeenStep, bool]]] = {receipt_id: []}
    for step in steps:
        prefills: dict[str | None, bool] = {}
        for work in step.work:
            prefills[work.receipt] = prefills.get(work.receipt, False) or work.prefill_rows > 0
        for receipt, prefill in prefills.items():
            lanes.setdefault(receipt, []).append((step, prefill))
    span_ns = max(end_ns - start_ns, 1)
    drawn = [
        Lane(receipt, receipt == receipt_id, _stretches(parts, start_ns, span_ns)) for receipt, parts in lanes.items()
    ]
    return Timeline(tuple(drawn[:LANES]), max(0, len(drawn) - LANES), len(steps), len(lanes[receipt_id]), span_ns)


def _stretches(parts: Sequence[tuple[SeenStep, bool]], start_ns: int, span_ns: int) -> tuple[Stretch, ...]:
    """Steps that follow each other without a visible gap are one."""
    runs: list[tuple[float, float, bool]] = []
    for step, prefill in parts:
        left = SIDE * (step.start_ns - start_ns) / span_ns
        right = left + SIDE * step.wall_ns / span_ns
        if runs and runs[-1][2] == prefill and left - runs[-1][1] < _SLIVER:
            runs[-1] = (runs[-1][0], right, prefill)
        else:
            runs.append((left, right, prefill))
    return tuple(
        Stretch(f"{left:.2f}", f"{max(right - left, _SLIVER):.2f}", "prefill" if prefill else "decode")
        for left, right, prefill in runs
    )


def steps_table(receipt_id: str, steps: Sequence[SeenStep]) -> Table:
    """Each of its own steps: when, how long, with how many others, and its share. Shares sum to its device time."""
    columns = (
        Column("Step", "step"),
        Column("After", "after_ns"),
        Column("Took", "wall_ns"),
        Column("Sequences", "sequences"),
        Column("Prompt tokens", "prefill_rows"),
        Column("Decoded", "decode_rows"),
        Column("Its share", "share_ns"),
    )
    rows = []
    for step in steps:
        own = [work for work in step.work if work.receipt == receipt_id]
        if own:
            rows.append(
                (
                    Cell(Figure(f"{step.index}", "", ""), step.index),
                    tables.duration(step.start_ns - steps[0].start_ns),
                    tables.duration(step.wall_ns),
                    tables.count(len(step.work)),
                    tables.count(sum(work.prefill_rows for work in own)),
                    tables.count(sum(work.decode_rows for work in own)),
                    tables.duration(sum(work.share_ns for work in own)),
                )
            )
    return Table(name="steps", title="Steps", columns=columns, rows=tuple(rows), most=1000)
