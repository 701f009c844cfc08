"""A gateway that opens, meters and closes receipts as fast as it can, saying which were acknowledged, until killed."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import msgspec

from millicent.core.clock import SystemClock
from millicent.core.identifiers import SystemIds
from millicent.core.money import Money
from millicent.core.receipts import Attempt, Receipt, Role, Status
from millicent.core.steps import DeviceState, SequenceWork, StepRecord
from millicent.core.usage import Provenance, Usage
from millicent.ledger.config import LedgerConfig
from millicent.ledger.sqlite import SqliteLedger
from millicent.meter.meter import Meter
from millicent.meter.placements import assumed_placement
from millicent.meter.pricing import price

CLIENTS = 16


class Gateway:
    def __init__(self, path: Path) -> None:
        self.clock = SystemClock()
        self.ids = SystemIds(self.clock)
        name = self.ids.new("gw")
        self.ledger = SqliteLedger(path, LedgerConfig(), self.clock, name)
        self.meter = Meter(self.clock, name, self.ids)
        self.placement = assumed_placement("cpu", 2)
        self.sequence = 0

    async def run(self) -> None:
        await self.ledger.start()
        self.meter.add_device("cpu:0", self.placement)
        await self.checkpoint()
        self.meter.device_state("cpu:0", DeviceState.UP, self.clock.monotonic_ns())
        await asyncio.gather(self.device(), *(self.client() for _ in range(CLIENTS)))

    async def device(self) -> None:
        """Steps without pause over the sequences that run, and a checkpoint after every few."""
        index = 0
        while True:
            start_ns = self.clock.monotonic_ns()
            running = list(self.meter._sequences)
            await asyncio.sleep(0.001)
            index += 1
            work = tuple(SequenceWork(sequence, 0, 1, 1, 9) for sequence in running)
            if work:
                wall_ns = self.clock.monotonic_ns() - start_ns
                self.meter.step(StepRecord("cpu:0", "m", index, start_ns, wall_ns, work))
            if index % 10 == 0:
                await self.checkpoint()

    async def checkpoint(self) -> None:
        checkpoint = self.meter.checkpoint()
        await self.ledger.checkpoint(checkpoint)
        self.meter.written(checkpoint)

    async def client(self) -> None:
        while True:
            self.sequence += 1
            now_ns = self.clock.now_ns()
            attempt = Attempt(1, "local", "cpu", "m", Role.INFERENCE, now_ns)
            receipt = Receipt(
                id=self.ids.new("rcpt"),
                created_at_ns=now_ns,
                model="m",
                dialect="openai",
                stream=False,
                attempts=(attempt,),
                hold=Money(40),
                prices=self.placement.prices,
            )
            self.meter.open(receipt.id, 1, (self.sequence,))
            await self.ledger.open(receipt)
            print("open", receipt.id, flush=True)
            await asyncio.sleep(0.002)
            reading = self.meter.close(receipt.id)
            ended_ns = self.clock.now_ns()
            ended = msgspec.structs.replace(attempt, ended_at_ns=ended_ns, status=Status.SUCCEEDED)
            priced = price(reading, (ended,), self.placement, ended_ns)
            closed = msgspec.structs.replace(
                receipt,
                status=Status.SUCCEEDED,
                settled_at_ns=ended_ns,
                usage=Usage.of(Provenance.MEASURED, input_fresh=1),
                accelerator=reading.accelerator,
                lines=priced.lines,
                attempts=(ended,),
            )
            await self.ledger.close(closed, reading.shares)
            print("close", receipt.id, flush=True)


if __name__ == "__main__":
    asyncio.run(Gateway(Path(sys.argv[1])).run())
