"""A ledger of weeks of made-up traffic, computed when it is asked: for what watches over time."""

from __future__ import annotations

import asyncio
import sqlite3
import weakref
from collections.abc import Awaitable, Callable, Iterator
from functools import lru_cache
from importlib.resources import files
from math import pi, sin
from random import Random
from typing import TypeVar

import msgspec

from millicent.core.budgets import Balance, Budget
from millicent.core.clock import NS_PER_MS, NS_PER_S, ManualClock
from millicent.core.money import Money
from millicent.ledger.queries import GroupBy, ReceiptFilter, Sample, Totals

T = TypeVar("T")
START_NS = 1_767_225_600 * NS_PER_S  # Thursday, 2026-01-01
QUARTER_NS = 900 * NS_PER_S
DAY_NS = 86_400 * NS_PER_S


class Flow(msgspec.Struct, frozen=True):
    """One kind of request. `per_quarter` of them come at noon; at night a quarter of that."""

    feature: str
    key: str = "key_1"
    user: str = "ada"
    model: str = "small"
    per_quarter: int = 40
    tokens: int = 1000
    nanousd: int = 2_000_000
    took_ms: int = 800
    failed: float = 0.01
    cached: float = 0.5
    met: bool | None = None


Plan = Callable[[int], list[Flow]]


def alert_tables() -> sqlite3.Connection:
    """The tables of the room, empty."""
    connection = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
    for name in ("0013_alerts.sql", "0022_alerts_as_they_stand.sql"):
        connection.executescript((files("millicent.ledger") / "migrations" / name).read_text("utf-8"))
    return connection


def steady(_: int) -> list[Flow]:
    return [Flow("search"), Flow("summaries", key="key_2", user="eve", model="large", nanousd=9_000_000)]


class WatchedLedger:
    """What the watcher asks and writes; `plan` says what flows in the quarter-hour that begins then (nanoseconds)."""

    def __init__(self, plan: Plan = steady) -> None:
        self.plan = plan
        self.connection = alert_tables()
        weakref.finalize(self, self.connection.close)
        self.balances: list[tuple[Budget, list[Balance]]] = []

    async def write(self, operation: Callable[[sqlite3.Connection], T]) -> T:
        self.connection.execute("BEGIN IMMEDIATE")
        try:
            result = operation(self.connection)
        except BaseException:
            self.connection.execute("ROLLBACK")
            raise
        self.connection.execute("COMMIT")
        return result

    def ask(self, question: Callable[[sqlite3.Connection], T]) -> T | None:
        return question(self.connection)

    def budgets(self, at_ns: int) -> list[tuple[Budget, list[Balance]]]:
        return self.balances

    def first_created_ns(self) -> int | None:
        return START_NS

    def samples(self, where: ReceiptFilter, *, most: int) -> list[Sample]:
        return [sample for sample, _ in self._matching(where)][:most]

    def totals(self, by: GroupBy, where: ReceiptFilter) -> list[Totals]:
        groups: dict[str | None, list[tuple[Sample, int]]] = {}
        for sample, nanousd in self._matching(where):
            group = ("failed" if sample.failed else "succeeded") if by == "status" else getattr(sample, by)
            groups.setdefault(group, []).append((sample, nanousd))
        return [
            Totals(
                group=group,
                requests=len(rows),
                input_tokens=sum(sample.input_tokens or 0 for sample, _ in rows),
                output_tokens=sum(sample.output_tokens or 0 for sample, _ in rows),
                serving_ns=0,
                cost=Money(sum(nanousd for _, nanousd in rows)),
                unpriced=0,
                assumed=0,
                unknown_usage=0,
            )
            for group, rows in groups.items()
        ]

    def _matching(self, where: ReceiptFilter) -> Iterator[tuple[Sample, int]]:
        assert where.from_ns is not None
        assert where.to_ns is not None
        for quarter_ns in range(where.from_ns - where.from_ns % QUARTER_NS, where.to_ns, QUARTER_NS):
            for sample, nanousd in self._requests(quarter_ns):
                if (
                    where.feature in {None, sample.feature}
                    and where.key in {None, sample.key}
                    and where.model in {None, sample.model}
                    and where.user in {None, sample.user}
                    and (where.status is None or (where.status == "failed") is sample.failed)
                ):
                    yield sample, nanousd

    def _requests(self, quarter_ns: int) -> Iterator[tuple[Sample, int]]:
        for flow in self.plan(quarter_ns) if quarter_ns >= START_NS else ():
            yield from _made(flow, quarter_ns)


@lru_cache(maxsize=4096)
def _made(flow: Flow, quarter_ns: int) -> list[tuple[Sample, int]]:
    random = Random(f"{flow.key}{quarter_ns}")
    day = 0.625 + 0.375 * sin((quarter_ns % DAY_NS / DAY_NS - 0.25) * 2 * pi)
    mean = flow.per_quarter * day
    made = []
    for _ in range(max(0, round(random.gauss(mean, mean**0.5)))):
        size = random.lognormvariate(-0.08, 0.4)
        tokens = round(flow.tokens * size)
        sample = Sample(
            created_at_ns=quarter_ns,
            feature=flow.feature,
            key=flow.key,
            user=flow.user,
            model=flow.model,
            failed=random.random() < flow.failed,
            total_ns=round(flow.took_ms * random.lognormvariate(0, 0.3)) * NS_PER_MS,
            input_tokens=tokens - tokens // 5,
            output_tokens=tokens // 5,
            cached_tokens=round((tokens - tokens // 5) * min(1.0, flow.cached * random.uniform(0.8, 1.2))),
            met=flow.met,
        )
        made.append((sample, round(flow.nanousd * size)))
    return made


def pass_time(
    tick: Callable[[], Awaitable[bool]], clock: ManualClock, until_ns: int, *, step_ns: int = QUARTER_NS
) -> None:
    """Until then, as a gateway that was on all the while: one look after each step."""

    async def run() -> None:
        while clock.now_ns() < until_ns:
            clock.advance(min(step_ns, until_ns - clock.now_ns()))
            while await tick():
                pass

    asyncio.run(run())
