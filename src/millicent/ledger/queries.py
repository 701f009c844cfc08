"""Read-only questions to the ledger. Synchronous and safe to call from several threads."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from decimal import Decimal
from itertools import groupby
from pathlib import Path
from typing import Literal, TypeVar
from urllib.parse import quote

import msgspec

from millicent.core.accounts import Account, HourTime
from millicent.core.budgets import Balance, Budget
from millicent.core.clock import NS_PER_HOUR
from millicent.core.entries import Entry, Kind
from millicent.core.errors import InvalidRequest
from millicent.core.fits import StepTimeFit
from millicent.core.holdouts import Held
from millicent.core.money import Money
from millicent.core.receipts import Receipt
from millicent.core.tallies import Sums, Tally
from millicent.core.usage import Provenance
from millicent.ledger import tallies, waste
from millicent.ledger.answers import Answer as Answer  # noqa: PLC0414 - for rooms that may import only this module
from millicent.ledger.answers import newest_answers
from millicent.ledger.budgets import read_balances, read_budgets
from millicent.ledger.entries import latest_tiers, read_entries
from millicent.ledger.finding import newest
from millicent.ledger.hits import CacheUse, cache_use
from millicent.ledger.holdouts import Drawn as Drawn  # noqa: PLC0414 - for rooms that may import only this module
from millicent.ledger.holdouts import drawn
from millicent.ledger.late import fits_of, latest_fits
from millicent.ledger.levers import Coverage, coverage
from millicent.ledger.locks import is_live
from millicent.ledger.prompts import AskedPage, asked
from millicent.ledger.reading import read_receipts, select, wall_covering
from millicent.ledger.rollups import ACTUAL, book_sql, sums_sql
from millicent.ledger.rows import receipt_of
from millicent.ledger.samples import sample_rows
from millicent.ledger.schema import refuse_other_version, unavailable
from millicent.ledger.spans import DAY_S, HOUR_S, MONTH_S, QUARTER_S, WIDE_S
from millicent.ledger.tallies import Kind as Kept
from millicent.ledger.verification import problems
from millicent.ledger.worth import (
    ROLE_COSTS,
    USEFULNESS,
    in_time,
    role_costs_of,
    usefulness_of,
    verdicts,
)
from millicent.ledger.worth import RoleCosts as RoleCosts  # noqa: PLC0414 - rooms that may import only this module
from millicent.ledger.worth import Usefulness as Usefulness  # noqa: PLC0414 - name what it answers with
from millicent.ledger.zones import labels

T = TypeVar("T")
GroupBy = Literal[
    "feature",
    "user",
    "team",
    "model",
    "key",
    "tier",
    "placement",
    "conversation",
    "run",
    "month",
    "day",
    "hour",
    "status",
]
_TIMES = frozenset({"month", "day", "hour"})

# As a status in a filter: not settled yet.
RUNNING = "running"


class ReceiptFilter(msgspec.Struct, frozen=True, kw_only=True):
    """Only receipts that match every field that is set. Times are UTC nanoseconds of creation, `to_ns` exclusive.

    An empty string selects receipts without a value: the unattributed ones. Status `running` selects those still open.
    """

    key: str | None = None
    team: str | None = None
    user: str | None = None
    feature: str | None = None
    tier: str | None = None
    conversation: str | None = None
    run: str | None = None
    model: str | None = None
    placement: str | None = None
    status: str | None = None
    from_ns: int | None = None
    to_ns: int | None = None


class ReceiptPage(msgspec.Struct, frozen=True):
    """Newest first. `next` is the `after` of the following page, None on the last."""

    receipts: tuple[Receipt, ...]
    next: str | None


class Totals(msgspec.Struct, frozen=True):
    """One group's sum. `group` is None for what is unattributed. Token counts leave out what is unknown;
    `unknown_usage` says on how many receipts. `unpriced` counts receipts that may have cost something nobody can price:
    they aren't in `cost`. `assumed` counts receipts whose total rests on an assumption. Only closed ones count."""

    group: str | None
    requests: int
    input_tokens: int
    output_tokens: int
    serving_ns: int
    cost: Money
    unpriced: int
    assumed: int
    unknown_usage: int

    @property
    def known_cost(self) -> Money | None:
        """None where not one of them is priced."""
        return None if self.requests and self.unpriced == self.requests else self.cost

    @classmethod
    def together(cls, groups: Sequence[Totals], name: str | None = None) -> Totals:
        """The sum of groups that share no receipt, under a name of its own."""
        return cls(
            group=name,
            requests=sum(group.requests for group in groups),
            input_tokens=sum(group.input_tokens for group in groups),
            output_tokens=sum(group.output_tokens for group in groups),
            serving_ns=sum(group.serving_ns for group in groups),
            cost=Money.total(group.cost for group in groups),
            unpriced=sum(group.unpriced for group in groups),
            assumed=sum(group.assumed for group in groups),
            unknown_usage=sum(group.unknown_usage for group in groups),
        )


class Sample(msgspec.Struct, frozen=True):
    """One closed receipt. Tokens are None where unknown; `met` is None where it had no latency target."""

    created_at_ns: int
    feature: str | None
    key: str | None
    user: str | None
    model: str
    failed: bool
    total_ns: int | None
    input_tokens: int | None
    output_tokens: int | None
    cached_tokens: int | None
    met: bool | None


# The fields of Totals, as sums of closed receipts.
_TOTALS = (
    "requests",
    "input_tokens",
    "output_tokens",
    "serving_ns",
    "cost_nanousd",
    "unpriced",
    "assumed",
    "unknown_usage",
)

_ACCOUNTS = """
    SELECT s.device, s.placement, s.accelerators, s.usd_per_hour, s.rate_provenance, h.*
    FROM device_hours AS h JOIN device_sessions AS s ON s.id = h.session
    WHERE h.hour_ns > ? AND h.hour_ns < ?
"""


class LedgerQueries:
    """Opened on the ledger's path; never writes, never waits for the writer. Each answer is of one instant.

    A ledger that doesn't exist yet answers as an empty one. Raises LedgerUnavailable when it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def receipt(self, receipt_id: str) -> Receipt | None:
        found = self.receipts_of([receipt_id])
        return found[0] if found else None

    def receipts_of(self, receipt_ids: Sequence[str]) -> list[Receipt]:
        """Those that exist, in the order asked for."""
        with self._snapshot() as connection:
            return [] if connection is None else _judged(connection, receipt_ids)

    def receipts(self, where: ReceiptFilter, *, limit: int = 50, after: str | None = None) -> ReceiptPage:
        """Raises InvalidRequest when `after` is no receipt."""
        if limit < 1:
            raise InvalidRequest(f"limit must be at least 1; got {limit}", param="limit")
        with self._snapshot() as connection:
            if connection is None:
                return ReceiptPage((), None)
            condition, values = _condition(where)
            from_ns, to_ns = _bounds(where)
            if after is not None:
                place = _place_of(connection, after)
                condition += " AND (created_at_ns, id) < (?, ?)"
                values, to_ns = [*values, *place], min(to_ns, place[0] + 1)
            found = newest(connection, _fixed(where), condition, values, from_ns, to_ns, limit + 1)
            ids = [receipt_id for _, receipt_id in found]
            page = _judged(connection, ids[:limit])
        return ReceiptPage(tuple(page), ids[limit - 1] if len(ids) > limit else None)

    def asked(self, where: ReceiptFilter, *, limit: int = 10_000, after: str | None = None) -> AskedPage:
        """Closed receipts, oldest first, with what was asked as hashes and lengths: what a replay needs. Raises
        InvalidRequest when `after` is no receipt."""
        with self._snapshot() as connection:
            if connection is None:
                return AskedPage((), None)
            condition, values = _condition(where)
            if after is not None:
                condition += " AND (created_at_ns, id) > (?, ?)"
                values = [*values, *_place_of(connection, after)]
            return asked(connection, condition, values, limit)

    def recent(self, limit: int) -> list[Receipt]:
        """The newest that the model which was asked for answered at once, oldest first, without their lines and
        attempts. What the response cache answered is not among them."""
        sql = (
            "SELECT * FROM receipts WHERE status = 'succeeded'"
            " AND NOT EXISTS (SELECT 1 FROM attempts WHERE receipt = receipts.id AND role != 'inference')"
            " AND backend IS NOT 'response_cache' ORDER BY created_at_ns DESC, id DESC LIMIT ?"
        )
        with self._snapshot() as connection:
            found = [] if connection is None else select(connection, sql, (limit,))
        return [receipt_of(row) for row in reversed(found)]

    def answers(self, where: ReceiptFilter, limit: int) -> list[Answer]:
        """The newest that the model which was asked for gave at once, oldest first: what they used, and how long they
        took."""
        with self._snapshot() as connection:
            return [] if connection is None else newest_answers(connection, *_condition(where), limit)

    def totals(self, by: GroupBy, where: ReceiptFilter, book: str = ACTUAL, *, zone: str = "UTC") -> list[Totals]:
        """Dearest first; months, days and hours in order, as the clocks of `zone` (an IANA name) show them.

        In another book, receipts that aren't in it count as unpriced, and those whose detail was deleted aren't there.
        Raises InvalidRequest for a zone that nobody knows.
        """
        groups = [_totals(group, figures) for group, figures in self._sums(by, where, _TOTALS, zone, book)]
        if by in _TIMES:
            return groups
        return sorted(groups, key=lambda each: (-each.cost.nanousd, each.group is not None, each.group or ""))

    def usefulness(self, by: GroupBy, where: ReceiptFilter, *, zone: str = "UTC") -> list[Usefulness]:
        """In order of the groups. Receipts whose detail was deleted before ratings were summed up count as unrated."""
        return [usefulness_of(group, figures) for group, figures in self._sums(by, where, USEFULNESS, zone)]

    def role_costs(self, by: GroupBy, where: ReceiptFilter, *, zone: str = "UTC") -> list[RoleCosts]:
        """In order of the groups; those without a line are left out."""
        found = [role_costs_of(group, figures) for group, figures in self._sums(by, where, ROLE_COSTS, zone)]
        return [costs for costs in found if costs is not None]

    def _sums(
        self, by: GroupBy, where: ReceiptFilter, measures: Sequence[str], zone: str, book: str = ACTUAL
    ) -> list[tuple[str | None, list[int]]]:
        """The measures' sums of each group, in order of the groups, None for none."""
        label_of = labels(by, zone) if by in {"month", "day", "hour"} else None
        fixed = _fixed(where)
        with self._snapshot() as connection:
            if connection is None or fixed.get("status") == RUNNING:
                return []
            from_ns, to_ns = _bounds(where)
            grouped = None if label_of else by
            if book == ACTUAL:
                coarsest_s = MONTH_S if grouped else DAY_S if by != "hour" and zone == "UTC" else QUARTER_S
                sql, values = sums_sql(connection, grouped, fixed, from_ns, to_ns, measures, coarsest_s=coarsest_s)
            else:
                condition, values = _condition(where)
                sql, values = book_sql(grouped, condition), [book, *values]
            found = sorted(connection.execute(sql, values).fetchall())
        if label_of is None:
            return [(group or None, figures) for group, *figures in found]
        sums: dict[str | None, list[int]] = {}
        for label, spans in groupby(found, key=lambda span: label_of(span[0])):
            _, *figures = map(sum, zip(*spans, strict=True))
            # A day comes twice where clocks are set back to the day before.
            sums[label] = [*map(sum, zip(figures, sums.get(label, [0] * len(figures)), strict=True))]
        return [(label, figures) for label, figures in sums.items() if figures[0]]

    def tallies(
        self, by: Sequence[GroupBy], where: ReceiptFilter, *, zone: str = "UTC", requests: int = 0
    ) -> dict[tuple[str | None, ...], Tally] | None:
        """What requests took, by several things at once; a month, day or hour comes last. Features and models are
        answered from what is kept for it; anything else is read from receipts, and is None where that would be more
        than `tallies.MOST_DETAIL`: at once where the number of `requests` is known."""
        return self._tallied(Tally, by, where, zone, requests)

    def sums(self, by: Sequence[GroupBy], where: ReceiptFilter) -> dict[tuple[str | None, ...], Sums] | None:
        """The same without histograms, which are most of the work."""
        return self._tallied(Sums, by, where, "UTC", 0)

    def _tallied(
        self, kind: type[Kept], by: Sequence[GroupBy], where: ReceiptFilter, zone: str, requests: int
    ) -> dict[tuple[str | None, ...], Kept] | None:
        time = next((name for name in by if name in _TIMES), None)
        label_of = None if time is None else labels(time, zone)  # type: ignore[arg-type]
        coarse_s, fine_s = (HOUR_S, QUARTER_S) if time == "hour" else (DAY_S, HOUR_S)
        coarsest_s = WIDE_S if time is None else coarse_s if zone == "UTC" else fine_s
        columns = [name for name in by if name not in _TIMES]
        with self._snapshot() as connection:
            if connection is None:
                return {}
            asked = (_fixed(where), *_bounds(where), label_of, coarsest_s, requests)
            found = tallies.read(kind, connection, columns, *asked)
        if found is None:
            return None
        return {tuple(member or None for member in key): tally for key, tally in found.items() if tally.requests}

    def requests_by_hour(self, where: ReceiptFilter) -> dict[int, int]:
        """Closed requests of each UTC hour, by its start in nanoseconds; hours without any aren't there."""
        fixed = _fixed(where)
        with self._snapshot() as connection:
            if connection is None or fixed.get("status") == RUNNING:
                return {}
            sql, values = sums_sql(connection, None, fixed, *_bounds(where), ["requests"], coarsest_s=QUARTER_S)
            hourly = (
                f"SELECT member - member % {NS_PER_HOUR} AS hour_ns, sum(requests) AS requests FROM ({sql})"  # noqa: S608 - our own text
                " GROUP BY hour_ns HAVING requests != 0 ORDER BY hour_ns"
            )
            return dict(connection.execute(hourly, values).fetchall())

    def first_days_ns(self) -> dict[str | None, int]:
        """When the first day (UTC) began on which each feature was asked for, None for none. Receipts of an older
        version that are still being taken in aren't seen."""
        found = self.ask(tallies.first_days_ns) or {}
        return {feature or None: at_ns for feature, at_ns in found.items()}

    def newest_fits(self, device: str) -> list[StepTimeFit]:
        """The newest of each model on this device."""
        return self.ask(lambda connection: latest_fits(connection, device)) or []

    def entries(
        self, kind: Kind | None, from_ns: int, to_ns: int, limit: int = -1, after: str | None = None
    ) -> list[Entry]:
        """Revenue, outside costs or, without a kind, both, of times that overlap [from_ns, to_ns), in their order."""
        times = (_storable(from_ns), _storable(to_ns))
        return self.ask(lambda connection: read_entries(connection, kind, *times, limit, after)) or []

    def latest_tiers(self, users: Sequence[str], to_ns: int) -> dict[str, str | None]:
        """The tier of each user's latest request created before this; None where it had none."""
        return self.ask(lambda connection: latest_tiers(connection, users, _storable(to_ns))) or {}

    def in_time(self, features: Sequence[str], where: ReceiptFilter) -> dict[str, tuple[int, int]]:
        """Of each of these features' answers: how many had a latency target, and how many met it."""
        with self._snapshot() as connection:
            return {} if connection is None else in_time(connection, features, *_condition(where))

    def coverage(self, where: ReceiptFilter) -> list[Coverage]:
        """How much each routing policy was asked for, and what it did. Of receipts whose detail is kept."""
        sums = self.sums((), where)
        if sums is not None and not any(each.routed for each in sums.values()):
            return []  # where nobody routes, not every receipt need be read
        with self._snapshot() as connection:
            return [] if connection is None else coverage(connection, *_condition(where))

    def cache_use(self, where: ReceiptFilter) -> list[CacheUse]:
        """What the response cache gave, of what it was asked for. Of receipts whose detail is kept."""
        with self._snapshot() as connection:
            return [] if connection is None else cache_use(connection, *_condition(where))

    def drawn(self, lever: Held, where: ReceiptFilter) -> list[Drawn]:
        """Those with the lever and those held out from it, by what was drawn together. Of receipts whose detail is
        kept."""
        with self._snapshot() as connection:
            return [] if connection is None else drawn(connection, lever, *_condition(where))

    def waste(self, where: ReceiptFilter, *, most: int = waste.MOST_READ) -> waste.WasteReport:
        """What was paid for that nobody had any use of, or that could have cost less. Reads the latest `most` of the
        receipts asked for one by one."""
        with self._snapshot() as connection:
            if connection is None:
                return waste.WasteReport()
            condition, values = _condition(where)
            reads = waste.latest(connection, condition, values, most)
            if not reads:
                return waste.WasteReport()
            first = f"SELECT created_at_ns FROM receipts WHERE {condition} ORDER BY created_at_ns LIMIT 1"  # noqa: S608 - our own text
            (from_ns,) = connection.execute(first, values).fetchone()

        def inputs(start_ns: int, end_ns: int) -> dict[str | None, tuple[int, int]]:
            part = msgspec.structs.replace(where, from_ns=start_ns, to_ns=end_ns)
            found = self.totals("feature", part)
            return {each.group: (each.requests - each.unknown_usage, each.input_tokens) for each in found}

        of = sum(each.requests for each in self.totals("status", where))
        return waste.report(reads, of, waste.growth(inputs, from_ns, reads[-1].at_ns + 1))

    def samples(self, where: ReceiptFilter, *, most: int) -> list[Sample]:
        """Single receipts, oldest first: all, or where there are more than `most` every so-manyth."""
        requests = sum(each.requests for each in self.totals("status", where))
        with self._snapshot() as connection:
            found = [] if connection is None else sample_rows(connection, *_condition(where), requests, most)
            return [Sample(*row) for row in found]

    def budgets(self, at_ns: int) -> list[tuple[Budget, list[Balance]]]:
        """Every budget, with where its subjects stand in the period of `at_ns`."""
        with self._snapshot() as connection:
            found = [] if connection is None else read_budgets(connection)
            return [(budget, read_balances(connection, budget, at_ns)) for budget in found if connection is not None]

    def first_created_ns(self) -> int | None:
        """When the oldest receipt whose detail is kept was created."""
        with self._snapshot() as connection:
            found = None if connection is None else connection.execute("SELECT min(created_at_ns) FROM receipts")
            return None if found is None else found.fetchone()[0]

    def books(self) -> list[str]:
        """Their names; the one that stands is `actual`. Reads every line."""
        with self._snapshot() as connection:
            found = [] if connection is None else connection.execute("SELECT DISTINCT book FROM lines").fetchall()
        return sorted({"actual", *(book for (book,) in found)})

    def accounts(self, from_ns: int, to_ns: int) -> list[Account]:
        """Hours that overlap [from_ns, to_ns), oldest first, as of the last checkpoint; ask the writer for one first
        where the running second matters. Where a device's accelerators or rate changed, each has its own account."""
        with self._snapshot() as connection:
            if connection is None:
                return []
            found = select(connection, _ACCOUNTS, (_storable(from_ns - NS_PER_HOUR), _storable(to_ns)))
        sums: dict[_Account, list[int]] = {}
        for row in found:
            hour = HourTime(row["hour_ns"], row["wall_ns"], row["overhead_ns"], row["lost_ns"], row["down_ns"])
            account = _Account(
                row["hour_ns"],
                row["device"],
                row["placement"],
                row["accelerators"],
                row["usd_per_hour"] or "",
                row["rate_provenance"],
            )
            wall_ns = wall_covering(hour, row["serving_ns"], row["accelerators"])
            parts = (wall_ns, row["serving_ns"], hour.overhead_ns, hour.lost_ns, hour.down_ns)
            sums[account] = [total + part for total, part in zip(sums.get(account, [0] * 5), parts, strict=True)]
        return [account.of(*sums[account]) for account in sorted(sums)]

    def fits_named(self, versions: Sequence[str]) -> list[StepTimeFit]:
        """The versions of the step-time model that receipts name, in no order."""
        with self._snapshot() as connection:
            return [] if connection is None else fits_of(connection, versions)

    def count_open(self) -> int:
        """Receipts that are running, or that wait for recovery."""
        with self._snapshot() as connection:
            if connection is None:
                return 0
            (count,) = connection.execute("SELECT count(*) FROM receipts WHERE status IS NULL").fetchone()
        return int(count)

    def ask(self, question: Callable[[sqlite3.Connection], T]) -> T | None:
        """One question of a room that keeps tables of its own here; None where there is no ledger yet."""
        with self._snapshot() as connection:
            return None if connection is None else question(connection)

    def verify(self) -> list[str]:
        """What is wrong with the ledger, one line each; empty when all is well. Reads everything: takes a while."""
        with self._snapshot() as connection:
            if connection is None:
                return []
            # It works in temporary tables; the file itself is open for reading only.
            connection.execute("PRAGMA query_only = OFF")
            return problems(connection, self._is_live)

    def _is_live(self, gateway: str) -> bool:
        return is_live(self._path.parent, gateway)

    @contextmanager
    def _snapshot(self) -> Iterator[sqlite3.Connection | None]:
        """A read-only transaction, or None where there is no ledger yet. A connection costs some 0.2 ms, and one
        per question is safe from any thread and never outlives the file it was opened on."""
        if not self._path.exists():
            yield None
            return
        try:
            uri = f"file:{quote(str(self._path.absolute()))}?mode=ro"
            with closing(sqlite3.connect(uri, uri=True, isolation_level=None)) as connection:
                connection.execute("PRAGMA query_only = ON")
                connection.execute("BEGIN")
                (tables,) = connection.execute("SELECT count(*) FROM sqlite_schema WHERE name = 'receipts'").fetchone()
                if tables:
                    refuse_other_version(connection)
                yield connection if tables else None
        except sqlite3.Error as error:
            raise unavailable(self._path, error) from error


@dataclass(frozen=True, slots=True, order=True)
class _Account:
    """What sessions must have in common to be one account."""

    hour_ns: int
    device: str
    placement: str
    accelerators: int
    usd_per_hour: str
    rate_provenance: str

    def of(self, wall_ns: int, serving_ns: int, overhead_ns: int, lost_ns: int, down_ns: int) -> Account:
        accelerator_ns = wall_ns * self.accelerators
        rate = Decimal(self.usd_per_hour) if self.usd_per_hour else None
        return Account(
            device=self.device,
            placement=self.placement,
            hour_ns=self.hour_ns,
            accelerators=self.accelerators,
            wall_ns=wall_ns,
            serving_ns=serving_ns,
            overhead_ns=overhead_ns,
            lost_ns=lost_ns,
            idle_ns=accelerator_ns - serving_ns - overhead_ns - lost_ns - down_ns,
            down_ns=down_ns,
            usd_per_hour=rate,
            rate_provenance=Provenance(self.rate_provenance),
            cost=None if rate is None else Money.of_time(accelerator_ns, rate),
        )


def _place_of(connection: sqlite3.Connection, after: str) -> tuple[int, str]:
    """Where the page after this receipt begins."""
    last = connection.execute("SELECT created_at_ns, id FROM receipts WHERE id = ?", (after,)).fetchone()
    if last is None:
        raise InvalidRequest(f"after: no receipt {after}; pass the `next` of a page", param="after")
    return last[0], last[1]


def _judged(connection: sqlite3.Connection, receipt_ids: Sequence[str]) -> list[Receipt]:
    """With `useful` as it stands now: feedback that came later counts."""
    found = read_receipts(connection, receipt_ids)
    useful = verdicts(connection, receipt_ids)
    return [msgspec.structs.replace(receipt, useful=useful[receipt.id]) for receipt in found]


def _fixed(where: ReceiptFilter) -> dict[str, str]:
    """The columns that must have a value, '' for none."""
    return {
        name: str(value)
        for name, value in msgspec.structs.asdict(where).items()
        if value is not None and name not in {"from_ns", "to_ns"}
    }


def _condition(where: ReceiptFilter) -> tuple[str, list[object]]:
    """SQL that holds for the receipts asked for, and its parameters."""
    parts, values = ["1"], []
    for name, value in msgspec.structs.asdict(where).items():
        if value is None:
            continue
        if name == "status" and value == RUNNING:
            parts.append("status IS NULL")
        elif value == "":
            parts.append(f"({name} IS NULL OR {name} = '')")
        else:
            parts.append({"from_ns": "created_at_ns >= ?", "to_ns": "created_at_ns < ?"}.get(name, f"{name} = ?"))
            values.append(_storable(value) if isinstance(value, int) else value)
    return " AND ".join(parts), values


def _bounds(where: ReceiptFilter) -> tuple[int, int]:
    """All of time where it has no times of its own."""
    return (
        _storable(-(2**63) if where.from_ns is None else where.from_ns),
        _storable(2**63 - 1 if where.to_ns is None else where.to_ns),
    )


def _totals(group: str | None, figures: Sequence[int]) -> Totals:
    requests, input_tokens, output_tokens, serving_ns, nanousd, unpriced, assumed, unknown_usage = figures
    return Totals(
        group=group,
        requests=requests,
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        serving_ns=serving_ns,
        cost=Money(nanousd),
        unpriced=unpriced,
        assumed=assumed,
        unknown_usage=unknown_usage,
    )


def _storable(ns: int) -> int:
    """The nearest time that SQLite can hold: the year 9999 is beyond it."""
    return max(-(2**63), min(ns, 2**63 - 1))
