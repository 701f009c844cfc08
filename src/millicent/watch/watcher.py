"""Looks at the ledger once a minute, away from requests, and writes down what is unusual.

Budgets are looked at every minute; anomalies and latency targets when a quarter-hour is over, drift every hour. Each
look is computed in a thread from rollups and a bounded number of receipts, and committed only where no other gateway
was first.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Protocol, TypeVar

import msgspec

from millicent.core.budgets import Balance, Budget
from millicent.core.clock import NS_PER_HOUR, NS_PER_S, Clock
from millicent.core.errors import MillicentError
from millicent.core.identifiers import Ids
from millicent.ledger.queries import GroupBy, ReceiptFilter, Sample, Totals
from millicent.watch import store
from millicent.watch.burn import Target, budget_findings, latency_findings
from millicent.watch.causes import causes, earlier
from millicent.watch.config import AlertConfig
from millicent.watch.coverage import coverage_findings
from millicent.watch.drift import drift_findings
from millicent.watch.findings import Change, Finding, Subject
from millicent.watch.messages import message_body
from millicent.watch.series import (
    ALL,
    DIMENSIONS,
    MOST_MEMBERS,
    MOST_SAMPLES,
    QUARTER_NS,
    Batch,
    Reading,
    Series,
    SeriesState,
    batches,
    figures_of,
    sentence,
)

log = logging.getLogger(__name__)

T = TypeVar("T")
DEFAULT_RULE = "default"

_MINUTE_NS = 60 * NS_PER_S
# Answers that began in a quarter-hour have this long to end.
_GRACE_NS = 2 * _MINUTE_NS
# A ledger that is there already teaches what is usual: so much of it, so much at a time.
_LEARNED_NS = 21 * 24 * NS_PER_HOUR
_AT_A_TIME = 8
_LEARNING_PAUSE_S = 10
# What was unusual longer ago than this when it is looked at is written down and not told.
_STALE_NS = 2 * NS_PER_HOUR
_TARGETS_NS = 6 * NS_PER_HOUR
# Who causes what goes on for longer is told by what they add lately.
_LONGEST_NS = 6 * NS_PER_HOUR


def with_default(rules: Mapping[str, AlertConfig]) -> dict[str, AlertConfig]:
    """Where nothing is configured, everything is watched."""
    return dict(rules) or {DEFAULT_RULE: AlertConfig()}


class Ledger(Protocol):
    """`ledger.queries.LedgerQueries`, as far as it is asked."""

    def totals(self, by: GroupBy, where: ReceiptFilter) -> list[Totals]: ...

    def samples(self, where: ReceiptFilter, *, most: int) -> list[Sample]: ...

    def budgets(self, at_ns: int) -> list[tuple[Budget, list[Balance]]]: ...

    def first_created_ns(self) -> int | None: ...

    def ask(self, question: Callable[[sqlite3.Connection], T]) -> T | None: ...


class Writes(Protocol):
    """What is asked of the ledger: `SqliteLedger.write`."""

    def write(self, operation: Callable[[sqlite3.Connection], T]) -> Awaitable[T]: ...


class Watcher:
    """`run` until cancelled; `tick` is one look. `told` is called when there may be something to send."""

    def __init__(
        self,
        rules: Mapping[str, AlertConfig],
        *,
        ledger: Writes,
        queries: Ledger,
        clock: Clock,
        ids: Ids,
        webhooks: frozenset[str] = frozenset(),
        told: Callable[[], None] = lambda: None,
    ) -> None:
        self._rules = with_default(rules)
        self._ledger = ledger
        self._queries = queries
        self._clock = clock
        self._ids = ids
        self._webhooks = webhooks
        self._told = told

    async def run(self) -> None:
        while True:
            pause_s = 60.0
            try:
                if await self.tick():
                    pause_s = _LEARNING_PAUSE_S
            except MillicentError as error:
                log.warning("alerts are not up to date: %s", error)
            except Exception:
                log.exception("alerts are not up to date")
            await asyncio.sleep(pause_s)

    async def tick(self) -> bool:
        """Whether there is more to look at than was looked at now."""
        now_ns = self._clock.now_ns()
        found = await asyncio.to_thread(self._minute, now_ns)
        if found is not None:
            await self._commit(found)
        ended_ns = _quarter(now_ns - _GRACE_NS)
        quarter = await asyncio.to_thread(self._quarters, now_ns, ended_ns)
        if quarter is None:
            return False
        await self._commit(quarter)
        return quarter.through_ns < ended_ns

    async def _commit(self, found: store.Evaluation) -> None:
        def write(connection: sqlite3.Connection) -> store.Changes | None:
            quiet = [rule for rule, config in self._rules.items() if config.is_quiet(found.at_ns)]
            changes = store.commit(connection, found, self._ids, quiet)
            if changes is not None and (changes.opened or changes.resolved):
                bodies = [
                    (rule, body)
                    for rule in sorted(self._webhooks & self._rules.keys())
                    if (body := message_body(rule, changes, self._rules[rule].pages_url)) is not None
                ]
                store.add_messages(connection, bodies, self._ids, found.at_ns)
            return changes

        changes = await self._ledger.write(write)
        for alert in () if changes is None else changes.opened:
            log.warning("alert %s: %s", alert.id, alert.title)
        if changes is not None and (changes.opened or changes.resolved):
            self._told()

    def _minute(self, now_ns: int) -> store.Evaluation | None:
        """Budgets; None where this minute was looked at."""
        minute_ns = now_ns - now_ns % _MINUTE_NS
        before_ns = self._through("minute")
        if before_ns is not None and before_ns >= minute_ns:
            return None
        findings: list[Finding] = []
        budgets = self._queries.budgets(now_ns)
        for rule, config in self._rules.items():
            if budgets and "budget" in config.watch:
                findings += budget_findings(rule, config, budgets, self._queries, now_ns)
        look = store.Look(now_ns, frozenset({"budget"}), self._explained(findings, self._open()))
        return self._evaluation("minute", before_ns, minute_ns, now_ns, [look])

    def _quarters(self, now_ns: int, ended_ns: int) -> store.Evaluation | None:
        """The next quarter-hours that are over; None where there is none that wasn't looked at."""
        before_ns = self._through("quarter")
        from_ns = before_ns if before_ns is not None else self._beginning(now_ns)
        if from_ns is None or from_ns >= ended_ns:
            return None
        # After a long pause the past weeks are enough.
        from_ns = max(from_ns, _quarter(now_ns - _LEARNED_NS))
        through_ns = min(ended_ns, from_ns + _AT_A_TIME * QUARTER_NS)
        known = self._queries.ask(store.read_series) or {}
        opened = self._open()
        series, looks, targets = self._learn(known, opened, from_ns, through_ns, now_ns)
        if now_ns - through_ns < _STALE_NS:
            looks.append(self._missing_and_drifting(targets, opened, through_ns, now_ns))
        evaluation = self._evaluation("quarter", before_ns, through_ns, now_ns, looks)
        evaluation.series, evaluation.targets = series, targets
        return evaluation

    def _open(self) -> set[Subject]:
        return self._queries.ask(store.open_subjects) or set()

    def _explained(self, findings: Sequence[Finding], opened: set[Subject]) -> list[Finding]:
        """What isn't open yet, with who caused it."""
        return [
            finding
            if finding.subject in opened
            else msgspec.structs.replace(finding, causes=causes(self._queries, finding.change))
            for finding in findings
        ]

    def _missing_and_drifting(
        self, targets: Sequence[Target], opened: set[Subject], through_ns: int, now_ns: int
    ) -> store.Look:
        kinds: set[str] = {"latency", "coverage"}
        findings: list[Finding] = []
        before = self._queries.ask(partial(store.read_targets, from_ns=through_ns - _TARGETS_NS)) or []
        for rule, config in self._rules.items():
            if "latency" in config.watch:
                findings += latency_findings(rule, config, [*before, *targets], through_ns)
            if "coverage" in config.watch:
                findings += coverage_findings(rule, config, self._queries, through_ns)
        if through_ns % NS_PER_HOUR == 0:
            kinds.add("drift")
            for rule, config in self._rules.items():
                if "drift" in config.watch:
                    findings += drift_findings(rule, config, self._queries, through_ns)
        return store.Look(now_ns, frozenset(kinds), self._explained(findings, opened))

    def _learn(
        self,
        known: dict[store.SeriesName, SeriesState],
        opened: set[Subject],
        from_ns: int,
        through_ns: int,
        now_ns: int,
    ) -> tuple[dict[store.SeriesName, SeriesState], list[store.Look], list[Target]]:
        """Every series after these quarter-hours, and what was unusual after each."""
        watched = {rule: config for rule, config in self._rules.items() if "anomaly" in config.watch}
        states = {name: state for name, state in known.items() if name[0] in watched}
        targets: list[Target] = []
        looks: list[store.Look] = []
        for quarter_ns in range(from_ns, through_ns, QUARTER_NS):
            end_ns = quarter_ns + QUARTER_NS
            where = ReceiptFilter(from_ns=quarter_ns, to_ns=end_ns)
            totals = {by: self._queries.totals(by, where) for by in _BY}
            samples = self._queries.samples(where, most=MOST_SAMPLES)
            targets += _targets(quarter_ns, samples)
            found = batches(samples, totals)
            findings: list[Finding] = []
            for name in _names(watched, states, found):
                rule, figure, dimension, member = name
                batch = found.get((dimension, member)) or Batch(share_of=found[ALL, ""].requests)
                series = Series(figure, states.setdefault(name, SeriesState()), watched[rule].sensitivity)  # type: ignore[arg-type] # of ours
                reading = series.observe(quarter_ns // NS_PER_S, batch)
                finding = _finding(name, series, reading, opened, quarter_ns)
                findings += [] if finding is None else [finding]
            findings = self._explained(findings, opened)
            opened = {finding.subject for finding in findings}
            late = now_ns - end_ns >= _STALE_NS
            looks.append(store.Look(end_ns if late else now_ns, frozenset({"anomaly"}), findings, late))
        return states, looks, targets

    def _evaluation(
        self, what: str, before_ns: int | None, through_ns: int, now_ns: int, looks: list[store.Look]
    ) -> store.Evaluation:
        return store.Evaluation(
            what=what,
            before_ns=-1 if before_ns is None else before_ns,
            through_ns=through_ns,
            at_ns=now_ns,
            rules=frozenset(self._rules),
            looks=looks,
        )

    def _through(self, what: str) -> int | None:
        return self._queries.ask(partial(store.through_ns, what=what))

    def _beginning(self, now_ns: int) -> int | None:
        first_ns = self._queries.first_created_ns()
        return None if first_ns is None else _quarter(max(first_ns, now_ns - _LEARNED_NS))


_BY: tuple[GroupBy, ...] = ("feature", "key", "model")


def _quarter(ns: int) -> int:
    return ns - ns % QUARTER_NS


def _names(
    rules: Mapping[str, AlertConfig], known: Mapping[store.SeriesName, object], found: Mapping[tuple[str, str], Batch]
) -> list[store.SeriesName]:
    """Every series there is, and what new ones there is room for. What has no key, say, is only told from everything
    where something has one."""
    names = dict.fromkeys(name for name in known if name[0] in rules)
    told_apart = {ALL, *(name[2] for name in names if name[3]), *(dimension for dimension, member in found if member)}
    for rule, config in rules.items():
        room = {
            dimension: 2 * MOST_MEMBERS - len({name[3] for name in names if name[0] == rule and name[2] == dimension})
            for dimension in DIMENSIONS
        }
        for dimension, member in found:
            if dimension not in told_apart or not config.covers(dimension, member):
                continue
            wanted = [(rule, figure, dimension, member) for figure in figures_of(dimension) if figure in config.figures]
            new = [name for name in wanted if name not in names]
            if new and room[dimension] > 0:
                room[dimension] -= 1
                names.update(dict.fromkeys(new))
    return list(names)


def _finding(
    name: store.SeriesName, series: Series, reading: Reading | None, opened: set[Subject], quarter_ns: int
) -> Finding | None:
    """Of what is unusual. Its sentence is of when it last was: an event stays open until the series has been calm."""
    rule, figure, dimension, member = name
    subject = Subject(rule, "anomaly", figure, dimension, member)
    if series.since_s is None or (subject not in opened and (reading is None or reading.calm)):
        return None
    since_ns, to_ns = series.since_s * NS_PER_S, quarter_ns + QUARTER_NS
    whose = {} if dimension == ALL else {dimension: member}
    now = ReceiptFilter(**whose, from_ns=max(since_ns, to_ns - _LONGEST_NS), to_ns=to_ns)
    if reading is None:
        return Finding(subject, "", {}, since_ns, 0.0, Change(series.figure, now))
    title, facts = sentence(series.figure, subject.whose, reading)
    change = Change(series.figure, now, earlier(now), rose=reading.value > reading.expected)
    off = abs(reading.value - reading.expected)
    return Finding(subject, "" if reading.calm else title, facts, since_ns, off, change)


def _targets(quarter_ns: int, samples: Sequence[Sample]) -> list[Target]:
    aimed: dict[str, list[bool]] = {}
    for sample in samples:
        if sample.met is not None:
            aimed.setdefault(sample.feature or "", []).append(sample.met)
    return [Target(quarter_ns, feature, len(met), sum(met)) for feature, met in aimed.items()]
