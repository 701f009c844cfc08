"""What an engine reports: one record per forward pass, and the time a device spent on anything else."""

from __future__ import annotations

from enum import StrEnum

import msgspec


class SequenceWork(msgspec.Struct, frozen=True, array_like=True):
    """What one sequence asked of one forward pass. These fields are frozen: metering rests on them.

    A sequence either prefills or decodes in a step. `decode_rows` counts rejected drafts too.
    `kv_read_tokens` is the context its last row attended to, itself included: the KV tokens read.
    `recomputed_rows` is how many of `prefill_rows` repeat work that a preemption threw away. `drafted_tokens` is how
    many of `decode_rows` were guesses, `accepted_tokens` how many of those were right and became output.
    """

    sequence: int
    prefill_rows: int
    decode_rows: int
    sampled_rows: int
    kv_read_tokens: int
    recomputed_rows: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0

    @property
    def rows(self) -> int:
        return self.prefill_rows + self.decode_rows

    @property
    def prefill_pairs(self) -> int:
        """Pairs of (query row, attended token) in causal prefill attention."""
        before = self.kv_read_tokens - self.prefill_rows
        return self.prefill_rows * before + self.prefill_rows * (self.prefill_rows + 1) // 2


class StepRecord(msgspec.Struct, frozen=True, array_like=True):
    """One forward pass. `start_ns` is on the machine's monotonic clock; steps of a device never overlap."""

    device: str
    model: str
    index: int
    start_ns: int
    wall_ns: int
    sequences: tuple[SequenceWork, ...]


class SeenWork(msgspec.Struct, frozen=True):
    """What one sequence had of a step that is looked at afterwards. `receipt` None: nobody's any more."""

    receipt: str | None
    prefill_rows: int
    decode_rows: int
    share_ns: int


class SeenStep(msgspec.Struct, frozen=True):
    """A step that is looked at afterwards. `start_ns` is UTC."""

    index: int
    start_ns: int
    wall_ns: int
    work: tuple[SeenWork, ...]


class OverheadKind(StrEnum):
    LOAD = "load"
    UNLOAD = "unload"
    COMPILE = "compile"
    CALIBRATE = "calibrate"


class Overhead(msgspec.Struct, frozen=True, array_like=True):
    """Device time that belongs to a model, never to the first caller. Monotonic nanoseconds.

    `steps` are the synthetic forward passes of a calibration, inside that time: nobody's, but to be learned from.
    """

    device: str
    model: str
    kind: OverheadKind
    start_ns: int
    wall_ns: int
    steps: tuple[StepRecord, ...] = ()


class DeviceState(StrEnum):
    """`up`: the clock's time is serving, overhead or idle. `down`: the engine process isn't there."""

    UP = "up"
    DOWN = "down"
