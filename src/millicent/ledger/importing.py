"""Usage from elsewhere as receipts: a provider's export, LiteLLM's spend logs, or any table whose columns are named.

An imported receipt has backend `import` and provenance `reported`. Its identifier is made of what the row says, so
that importing a row again adds nothing.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from decimal import Decimal, InvalidOperation
from typing import Any

import msgspec

from millicent.core.clock import NS_PER_S, parse_time_ns
from millicent.core.errors import ConfigError
from millicent.core.money import Money
from millicent.core.receipts import METERS, Line, Meter, PriceSource, Receipt, Role, Status
from millicent.core.request import Attribution
from millicent.core.spreadsheets import original
from millicent.core.usage import Count, Leaf, Provenance, Usage
from millicent.ledger.store import close_receipt

BACKEND = "import"
# What one row may say at most: 10^9 dollars, 10^12 tokens; and the last time that can be kept.
_MOST_USD = Decimal(10**9)
_MOST_TOKENS = 10**12
_LAST_NS = 2**63 - 1
# Fields that hold an input leaf's tokens, besides the fresh ones.
_CACHE = {
    "cached": Leaf.INPUT_CACHE_READ,
    "cache_write_5m": Leaf.INPUT_CACHE_WRITE_5M,
    "cache_write_1h": Leaf.INPUT_CACHE_WRITE_1H,
}


class Format(msgspec.Struct, frozen=True):
    """`columns` maps a field to the column that has it; `marks` are columns that only this format has.

    `input_has_cached` says that the input column counts cached tokens too. Only rows with `only`'s value in its column
    are usage. `zero_is_unknown`: it writes 0 for what it has no price for, too.
    """

    name: str
    columns: dict[str, str]
    marks: frozenset[str]
    input_has_cached: bool = True
    only: tuple[str, str] | None = None
    zero_is_unknown: bool = False


FORMATS = (
    Format(
        "openai",
        {
            "time": "start_time",
            "end": "end_time",
            "model": "model",
            "input": "input_tokens",
            "cached": "input_cached_tokens",
            "output": "output_tokens",
            "requests": "num_model_requests",
            "user": "user_id",
            "team": "project_id",
            "key": "api_key_id",
            "tier": "service_tier",
        },
        frozenset({"num_model_requests", "input_tokens"}),
    ),
    Format(
        "anthropic",
        {
            "time": "usage_date_utc",
            "model": "model_version",
            "input": "usage_input_tokens_no_cache",
            "cached": "usage_input_tokens_cache_read",
            "cache_write_5m": "usage_input_tokens_cache_write_5m",
            "cache_write_1h": "usage_input_tokens_cache_write_1h",
            "output": "usage_output_tokens",
            "team": "workspace",
            "key": "api_key",
            "tier": "usage_type",
        },
        frozenset({"usage_date_utc", "usage_input_tokens_no_cache"}),
        input_has_cached=False,
    ),
    Format(  # its Admin API's usage report
        "anthropic",
        {
            "time": "starting_at",
            "end": "ending_at",
            "model": "model",
            "input": "uncached_input_tokens",
            "cached": "cache_read_input_tokens",
            "cache_write_5m": "cache_creation.ephemeral_5m_input_tokens",
            "cache_write_1h": "cache_creation.ephemeral_1h_input_tokens",
            "output": "output_tokens",
            "team": "workspace_id",
            "key": "api_key_id",
            "tier": "service_tier",
        },
        frozenset({"starting_at", "uncached_input_tokens"}),
        input_has_cached=False,
    ),
    Format(
        "litellm",
        {
            "time": "startTime",
            "end": "endTime",
            "id": "request_id",
            "model": "model",
            "input": "prompt_tokens",
            "output": "completion_tokens",
            "cost": "spend",
            "user": "end_user",
            "team": "team_id",
            "key": "api_key",
            "status": "status",
        },
        frozenset({"request_id", "spend", "startTime"}),
        zero_is_unknown=True,
    ),
    Format(  # observations as its API and its pages give them
        "langfuse",
        {
            "time": "startTime",
            "end": "endTime",
            "id": "id",
            "model": "model",
            "input": "usageDetails.input",
            "cached": "usageDetails.input_cached_tokens",
            "output": "usageDetails.output",
            "cost": "costDetails.total",
            "user": "userId",
        },
        frozenset({"traceId", "startTime", "type"}),
        input_has_cached=False,
        only=("type", "GENERATION"),
        zero_is_unknown=True,
    ),
    Format(  # observations as it writes them to blob storage
        "langfuse",
        {
            "time": "start_time",
            "end": "end_time",
            "id": "id",
            "model": "provided_model_name",
            "input": "usage_details.input",
            "cached": "usage_details.input_cached_tokens",
            "output": "usage_details.output",
            "cost": "total_cost",
            "user": "user_id",
        },
        frozenset({"trace_id", "start_time", "type"}),
        input_has_cached=False,
        only=("type", "GENERATION"),
        zero_is_unknown=True,
    ),
)
# Cells that are objects themselves, whose members become columns: `amount.value`.
_NESTED = ("amount", "cache_creation", "usage_details", "cost_details", "usageDetails", "costDetails")
_BUCKET_TIMES = ("start_time", "end_time", "starting_at", "ending_at")


def read_table(text: str) -> list[dict[str, str]]:
    """The rows of a CSV with a header, of a JSON list or JSON lines, or of a page of OpenAI's or Anthropic's usage."""
    start = text.lstrip("\ufeff \t\r\n")
    if not start.startswith(("[", "{")):
        rows = [_opened(row) for row in csv.DictReader(io.StringIO(start))]
        if long := next((number for number, row in enumerate(rows, start=1) if None in row), None):
            raise ConfigError(f"row {long} has more cells than the header: quote cells that hold a comma.")
        return rows
    try:
        body = json.loads(start, parse_float=Decimal)
    except json.JSONDecodeError:
        try:
            body = [json.loads(line, parse_float=Decimal) for line in start.splitlines() if line.strip()]
        except json.JSONDecodeError as error:
            raise ConfigError(f"the file is neither CSV nor JSON (line {error.lineno}: {error.msg}).") from None
    found = body.get("data", [body]) if isinstance(body, dict) else body
    return [row for each in found for row in _flat(each)]


def parse_amount(text: str) -> Decimal | None:
    """Dollars as people and exports write them; None for anything else."""
    try:
        value = Decimal(text.strip().replace(",", "").replace("$", ""))
    except InvalidOperation:
        return None
    return value if value.is_finite() else None


def parse_moment_ns(text: str) -> int:
    """UTC nanoseconds of a date, a time, or seconds since 1970; from then on until 2262. Raises ValueError."""
    if text.replace(".", "", 1).isdecimal():
        at_ns = int(Decimal(text) * NS_PER_S)
    else:
        at_ns = parse_time_ns(text.removesuffix(" UTC").replace("Z", "+00:00"))
    if not 0 <= at_ns <= _LAST_NS:
        raise ValueError(f"{text} is before 1970 or after 2262")
    return at_ns


def _opened(row: Mapping[str, Any]) -> dict[str, str]:
    """A row of a CSV with the members of those of its cells that hold an object."""
    cells = {name: original(cell) if isinstance(cell, str) else cell for name, cell in row.items()}
    for name in _NESTED:
        cell = cells.get(name)
        if isinstance(cell, str) and cell.lstrip().startswith("{"):
            try:
                cells |= _members(name, json.loads(cell, parse_float=Decimal))
            except json.JSONDecodeError:
                continue
    return cells


def _members(name: str, entry: dict[str, Any]) -> dict[str, str]:
    return {f"{name}.{member}": str(value) for member, value in entry.items() if value is not None}


def _flat(entry: Any) -> Iterator[dict[str, str]]:
    """A bucket of a usage API has its results inside; the bucket's times are theirs."""
    if not isinstance(entry, dict):
        raise ConfigError("the file's JSON is no list of objects: export the rows, not a summary.")
    inner = entry.get("results")
    times = {name: entry[name] for name in _BUCKET_TIMES if name in entry}
    if times and isinstance(inner, list):
        for result in inner:
            yield from _flat(times | result)
        return
    flat: dict[str, str] = {}
    for name, value in entry.items():
        if isinstance(value, dict) and name in _NESTED:
            flat |= _members(name, value)
        elif value is not None:
            flat[name] = value if isinstance(value, str) else str(value)
    yield flat


def detect(rows: list[dict[str, str]]) -> Format | None:
    columns = set().union(*rows[:100]) if rows else set()
    return next((each for each in FORMATS if each.marks <= columns), None)


def receipts_of(rows: Iterable[Mapping[str, str]], form: Format, placement: str) -> Iterator[Receipt]:
    """One closed receipt for each row of usage. Raises ConfigError naming the row and the column."""
    seen: Counter[str] = Counter()
    for number, row in enumerate(rows, start=1):
        if form.only is not None and row.get(form.only[0]) != form.only[1]:
            continue
        yield _receipt(_Row(number, row, form), placement, seen)


def insert_new(connection: sqlite3.Connection, receipts: Iterable[Receipt]) -> int:
    """Write those that aren't there yet; how many those were."""
    added = 0
    for receipt in receipts:
        if connection.execute("SELECT 1 FROM receipts WHERE id = ?", (receipt.id,)).fetchone() is None:
            close_receipt(connection, receipt, (), BACKEND)
            added += 1
    return added


class _Row:
    """A row's cells by field. Absent and empty are None."""

    def __init__(self, number: int, cells: Mapping[str, str], form: Format) -> None:
        self.number = number
        self.cells = cells
        self.form = form

    def text(self, field: str) -> str | None:
        column = self.form.columns.get(field)
        value = self.cells.get(column) if column else None
        text = value.strip() if value else ""
        if not text.isprintable():
            raise ConfigError(f"row {self.number}, column {column}: {text!r} holds control characters.")
        return text or None

    def count(self, field: str) -> int | None:
        value = self.decimal(field)
        if value is not None and (not 0 <= value <= _MOST_TOKENS or value != value.to_integral_value()):
            raise self.error(field, "is no count of tokens")
        return None if value is None else int(value)

    def decimal(self, field: str) -> Decimal | None:
        text = self.text(field)
        if text is None:
            return None
        value = parse_amount(text)
        if value is None:
            raise self.error(field, "is no number")
        return value

    def time_ns(self, field: str) -> int | None:
        text = self.text(field)
        if text is None:
            return None
        try:
            return parse_moment_ns(text)
        except ValueError:
            raise self.error(field, "is no time: write 2026-01-31, 2026-01-31T09:00Z or seconds since 1970") from None

    def error(self, field: str, what: str) -> ConfigError:
        column = self.form.columns.get(field)
        return ConfigError(f"row {self.number}, column {column}: {self.text(field)!r} {what}.")


def _receipt(row: _Row, placement: str, seen: Counter[str]) -> Receipt:
    model, created_ns = row.text("model"), row.time_ns("time")
    if created_ns is None or model is None:
        missing = "time" if created_ns is None else "model"
        column = row.form.columns.get(missing)
        where = f"column {column} is empty" if column else "no column is given"
        raise ConfigError(f"row {row.number} has no {missing}: {where}; name the column with --{missing}.")
    usage = _usage(row)
    cost = row.decimal("cost")
    if cost is not None and abs(cost) > _MOST_USD:
        raise row.error("cost", "is more than a row can cost")
    if cost == 0 and row.form.zero_is_unknown and (row.cells.get("cache_hit") or "").lower() != "true":
        cost = None if usage.input_tokens or usage.output_tokens else cost
    lines = _lines(usage, cost, created_ns)
    settled_ns = max(row.time_ns("end") or created_ns, created_ns)
    failed = (row.text("status") or "").lower() in {"failure", "failed", "error"}
    requests = row.text("requests")
    attribution = Attribution(
        **{name: row.text(name) for name in ("user", "team", "key", "feature", "tier")},
        tags={} if requests is None else {"requests": requests},
    )
    return Receipt(
        id=_identifier(row, placement, seen),
        created_at_ns=created_ns,
        settled_at_ns=settled_ns,
        status=Status.FAILED if failed else Status.SUCCEEDED,
        model=model,
        served_model=model,
        placement=placement,
        backend=BACKEND,
        dialect=f"import.{row.form.name}",
        stream=False,
        attribution=attribution,
        usage=usage,
        lines=lines,
        prices=PriceSource("none" if cost is None else f"import.{row.form.name}"),
    )


def _identifier(row: _Row, placement: str, seen: Counter[str]) -> str:
    """Made of the row's own identifier, or of all its cells; equal rows of one file are told apart by their count."""
    own = row.text("id")
    said = own or json.dumps(dict(sorted((name, value) for name, value in row.cells.items() if value)))
    key = f"{row.form.name}\n{placement}\n{said}"
    if own is None:
        seen[key] += 1
        key += f"\n{seen[key]}"
    return f"rcpt_{hashlib.sha256(key.encode()).hexdigest()[:26]}"


def _usage(row: _Row) -> Usage:
    leaves = {leaf: row.count(field) for field, leaf in _CACHE.items()}
    fresh = row.count("input")
    if fresh is not None and row.form.input_has_cached:
        fresh -= sum(count for count in leaves.values() if count)
        if fresh < 0:
            raise row.error("input", "is less than the cached tokens in it")
    leaves |= {Leaf.INPUT_FRESH: fresh, Leaf.OUTPUT_TEXT: row.count("output")}
    known = {leaf: Count(count, Provenance.REPORTED) for leaf, count in leaves.items() if count is not None}
    # An export without tokens says nothing about them: unknown, which isn't none.
    return Usage(known or {Leaf.INPUT_FRESH: Count(None, Provenance.UNKNOWN)})


def _lines(usage: Usage, cost: Decimal | None, at_ns: int) -> tuple[Line, ...]:
    """What the export says it cost, as one line; without that, its tokens, unpriced."""
    if cost is not None:
        return (_line(Meter.OTHER, Decimal(1), "request", cost, at_ns),)
    counted = [(leaf, count.tokens) for leaf, count in usage.leaves.items() if count.tokens]
    return tuple(_line(METERS[leaf], Decimal(tokens), "token", None, at_ns) for leaf, tokens in counted)


def _line(meter: Meter, quantity: Decimal, unit: str, cost: Decimal | None, at_ns: int) -> Line:
    return Line(
        attempt=1,
        role=Role.INFERENCE,
        meter=meter,
        quantity=quantity,
        unit=unit,
        unit_price_usd=cost,
        amount=None if cost is None else Money.from_usd(cost),
        provenance=Provenance.UNKNOWN if cost is None else Provenance.REPORTED,
        incurred_at_ns=at_ns,
        posted_at_ns=at_ns,
    )
