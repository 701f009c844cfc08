"""What metering costs: the meter's and the ledger's own processor time, beside the steps that they meter.

The steps are real passes of SmolLM2 with 1, 8 and 32 sequences. Then answers of 128 tokens go through the meter and a
ledger on disk, as the pipeline does it: opened with a hold, a step record and a usage for every token, a checkpoint for
every second, priced and closed. Everything that this process computes meanwhile counts, the ledger's thread included.

    python bench/metering.py            # a quarter of a minute
    python bench/metering.py --record   # and a line in bench/results/metering.jsonl
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from decimal import Decimal
from pathlib import Path
from typing import Any

import msgspec
import results
from attribution import MODEL, Machine, Member

from millicent.core.budgets import Budget, Every
from millicent.core.clock import NS_PER_S, ManualClock
from millicent.core.identifiers import SystemIds
from millicent.core.money import Money
from millicent.core.receipts import Attempt, Receipt, Role, Status
from millicent.core.request import Attribution
from millicent.core.steps import DeviceState, SequenceWork, StepRecord
from millicent.core.usage import Provenance, Usage
from millicent.ledger.budgets import put_budget
from millicent.ledger.config import LedgerConfig
from millicent.ledger.sqlite import SqliteLedger
from millicent.meter.attribution import StepTimeShares
from millicent.meter.meter import Meter
from millicent.meter.placements import Placement
from millicent.meter.pricing import price

BATCHES = (1, 8, 32)
TOKENS = 128
CONTEXT_TOKENS = 300
DEVICE = "cpu:0"
PLACEMENT = Placement("here", 1, Decimal("0.1"), Provenance.MEASURED)


def real_step_ns(machine: Machine, batch: int) -> int:
    """The median of passes in which so many sequences decode."""
    members = [(lane, Member(1, CONTEXT_TOKENS)) for lane in range(batch)]
    machine.step_ns(members)
    return int(statistics.median(machine.step_ns(members) for _ in range(15)))


class Gateway:
    """A meter and a ledger on disk, on a clock that runs at the pace of the steps."""

    def __init__(self, home: Path, step_ns: int) -> None:
        self.clock = ManualClock()
        self.ids = SystemIds(self.clock)
        self.shares = StepTimeShares(self.clock, self.ids)
        self.meter = Meter(self.clock, "gw", self.ids, self.shares)
        self.meter.add_device(DEVICE, PLACEMENT)
        self.meter.device_state(DEVICE, DeviceState.UP, 0)
        self.ledger = SqliteLedger(home / "ledger.db", LedgerConfig(), self.clock, "gw")
        self.step_ns = step_ns
        self.steps = 0
        self.sequences = 0
        self.metering_ns = 0
        self._checkpointed_ns = 0

    async def open(self) -> tuple[Receipt, int]:
        self.sequences += 1
        sequence = self.sequences
        now_ns = self.clock.now_ns()
        receipt = Receipt(
            id=self.ids.new("rcpt"),
            created_at_ns=now_ns,
            model=MODEL,
            dialect="openai.chat",
            stream=True,
            placement=PLACEMENT.name,
            attribution=Attribution(user="ada", feature="search"),
            attempts=(Attempt(1, "local", PLACEMENT.name, MODEL, Role.INFERENCE, now_ns),),
            hold=Money(10**6),
            prices=PLACEMENT.prices,
        )
        bounded = await self.ledger.open(receipt)
        self.meter.open(receipt.id, 1, (sequence,))
        if bounded:
            self.meter.bound(receipt.id, 10**12, lambda: None)
        return receipt, sequence

    async def step(self, running: list[tuple[Receipt, int]], token: int) -> None:
        start_ns = self.clock.monotonic_ns()
        self.clock.advance(self.step_ns)
        works = tuple(SequenceWork(sequence, 0, 1, 1, CONTEXT_TOKENS + token) for _, sequence in running)
        record = StepRecord(DEVICE, MODEL, self.steps, start_ns, self.step_ns, works)
        began_ns = time.thread_time_ns()
        self.meter.step(record)
        for receipt, _ in running:
            usage = Usage.of(Provenance.MEASURED, input_fresh=CONTEXT_TOKENS, output_text=token)
            self.meter.note_usage(receipt.id, usage)
        self.metering_ns += time.thread_time_ns() - began_ns
        self.steps += 1
        if self.clock.monotonic_ns() - self._checkpointed_ns > NS_PER_S:
            self._checkpointed_ns = self.clock.monotonic_ns()
            await self.checkpoint()

    async def checkpoint(self) -> None:
        if fits := self.shares.unsaved():
            await self.ledger.save_fits(fits)
            self.shares.saved(fits)
        checkpoint = self.meter.checkpoint()
        await self.ledger.checkpoint(checkpoint)
        self.meter.written(checkpoint)

    async def close(self, receipt: Receipt) -> None:
        now_ns = self.clock.now_ns()
        reading = self.meter.close(receipt.id)
        priced = price(reading, receipt.attempts, PLACEMENT, now_ns)
        closed = msgspec.structs.replace(
            receipt,
            status=Status.SUCCEEDED,
            settled_at_ns=now_ns,
            finish_reason="length",
            usage=reading.usage,
            accelerator=reading.accelerator,
            lines=priced.lines,
            list_price=priced.list_price,
        )
        await self.ledger.close(closed, reading.shares)


async def metered(batch: int, step_ns: int, answers: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as home:
        gateway = Gateway(Path(home), step_ns)
        await gateway.ledger.start()
        budget = Budget(name="all", limit=Money(10**15), every=Every.MONTH)
        await gateway.ledger.write(lambda connection: put_budget(connection, budget))
        await gateway.checkpoint()
        began_ns = time.process_time_ns()
        rounds = -(-answers // batch)
        for _ in range(rounds):
            running = list(await asyncio.gather(*(gateway.open() for _ in range(batch))))
            for token in range(TOKENS):
                await gateway.step(running, token)
            await asyncio.gather(*(gateway.close(receipt) for receipt, _ in running))
        spent_ns = time.process_time_ns() - began_ns
        await gateway.ledger.stop()
    steps = rounds * TOKENS
    rest_ns = spent_ns - gateway.metering_ns
    return {
        "batch": batch,
        "step_ms": round(step_ns / 1e6, 3),
        "meter_us_per_step": round(gateway.metering_ns / steps / 1e3, 1),
        "ledger_us_per_answer": round(rest_ns / (rounds * batch) / 1e3, 1),
        "part_of_step_time": round(spent_ns / (steps * step_ns), 5),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=int, default=64, help="answers of 128 tokens for each batch size")
    parser.add_argument("--record", action="store_true", help="add the result to results/metering.jsonl")
    arguments = parser.parse_args()
    machine = Machine(cpu_time=False)
    machine.fill()
    found = [asyncio.run(metered(batch, real_step_ns(machine, batch), arguments.answers)) for batch in BATCHES]
    row = {**results.environment(), "model": MODEL, "tokens": TOKENS, "answers": arguments.answers, "batches": found}
    print(json.dumps(row, indent=1))
    if arguments.record:
        results.write("metering", row)


if __name__ == "__main__":
    main()
