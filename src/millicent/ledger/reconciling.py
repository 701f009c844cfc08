"""An invoice beside the ledger: which of its lines the receipts explain, and what is left over."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import msgspec

from millicent.core.clock import iso_utc
from millicent.core.errors import ConfigError
from millicent.core.money import Money
from millicent.ledger.importing import parse_amount, parse_moment_ns
from millicent.ledger.queries import LedgerQueries, ReceiptFilter
from millicent.ledger.spans import DAY_NS

_MODEL_COLUMNS = ("model", "model_version", "line_item", "description", "item", "product", "sku", "skumeter")
_AMOUNT_COLUMNS = (
    "amount",
    "amount_usd",
    "amount_value",
    "amount.value",
    "cost",
    "cost_usd",
    "spend",
    "total",
    "billedcost",
    "price",
)
_TIME_COLUMNS = (
    "date",
    "usage_date_utc",
    "start_time",
    "start_time_iso",
    "starting_at",
    "day",
    "time",
    "chargeperiodstart",
)


_CURRENCY_COLUMNS = ("currency", "amount_currency", "amount.currency", "billingcurrency")
# Anthropic's cost report, whose amounts are cents.
_IN_CENTS = frozenset({"starting_at", "ending_at", "amount", "currency"})
# What follows a model's name on an invoice: `gpt-4o, input`, `Claude Sonnet 4 Usage - Output Tokens`.
_KIND_OF_TOKENS = re.compile(
    r"[\s,:-]+(cached |cache (read|write)s? ?)?(input|output|cached|batch|usage)\b.*$", re.IGNORECASE
)


class Item(msgspec.Struct, frozen=True):
    """One thing the invoice charges for, or one model the ledger has and the invoice hasn't.

    `invoice == attributed + unattributed + residual`. `unpriced` counts receipts whose cost nobody knows: where there
    are some, they may be the residual. `requests` counts all.
    """

    name: str
    invoice: Money
    attributed: Money
    unattributed: Money
    residual: Money
    requests: int
    unpriced: int
    why: str


class InvoiceLine(msgspec.Struct, frozen=True):
    name: str
    amount: Money
    at_ns: int | None


def invoice_lines(rows: Sequence[Mapping[str, str]], columns: Mapping[str, str]) -> list[InvoiceLine]:
    """The rows that charge something. `columns` names those for model, amount and time; else they are recognised.

    Raises ConfigError naming the row and the column.
    """
    if not rows:
        raise ConfigError("the invoice has no rows: export it with its lines.")
    name = _column(rows[0], columns.get("model"), _MODEL_COLUMNS, "model")
    amount = _column(rows[0], columns.get("amount"), _AMOUNT_COLUMNS, "amount")
    wanted_time = columns.get("time")
    time = _column(rows[0], wanted_time, _TIME_COLUMNS, "time") if wanted_time or _has(rows[0], _TIME_COLUMNS) else None
    lines = []
    for number, row in enumerate(rows, start=1):
        text, when = (row[amount] or "").strip(), (row[time] or "").strip() if time else ""
        if not text:
            continue
        usd = parse_amount(text)
        if usd is None:
            raise ConfigError(f"row {number}, column {amount}: {text!r} is no amount.")
        if row.keys() >= _IN_CENTS:
            usd = usd.scaleb(-2)
        for column in row.keys() & set(_CURRENCY_COLUMNS):
            if (row[column] or "usd").strip().lower() != "usd":
                raise ConfigError(f"row {number}, column {column}: {row[column]!r} is not USD: convert it first.")
        try:
            at_ns = parse_moment_ns(when) if when else None
        except ValueError:
            raise ConfigError(f"row {number}, column {time}: {when!r} is no date.") from None
        lines.append(InvoiceLine((row[name] or "").strip() or "(no name)", Money.from_usd(usd), at_ns))
    return lines


def period_of(lines: Sequence[InvoiceLine]) -> tuple[int, int]:
    """From the first day on the invoice to the end of its last. Raises ConfigError where it shows no dates."""
    times = [line.at_ns for line in lines if line.at_ns is not None]
    if not times:
        raise ConfigError("the invoice shows no dates: say which time it is for with --since and --until.")
    return min(times) // DAY_NS * DAY_NS, max(times) // DAY_NS * DAY_NS + DAY_NS


def reconcile(
    queries: LedgerQueries, lines: Sequence[InvoiceLine], from_ns: int, to_ns: int, placement: str | None
) -> list[Item]:
    """One item for each name on the invoice, dearest first, then for each model that is only in the ledger. Lines of
    another time are left out; those without a date are of this one."""
    amounts: dict[str, Money] = {}
    within = [line for line in lines if line.at_ns is None or from_ns <= line.at_ns < to_ns]
    for name, of_one in _by_model(within).items():
        amounts[name] = Money.total(line.amount for line in of_one)
    where = ReceiptFilter(from_ns=from_ns, to_ns=to_ns, placement=placement)
    known = {total.group or "": total for total in queries.totals("model", where)}
    nameless = msgspec.structs.replace(where, feature="")
    unattributed = {total.group or "": total.cost for total in queries.totals("model", nameless)}
    matches = _matches(list(amounts), list(known))
    wanted: list[tuple[str, str | None, Money | None]] = [
        (name, matches.get(name), amount)
        for name, amount in sorted(amounts.items(), key=lambda pair: (-pair[1].nanousd, pair[0]))
    ]
    wanted += [(model, model, None) for model in sorted(set(known) - set(matches.values()))]
    items = []
    for name, model, charged in wanted:
        total = None if model is None else known[model]
        cost = Money(0) if total is None else total.cost
        nobody = Money(0) if model is None else unattributed.get(model, Money(0))
        invoiced = Money(0) if charged is None else charged
        residual = invoiced - cost
        unpriced = 0 if total is None else total.unpriced
        requests = 0 if total is None else total.requests
        why = _why(charged is not None, total is not None, residual, unpriced)
        items.append(Item(name, invoiced, cost - nobody, nobody, residual, requests, unpriced, why))
    return items


def _by_model(lines: Sequence[InvoiceLine]) -> dict[str, list[InvoiceLine]]:
    """A model's lines for input, output and cached tokens as one; a line that stands alone keeps its name."""
    found: dict[str, list[InvoiceLine]] = {}
    for line in lines:
        found.setdefault(_KIND_OF_TOKENS.sub("", line.name) or line.name, []).append(line)
    return {
        of_one[0].name if len({line.name for line in of_one}) == 1 else name: of_one for name, of_one in found.items()
    }


def _matches(names: Sequence[str], models: Sequence[str]) -> dict[str, str]:
    """Invoice names to models: the same, else the same letters, else the longest model that the name begins with or has
    inside. Each model once, so that no receipt explains two lines."""
    found = {name: name for name in names if name in models}
    left = sorted(set(models) - set(found), key=lambda model: (-len(model), model))
    for same in (True, False):
        for name in sorted(set(names) - set(found), key=lambda name: (len(name), name)):
            plain = _plain(name)
            for model in left:
                if _plain(model) == plain if same else _plain(model) and _plain(model) in plain:
                    found[name] = model
                    left.remove(model)
                    break
    return found


def _plain(name: str) -> str:
    return "".join(character for character in name.lower() if character.isalnum() or character == ".")


def _why(on_invoice: bool, in_ledger: bool, residual: Money, unpriced: int) -> str:
    if not in_ledger:
        return "no receipt has this model: it was used past Millicent, or is no model"
    if not on_invoice:
        return "in the ledger only: another invoice has it, or it runs on your own machine"
    if residual == Money(0):
        return "explained"
    if residual.nanousd > 0 and unpriced:
        return "unpriced receipts may be the residual: give the model a price, or import what it cost"
    if residual.nanousd > 0:
        return "the invoice is higher: use past Millicent, a price that changed, or tax"
    return "the ledger is higher: a discount, a credit, or a price that changed"


def _has(row: Mapping[str, str], known: Sequence[str]) -> bool:
    return any(column.lower() in known for column in row)


def _column(row: Mapping[str, str], wanted: str | None, known: Sequence[str], field: str) -> str:
    if wanted is not None and wanted in row:
        return wanted
    by_name = {column.lower(): column for column in row}
    found = next((by_name[name] for name in known if name in by_name), None)
    if wanted is not None or found is None:
        what = f"has no column {wanted!r}" if wanted else f"has no column that I know for the {field}"
        raise ConfigError(f"the invoice {what}: name one of {', '.join(row)} with --{field}.")
    return found


def period_text(from_ns: int, to_ns: int) -> str:
    return f"{iso_utc(from_ns)[:10]} to {iso_utc(to_ns - 1)[:10]} UTC"
