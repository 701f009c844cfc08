from __future__ import annotations

from millicent.core.clock import ManualClock
from millicent.core.steps import SequenceWork, StepRecord
from millicent.meter.step_log import StepLog


def step(index: int, *sequences: int, device: str = "cpu") -> StepRecord:
    work = tuple(SequenceWork(sequence, 8 if index == 0 else 0, 1, 1, 10) for sequence in sequences)
    return StepRecord(device, "tiny", index, 1_000 * index, 900, work)


def test_a_receipts_steps_come_with_those_of_others_between_them() -> None:
    log = StepLog(ManualClock(start_ns=10**18))
    log.add(step(0, 1), ["a"], [1])
    log.add(step(1, 1, 2), ["a", "b"], [1, 2])
    log.add(step(2, 2), ["b"], [1])
    log.add(step(9, 7, device="cuda:0"), ["z"], [1])
    log.add(step(3, 1, 3), ["a", None], [1, 1])
    log.add(step(4, 2), ["b"], [1])
    seen = log.around("a")
    assert [each.index for each in seen] == [0, 1, 2, 3]
    assert seen[1].start_ns == 10**18 + 1_000
    assert [(work.receipt, work.share_ns) for work in seen[1].work] == [("a", 300), ("b", 600)]
    assert seen[3].work[1].receipt is None
    assert log.around("nobody") == []


def test_the_oldest_steps_are_forgotten_once_there_are_too_many_sequences() -> None:
    log = StepLog(ManualClock(), max_sequences=4)
    for index in range(5):
        log.add(step(index, 1, 2), ["a", "b"], [1, 1])
    assert [each.index for each in log.around("a")] == [3, 4]
