"""FOCUS 1.2 exports obey the column rules of the specification, which are written out here as facts."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millicent.core.accounts import Account
from millicent.core.clock import NS_PER_HOUR, NS_PER_S, ManualClock
from millicent.core.money import Money
from millicent.core.receipts import Accelerator, Line, Meter, PriceSource, Receipt, Role, Status
from millicent.core.request import Attribution
from millicent.core.usage import Provenance
from millicent.ledger.focus import COLUMNS, Row, charges, machine_charges, unpriced, unpriced_machines

Make = Callable[..., Receipt]
T0 = ManualClock().now_ns()
MONTH_NS = 31 * 24 * NS_PER_HOUR

MANDATORY = {
    "BilledCost", "BillingAccountId", "BillingAccountName", "BillingCurrency", "BillingPeriodEnd", "BillingPeriodStart",
    "ChargeCategory", "ChargeClass", "ChargeDescription", "ChargePeriodEnd", "ChargePeriodStart", "ContractedCost",
    "EffectiveCost", "InvoiceIssuerName", "ListCost", "PricingQuantity", "PricingUnit", "ProviderName",
    "PublisherName", "ServiceCategory", "ServiceName",
}  # fmt: skip
NOT_NULL = MANDATORY - {"BillingAccountName", "ChargeClass", "ChargeDescription", "PricingQuantity", "PricingUnit"} | {
    "ChargeFrequency", "ServiceSubcategory",
}  # fmt: skip
NUMERIC = {
    "BilledCost", "ConsumedQuantity", "ContractedCost", "ContractedUnitPrice", "EffectiveCost", "ListCost",
    "ListUnitPrice", "PricingQuantity",
}  # fmt: skip
TIMES = {"BillingPeriodEnd", "BillingPeriodStart", "ChargePeriodEnd", "ChargePeriodStart"}
ALLOWED: dict[str, set[str | None]] = {
    "ChargeCategory": {"Usage", "Purchase", "Tax", "Credit", "Adjustment"},
    "ChargeClass": {None, "Correction"},
    "ChargeFrequency": {"One-Time", "Recurring", "Usage-Based"},
    "PricingCategory": {None, "Standard", "Dynamic", "Committed", "Other"},
    "ServiceCategory": {"AI and Machine Learning"},
    "ServiceSubcategory": {"Generative AI"},
}
# Where a charge is usage and no correction, these say how much of what, at which price.
PRICED = {
    "ListUnitPrice", "ContractedUnitPrice", "PricingQuantity", "PricingUnit", "PricingCategory", "ConsumedQuantity",
    "ConsumedUnit", "SkuId", "SkuPriceId",
}  # fmt: skip


def check(row: Row) -> None:
    assert tuple(row) == COLUMNS
    assert {*row} >= MANDATORY
    for name, value in row.items():
        assert value is None or value.strip(), f"{name} is empty: FOCUS has NULL for that"
        assert value is not None or name not in NOT_NULL, f"{name} is NULL"
    for name in NUMERIC:
        assert row[name] is None or re.fullmatch(r"-?\d+(\.\d+)?", row[name] or ""), (name, row[name])
    for name in TIMES:
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", row[name] or ""), (name, row[name])
    for name, allowed in ALLOWED.items():
        assert row[name] in allowed, (name, row[name])
    text = {name: value or "" for name, value in row.items()}
    assert re.fullmatch("[A-Z]{3}", text["BillingCurrency"])
    assert text["BillingPeriodStart"] <= text["ChargePeriodStart"] < text["ChargePeriodEnd"]
    assert text["ChargePeriodStart"] < text["BillingPeriodEnd"]
    assert text["BillingPeriodStart"].endswith("-01T00:00:00Z")
    if row["ChargeCategory"] == "Usage" and row["ChargeClass"] is None:
        assert not [name for name in PRICED if row[name] is None]
        for price, cost in (("ListUnitPrice", "ListCost"), ("ContractedUnitPrice", "ContractedCost")):
            assert Decimal(text[price]) >= 0
            product = Decimal(text[price]) * Decimal(text["PricingQuantity"])
            # A cost is a whole number of nano-dollars, and a rate per second has no end in decimals.
            assert abs(product - Decimal(text[cost])) <= Decimal("0.6e-9"), (price, row)
    if row["ChargeCategory"] != "Usage":
        assert row["ConsumedQuantity"] is None
        assert row["ListCost"] == row["BilledCost"] == row["ContractedCost"] == row["EffectiveCost"]
    for quantity, unit in (("PricingQuantity", "PricingUnit"), ("ConsumedQuantity", "ConsumedUnit")):
        assert (row[quantity] is None) == (row[unit] is None)
        assert row[unit] is None or re.fullmatch("[A-Z][a-z]*s", text[unit])
    assert (row["SubAccountId"] is None) == (row["SubAccountName"] is None)
    assert (row["ResourceId"] is None) == (row["ResourceType"] is None)
    assert not (row["SkuId"] is None and row["SkuMeter"] is not None)
    if row["Tags"] is not None:
        tags = json.loads(row["Tags"])
        assert all(isinstance(value, str) for value in tags.values())


def test_column_names_are_pascal_case_and_ours_stand_last_behind_x() -> None:
    own = [name for name in COLUMNS if name.startswith("x_")]
    assert COLUMNS[-len(own) :] == tuple(own)
    assert all(re.fullmatch("(x_)?([A-Z][a-z]+)+", name) and len(name) <= 50 for name in COLUMNS)


lines = st.builds(
    Line,
    attempt=st.just(1),
    role=st.sampled_from(list(Role)),
    meter=st.sampled_from([Meter.INPUT, Meter.OTHER]),
    quantity=st.integers(0, 10**9).map(Decimal),
    unit=st.sampled_from(["token", "second", "request", "page"]),
    unit_price_usd=st.integers(0, 10**6).map(lambda micro: Decimal(micro).scaleb(-9)),
    amount=st.just(Money(0)),
    provenance=st.just(Provenance.REPORTED),
    incurred_at_ns=st.integers(T0, T0 + MONTH_NS - 1),
    posted_at_ns=st.integers(T0 + MONTH_NS, T0 + 2 * MONTH_NS),
)
names = st.one_of(st.none(), st.text("ab =;,\"'", min_size=1, max_size=4).filter(str.strip))


@settings(max_examples=80, deadline=None)
@given(
    drawn=st.lists(st.tuples(lines, st.one_of(st.none(), st.just(0), st.integers(-(10**9), 10**9))), max_size=4),
    whom=st.builds(
        Attribution,
        team=names,
        user=names,
        feature=names,
        tags=st.dictionaries(st.sampled_from(["env", "millicent/user"]), st.text("x", max_size=2)),
    ),
)
def test_every_priced_line_is_one_clean_row_and_every_other_is_counted_aside(
    drawn: list[tuple[Line, int | None]], whom: Attribution
) -> None:
    """An amount of 0 stands for the line's own price; any other for one that came without a unit price."""
    made = []
    for line, nanousd in drawn:
        if nanousd == 0:
            assert line.unit_price_usd is not None
            made.append(msgspec.structs.replace(line, amount=Money.price(line.quantity, line.unit_price_usd)))
        else:
            amount = None if nanousd is None else Money(nanousd)
            made.append(msgspec.structs.replace(line, unit_price_usd=None, amount=amount))
    receipt = Receipt(
        id="rcpt_1",
        created_at_ns=T0,
        settled_at_ns=T0,
        status=Status.SUCCEEDED,
        model="m",
        placement="p",
        dialect="d",
        stream=False,
        attribution=whom,
        lines=tuple(made),
    )
    rows = list(charges(receipt))
    for row in rows:
        check(row)
    billed = sum((Decimal(row["BilledCost"] or "") for row in rows), Decimal(0))
    assert billed == sum((line.amount.usd for line in made if line.amount), Decimal(0))
    assert len(list(unpriced(receipt))) == sum(line.amount is None for line in made)


def account(**changes: Any) -> Account:
    facts: dict[str, Any] = {
        "device": "cpu:0", "placement": "here", "hour_ns": T0, "accelerators": 2, "wall_ns": 3600 * NS_PER_S,
        "serving_ns": 1_000 * NS_PER_S, "overhead_ns": 7 * NS_PER_S, "lost_ns": 0, "idle_ns": 6_190 * NS_PER_S,
        "down_ns": 3 * NS_PER_S, "usd_per_hour": Decimal("0.9"), "rate_provenance": Provenance.ASSUMED,
        "cost": Money.from_usd("1.8"),
    }  # fmt: skip
    return Account(**facts | changes)


def test_a_machines_hour_is_its_serving_lines_and_a_row_for_each_other_part() -> None:
    rows = list(machine_charges([account()]))
    for row in rows:
        check(row)
    assert [row["x_SplitPart"] for row in rows] == ["overhead", "idle", "down"]
    serving = Money.of_time(1_000 * NS_PER_S, Decimal("0.9")).usd
    assert serving + sum(Decimal(row["BilledCost"] or "") for row in rows) == Decimal("1.8")
    assert {row["x_MachineHourCost"] for row in rows} == {"1.8"}


def test_a_machine_without_a_rate_is_listed_aside() -> None:
    nameless = account(usd_per_hour=None, cost=None)
    assert list(machine_charges([nameless])) == []
    assert [row["quantity"] for row in unpriced_machines([nameless])] == ["6200.000000000"]


def test_device_time_shows_the_share_and_the_batch_it_was_shared_with(opened: Make, closed: Make) -> None:
    (row,) = charges(closed(opened(1)))
    assert (row["x_AcceleratorSeconds"], row["x_MeanBatch"], row["x_SplitPart"]) == ("0.000000700", "2.250", "serving")
    assert (row["ResourceId"], row["ResourceType"]) == ("cpu", "Accelerator")


def test_the_list_cost_is_that_before_the_contracts_discount(opened: Make, closed: Make) -> None:
    receipt = closed(opened(1))
    (attempt,) = receipt.attempts
    line = msgspec.structs.replace(
        receipt.lines[0],
        meter=Meter.INPUT,
        unit="token",
        quantity=Decimal(1001),
        unit_price_usd=Decimal("0.00000255"),
        amount=Money.price(1001, Decimal("0.00000255")),
    )
    receipt = msgspec.structs.replace(
        receipt,
        placement=attempt.placement,
        lines=(line, msgspec.structs.replace(line, attempt=0, provenance=Provenance.REPORTED)),
        prices=PriceSource("prices.m", {"kind": "api", "input": "3", "discount": "0.15"}),
    )
    row, outside = charges(receipt)
    check(row)
    assert (row["ListUnitPrice"], row["ContractedUnitPrice"]) == ("0.000003", "0.00000255")
    assert (row["ListCost"], row["ContractedCost"]) == ("0.003003", "0.00255255")
    assert outside["ListCost"] == outside["ContractedCost"]
    assert (outside["ProviderName"], outside["InvoiceIssuerName"], outside["ServiceName"]) == (
        "outside",
        "outside",
        "inference",
    )


def test_what_recovery_reduced_to_the_hold_is_one_unit_at_that_price(opened: Make, closed: Make) -> None:
    receipt = closed(opened(1))
    reduced = msgspec.structs.replace(receipt.lines[0], amount=Money(3))
    assert reduced.unit_price_usd is not None
    assert Money.price(reduced.quantity, reduced.unit_price_usd) > Money(5)
    (row,) = charges(msgspec.structs.replace(receipt, lines=(reduced,)))
    check(row)
    assert (row["PricingQuantity"], row["PricingUnit"], row["ContractedUnitPrice"]) == ("1", "Units", "0.000000003")


def test_a_price_has_an_identifier_of_its_own_and_so_has_each_kind_of_cache_write(opened: Make, closed: Make) -> None:
    receipt = closed(opened(1))
    line = msgspec.structs.replace(receipt.lines[0], meter=Meter.CACHE_WRITE, unit="token", note="kept for 5 minutes")
    lines = [
        line,
        msgspec.structs.replace(line, note="kept for 1 hour"),
        msgspec.structs.replace(line, unit_price_usd=Decimal("0.1"), amount=Money.price(line.quantity, Decimal("0.1"))),
    ]
    rows = list(charges(msgspec.structs.replace(receipt, lines=tuple(lines))))
    assert len({row["SkuPriceId"] for row in rows}) == 3
    assert [row["SkuId"] == rows[0]["SkuId"] for row in rows] == [True, False, True]


@pytest.mark.parametrize(
    ("unit", "plural"),
    [("token-hour", "Token-Hours"), ("query", "Queries"), ("batch", "Batches"), ("day", "Days"), ("calls", "Calls")],
)
def test_units_are_capitalised_and_plural(opened: Make, closed: Make, unit: str, plural: str) -> None:
    receipt = closed(opened(1))
    line = msgspec.structs.replace(receipt.lines[0], unit=unit)
    (row,) = charges(msgspec.structs.replace(receipt, lines=(line,)))
    assert (row["PricingUnit"], row["ConsumedUnit"]) == (plural, plural)


def test_what_a_caller_chose_is_no_formula(opened: Make, closed: Make) -> None:
    who = Attribution(user="=1+1", team="@x", feature="-1", tier="+1")
    row = next(charges(msgspec.structs.replace(closed(opened(1)), attribution=who)))
    chosen = ("x_User", "SubAccountId", "SubAccountName", "x_Feature", "x_Tier")
    assert [row[name] for name in chosen] == ["'=1+1", "'@x", "'@x", "'-1", "'+1"]


def test_no_time_on_a_machine_of_unknown_price_is_no_charge(opened: Make, closed: Make) -> None:
    receipt = closed(opened(1))
    nothing = msgspec.structs.replace(receipt.lines[0], quantity=Decimal(0), amount=Money(0), unit_price_usd=None)
    assert list(charges(msgspec.structs.replace(receipt, lines=(nothing,)))) == []


@pytest.mark.parametrize(("status", "count"), [(Status.INTERRUPTED, 1), (Status.REFUSED, 0)])
def test_a_receipt_without_lines_is_unpriced_when_something_may_have_run(
    opened: Make, closed: Make, status: Status, count: int
) -> None:
    receipt = closed(opened(1), status=status, lines=(), accelerator=Accelerator())
    assert len(list(unpriced(receipt))) == count
