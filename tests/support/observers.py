"""An observer that writes down what it hears."""

from __future__ import annotations

from millicent.core.steps import DeviceState, Overhead, StepRecord


class Notes:
    def __init__(self) -> None:
        self.states: list[tuple[DeviceState, int]] = []
        self.steps: list[StepRecord] = []
        self.overheads: list[Overhead] = []
        self.losses: list[tuple[int, int]] = []

    def device_state(self, device: str, state: DeviceState, at_ns: int) -> None:
        self.states.append((state, at_ns))

    def step(self, record: StepRecord) -> None:
        self.steps.append(record)

    def overhead(self, overhead: Overhead) -> None:
        self.overheads.append(overhead)

    def lost(self, device: str, start_ns: int, wall_ns: int) -> None:
        self.losses.append((start_ns, wall_ns))
