"""Where you stand: bands at their edges, ticks that evidence makes and takes away, and doing without a model."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from millicent.core.clock import ManualClock
from millicent.core.errors import ConfigError
from millicent.core.money import Money
from millicent.core.receipts import Accelerator
from millicent.core.request import Attribution
from millicent.core.usage import Provenance, Usage
from millicent.economics.alternatives import Alternative, AlternativeConfig
from millicent.economics.config import EarningsConfig
from millicent.economics.margin import Books
from millicent.economics.standing import (
    AI_COST,
    COVERAGE,
    PROFITABLE,
    REQUEST_COST,
    Band,
    Configured,
    Standing,
    band_words,
    standing,
    told,
)
from millicent.ledger.queries import LedgerQueries, ReceiptFilter
from support.plan_ledgers import T0, answer, two_hours, write


@pytest.mark.parametrize(
    ("band", "value", "where"),
    [
        (AI_COST, "0.41", "behind"),
        (AI_COST, "0.40", "between behind and typical"),
        (AI_COST, "0.26", "between behind and typical"),
        (AI_COST, "0.25", "typical"),
        (AI_COST, "0.15", "typical"),
        (AI_COST, "0.14", "between typical and leading"),
        (AI_COST, "0.10", "between typical and leading"),
        (AI_COST, "0.09", "leading"),
        (REQUEST_COST, "0.11", "behind"),
        (REQUEST_COST, "0.07", "between behind and typical"),
        (REQUEST_COST, "0.01", "typical"),
        (REQUEST_COST, "0.007", "between typical and leading"),
        (REQUEST_COST, "0.0049", "leading"),
        (COVERAGE, "0.29", "behind"),
        (COVERAGE, "0.30", "between behind and typical"),
        (COVERAGE, "0.50", "typical"),
        (COVERAGE, "0.70", "typical"),
        (COVERAGE, "0.85", "between typical and leading"),
        (COVERAGE, "0.86", "leading"),
        (PROFITABLE, "0.55", "typical"),
        (PROFITABLE, "0.65", "between typical and leading"),
        (PROFITABLE, "0.81", "leading"),
    ],
)
def test_a_value_stands_where_the_published_bands_put_it(band: Band, value: str, where: str) -> None:
    assert band.where(Fraction(Decimal(value))) == where


def test_bands_are_told_as_they_were_published() -> None:
    assert band_words(AI_COST) == ("over 40%", "15% to 25%", "under 10%")
    assert band_words(REQUEST_COST) == ("over $0.10", "$0.01 to $0.05", "under $0.005")
    assert band_words(COVERAGE) == ("under 30%", "50% to 70%", "over 85%")
    assert band_words(PROFITABLE) == ("under 30%", "50% to 60%", "over 80%")
    assert (told(AI_COST, Fraction(1, 3)), told(REQUEST_COST, Fraction(1, 100))) == ("33.3%", "1 cent")


ORDER = ["behind", "between behind and typical", "typical", "between typical and leading", "leading"]


@given(st.sampled_from([AI_COST, REQUEST_COST, COVERAGE, PROFITABLE]), st.fractions(0, 1), st.fractions(0, 1))
def test_what_is_better_never_stands_worse(band: Band, one: Fraction, other: Fraction) -> None:
    worse, better = sorted((one, other), reverse=not band.more_is_better)
    assert ORDER.index(band.where(worse)) <= ORDER.index(band.where(better))


def stand(home: Path, rows: list[Any], configured: Configured = Configured(), **earnings: EarningsConfig) -> Standing:  # noqa: B008 - frozen
    clock = write(home, rows)
    queries = LedgerQueries(home / "ledger.db")
    return standing(queries, clock, ReceiptFilter(from_ns=T0), configured, Books(features=earnings))


def done(found: Standing) -> dict[str, bool]:
    return {tick.what: tick.done for tick in found.ticks}


def test_what_is_known_stands_and_what_is_not_says_what_would_make_it_known(tmp_path: Path) -> None:
    """40 requests at $1/3600 each."""
    found = stand(tmp_path, two_hours())
    ai_cost, request_cost, coverage, profitable = found.stands
    assert (ai_cost.value, ai_cost.where, ai_cost.evidence) == (None, None, "unknown: state revenue")
    assert request_cost.value == Fraction(277_778, 10**9)
    assert request_cost.where == "leading"
    assert coverage.value == 0
    assert coverage.where == "behind"
    assert profitable.evidence == "unknown: state revenue by feature"


def test_revenue_by_feature_gives_the_share_of_it_and_who_gains(tmp_path: Path) -> None:
    """Ten cents a request: $4 of revenue, $0.0111 of cost."""
    found = stand(tmp_path, two_hours(), search=EarningsConfig(revenue_usd_per_request=Decimal("0.1")))
    ai_cost, _, _, profitable = found.stands
    assert ai_cost.value == Fraction(40 * 277_778, 4 * 10**9)
    assert ai_cost.where == "leading"
    assert profitable.value == 1
    assert done(found)["revenue stands beside cost"]


def test_an_empty_ledger_ticks_nothing_and_stands_nowhere(tmp_path: Path) -> None:
    found = standing(LedgerQueries(tmp_path / "ledger.db"), ManualClock(), ReceiptFilter(), Configured(), Books())
    assert not any(done(found).values())
    assert {each.where for each in found.stands} == {None}
    assert found.next_step == found.ticks[0]


def test_evidence_ticks_and_its_absence_takes_the_tick_away(tmp_path: Path) -> None:
    nameless = Attribution(user="ada")
    rows = [answer(i, T0 + i, attribution=nameless if i < 3 else Attribution(feature="search")) for i in range(40)]
    (tmp_path / "a").mkdir()
    found = stand(tmp_path / "a", rows)
    tick = found.ticks[0]
    assert (tick.done, tick.evidence) == (False, "37 of 40 name one; it takes 95 in 100")
    assert found.next_step == tick
    (tmp_path / "b").mkdir()
    assert stand(tmp_path / "b", [answer(9, T0), *rows[3:]]).ticks[0].done is True


def test_each_tick_follows_from_its_own_evidence(tmp_path: Path) -> None:
    everything = Configured(
        cost_targets=("search",),
        latency_targets=("search",),
        budgets=("team",),
        alerts=("spend",),
        second_places=("small",),
        scenarios=("pilot",),
    )
    ticked = {what for what, is_done in done(stand(tmp_path, two_hours(), everything)).items() if is_done}
    assert ticked == {
        "requests say which feature they are for",
        "every request has a price",
        "no price rests on an assumption",
        "features have a cost target",
        "features have a latency target",
        "prompts are read from caches",
        "a budget bounds what is spent",
        "alerts reach somebody",
        "a model can run in a second place",
        "what comes next was estimated",
    }
    (tmp_path / "other").mkdir()
    plain = Usage.of(Provenance.MEASURED, input_fresh=10, output_text=1)
    fitted = Accelerator(10**9, 10**9, 0, 1, 1, Provenance.MEASURED, step_time_version="fit_1")
    rows = [answer(1, T0, usage=plain, accelerator=fitted, lines=())]
    now = done(stand(tmp_path / "other", rows))
    assert now["what a machine can carry is known"]
    assert not now["prompts are read from caches"]
    assert not now["every request has a price"]


def test_an_outcome_without_a_model_costs_a_persons_minutes(tmp_path: Path) -> None:
    """Six minutes at $30 an hour and ten cents of postage: $3.10."""
    agent = Alternative(minutes=Decimal(6), usd_per_hour=Decimal(30), usd=Decimal("0.10"), what="an agent")
    configured = Configured(alternatives={"search": agent, "unused": Alternative(usd=Decimal(1))})
    search, unused = stand(tmp_path, two_hours(), configured).without
    assert search.without == Money.from_usd("3.10")
    assert (search.with_model, search.of, search.outcomes) == (Money(277_778), "request", 40)
    assert search.saved == Money.from_usd("3.10") - Money(277_778)
    assert (unused.with_model, unused.saved, unused.outcomes) == (None, None, 0)


def test_where_outputs_are_rated_the_useful_ones_are_compared(tmp_path: Path) -> None:
    """Half of them useful: each costs two requests."""
    rows = [msgspec.structs.replace(each, useful=number % 2 == 0) for number, each in enumerate(two_hours())]
    configured = Configured(alternatives={"search": Alternative(usd=Decimal("0.0005"))})
    [found] = stand(tmp_path, rows, configured).without
    assert (found.with_model, found.of, found.outcomes) == (Money(2 * 277_778), "useful output", 20)
    assert found.saved == Money(500_000 - 555_556)


@pytest.mark.parametrize(
    ("alternative", "problem"),
    [
        (Alternative(minutes=Decimal(1)), "usd_per_hour: missing"),
        (Alternative(usd_per_hour=Decimal(1)), "minutes: missing"),
        (Alternative(usd=Decimal(-1)), "usd = -1: must be a number of 0 or more"),
        (Alternative(what="a rule"), "say what an outcome costs"),
    ],
)
def test_an_alternative_that_says_nothing_is_refused(alternative: Alternative, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        AlternativeConfig(alternative=alternative).check("search")
