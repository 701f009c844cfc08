"""A simulated machine that must behave as the real one did, and what grows on it."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path

import msgspec
import pytest

from millicent.core.budgets import Budget, Every
from millicent.core.clock import NS_PER_HOUR, NS_PER_MS, NS_PER_S
from millicent.core.errors import InvalidRequest
from millicent.core.money import Money
from millicent.core.prompts import Prompt, Segment
from millicent.core.usage import Provenance
from millicent.economics.arrivals import Arrival
from millicent.economics.basis import Basis, basis_of
from millicent.economics.calibration import calibrate, fidelity, slower
from millicent.economics.outcomes import latency_of, outcome
from millicent.economics.recorded import Recorded, prefix_of, read_recorded
from millicent.economics.replaying import Change, replay
from millicent.economics.scaling import Limits, budget_breaks, connection_breaks, scale
from millicent.economics.simulator import Machine, simulate
from millicent.ledger.queries import LedgerQueries, ReceiptFilter
from support.plan_ledgers import T0, answer
from support.replay_ledgers import COSTS, SHAPE, keep, machine, recorded, traffic

# What the real machine has that the step-time model doesn't know of.
REAL = machine(coefficients=slower(COSTS, 1.25), entry_ns=6 * NS_PER_MS, gap_ns=0.3 * NS_PER_MS, exit_ns=9 * NS_PER_MS)


def read(home: Path) -> list[Recorded]:
    return read_recorded(LedgerQueries(home / "ledger.db"), ReceiptFilter())


@pytest.fixture(scope="module")
def basis(tmp_path_factory: pytest.TempPathFactory) -> Basis:
    home = tmp_path_factory.mktemp("recorded")
    keep(home, recorded(traffic(400, every_ms=500), REAL))
    return basis_of(LedgerQueries(home / "ledger.db"), read(home), SHAPE)


def test_what_passes_outside_of_steps_is_learned_from_receipts(basis: Basis) -> None:
    found = basis.machine
    assert basis.calibration.pace == pytest.approx(1.25, rel=0.02)
    assert found.entry_ns == pytest.approx(REAL.entry_ns, rel=0.05)
    assert found.exit_ns == pytest.approx(REAL.exit_ns, rel=0.01)
    assert found.gap_ns == pytest.approx(REAL.gap_ns, rel=0.25)


def test_newer_answers_are_predicted_from_older_ones(basis: Basis) -> None:
    off = basis.fidelity
    assert off is not None
    assert off.answers == 200
    assert max(map(abs, (off.mean_total, off.p95_total, off.mean_ttft, off.cost))) < 0.02


def test_what_was_left_out_of_account_shows_as_an_error(basis: Basis) -> None:
    """Without pace and gaps both are too low; cost by less than the pace, since less is done side by side then."""
    plain = msgspec.structs.replace(basis.machine, coefficients=COSTS, entry_ns=0, gap_ns=0, exit_ns=0)
    off = fidelity(basis.recorded, simulate(basis.arrivals, plain))
    assert off is not None
    assert 1 / 1.25 - 1 < off.cost < -0.1
    assert off.mean_total < -0.15


def test_too_few_answers_teach_nothing(basis: Basis) -> None:
    found = calibrate(basis.recorded[:5], machine())
    assert (found.machine, found.pace, found.fidelity) == (machine(), 1.0, None)


def test_without_an_engine_or_what_its_steps_take_it_is_said_what_to_do(tmp_path: Path) -> None:
    keep(tmp_path, [answer(1, T0)], fits=())
    with pytest.raises(InvalidRequest, match="choose another model or time, or give a trace"):
        basis_of(LedgerQueries(tmp_path / "ledger.db"), read(tmp_path), SHAPE)
    keep(tmp_path / "more", recorded(traffic(1, every_ms=1), machine()))
    found = read(tmp_path / "more")
    with pytest.raises(InvalidRequest, match="nobody knows yet what steps of small take"):
        basis_of(LedgerQueries(tmp_path / "ledger.db"), found, SHAPE)


def test_the_newest_hours_are_read_where_there_are_too_many(tmp_path: Path) -> None:
    hours = [answer(number, T0 + number // 10 * NS_PER_HOUR + number) for number in range(40)]
    keep(tmp_path, hours, hours=4)
    queries = LedgerQueries(tmp_path / "ledger.db")
    assert len(read_recorded(queries, ReceiptFilter(), most=25)) == 20
    assert len(read_recorded(queries, ReceiptFilter(), most=3)) == 10
    assert len(read_recorded(queries, ReceiptFilter(), most=40)) == 40


def test_segments_of_prompts_become_prefixes_in_tokens() -> None:
    prompt = Prompt(b"d", (Segment("system", 300, b"system"), Segment("user", 100, b"question")))
    assert prefix_of(prompt, 80) == ((60, b"system"), (80, b"question"))
    assert prefix_of(None, 80) == ()
    assert prefix_of(Prompt(b"d", ()), 80) == ()


def test_requests_of_one_moment_are_not_grown(basis: Basis) -> None:
    """One answer in a new ledger was taken for one in each nanosecond: growing it took all of the memory."""
    first = msgspec.structs.replace(basis, arrivals=basis.arrivals[:1])
    with pytest.raises(InvalidRequest, match="how often requests come can't be seen"):
        scale(first, (), Limits())


def test_a_burst_is_grown_on_no_more_machines_than_it_has_requests(basis: Basis) -> None:
    burst = [msgspec.structs.replace(each, at_ns=n) for n, each in enumerate(basis.arrivals[:20])]
    grown = scale(msgspec.structs.replace(basis, arrivals=tuple(burst)), (), Limits(), multiples=(2,))
    assert grown.scaled[0].machines is not None
    assert grown.scaled[0].machines <= 40
    assert grown.requests_per_month == 20 * 730, "what came within an hour is an hour's"


def test_machines_that_get_nothing_are_idle_machines(basis: Basis) -> None:
    course = simulate(basis.arrivals[:2], basis.machine, machines=5)
    assert len(course.loads) == 5
    assert sum(load.requests for load in course.loads) == 2


def test_an_outcome_is_what_its_parts_come_to() -> None:
    """Two requests of a second each on one machine at $3600 an hour; the second has waited for the first."""
    second = Machine(coefficients=msgspec.structs.replace(COSTS, fixed_ns=NS_PER_S), kv_blocks=64, context_tokens=256)
    plain = msgspec.structs.replace(
        second.coefficients, weights_ns=0, row_ns=0, sampled_row_ns=0, kv_token_ns=0, pair_ns=0
    )
    second = msgspec.structs.replace(second, coefficients=plain, max_sequences=1)
    arrivals = [Arrival(0, 5, 1, target_ns=NS_PER_S), Arrival(0, 7, 1, target_ns=NS_PER_S), Arrival(0, 999, 1)]
    found = outcome(simulate(arrivals, second), 64, Decimal(3600), Decimal(1800))
    assert (found.requests, found.answered, found.refused) == (3, 2, {"context_length_exceeded": 1})
    assert (found.wall_ns, found.busy_ns, found.utilization) == (2 * NS_PER_S, 2 * NS_PER_S, 1.0)
    assert (found.busy_cost, found.wall_cost) == (Money.from_usd(2), Money.from_usd(1))
    assert found.in_time == 0.5
    assert (found.input_tokens, found.output_tokens) == (12, 2)
    assert found.latency.total is not None
    assert (found.latency.total.mean, found.latency.total.p50, found.latency.total.p95) == (
        3 * NS_PER_S // 2,
        NS_PER_S,
        2 * NS_PER_S,
    )
    assert found.latency.tpot is None


def test_percentiles_are_by_nearest_rank() -> None:
    found = latency_of([*range(1, 101), None])
    assert found is not None
    assert (found.p50, found.p95, found.p99) == (50, 95, 99)
    assert latency_of([None]) is None


def test_a_replay_without_a_change_changes_nothing(basis: Basis) -> None:
    found = replay(basis, Change())
    assert found.before == found.after
    assert found.measured is not None
    assert found.measured.total is not None
    assert found.before.latency.total is not None
    assert found.before.latency.total.mean == pytest.approx(found.measured.total.mean, rel=0.02)


def test_a_replay_shows_what_a_change_does(basis: Basis) -> None:
    quick = replay(basis, Change(steps_take=0.5))
    assert quick.after.busy_ns < 0.6 * quick.before.busy_ns
    alone = replay(basis, Change(max_sequences=1))
    assert alone.after.latency.queue is not None
    assert alone.before.latency.queue is not None
    assert alone.after.latency.queue.mean > 2 * alone.before.latency.queue.mean
    four = replay(basis, Change(times=3, machines=4))
    assert (four.after.requests, four.after.machines) == (3 * four.before.requests, 4)


def test_growth_says_what_breaks_first_and_how_many_machines_it_takes(basis: Basis) -> None:
    said: list[str] = []
    found = scale(
        basis,
        basis.recorded,
        Limits(max_concurrent=40),
        multiples=(4, 10),
        target_ns=2 * NS_PER_S,
        most=1000,
        progress=said.append,
    )
    assert found.breaks[0].what == "latency"
    assert found.breaks[0].held_at is not None
    assert {each.what for each in found.breaks} == {"latency", "concurrency"}
    four, ten = found.scaled
    assert four.machines is not None
    assert ten.machines is not None
    assert 1 < four.machines < ten.machines
    for each in (four, ten):
        assert each.p95_wait_ns is not None
        assert each.p95_wait_ns <= 2 * NS_PER_S
        assert each.machines is not None
        fewer, _ = basis.run(_grown(basis, each.multiple), machines=each.machines - 1)
        late = sum(fate.total_ns is not None and fate.total_ns > 2 * NS_PER_S for fate in fewer.fates)
        assert late > 0.05 * len(fewer.fates)
    assert four.wall_cost_per_month == Money.from_usd(730 * four.machines)
    assert ten.requests_per_month == 10 * found.requests_per_month
    assert said


def _grown(basis: Basis, times: int) -> list[Arrival]:
    from millicent.economics.arrivals import busiest, superposed

    return superposed(busiest(basis.arrivals, 100), times)


def test_what_present_machines_were_seen_to_carry_takes_no_more_of_them(tmp_path: Path) -> None:
    """A hundred times the traffic is too much to be tried on many machines; on the one there is it was."""
    keep(tmp_path, recorded(traffic(130, every_ms=120_000), REAL), hours=6)
    sparse = basis_of(LedgerQueries(tmp_path / "ledger.db"), read(tmp_path), SHAPE)
    found = scale(sparse, sparse.recorded, Limits(machines=1), multiples=(100,), target_ns=10 * NS_PER_S, most=1000)
    top = found.ladder[-1]
    assert (top.multiple, top.outcome.requests) == (100, 10_000)
    assert top.p95_wait_ns is not None
    assert top.p95_wait_ns < 10 * NS_PER_S
    assert (found.scaled[0].machines, found.scaled[0].p95_wait_ns) == (1, top.p95_wait_ns)


def test_a_target_that_no_machine_meets_is_said_so(basis: Basis) -> None:
    found = scale(basis, basis.recorded, Limits(), multiples=(2,), target_ns=NS_PER_MS, most=200)
    assert found.scaled[0].machines is None
    assert found.scaled[0].wall_cost_per_month is None
    assert found.breaks[0].held_at is None


def test_without_a_target_twice_what_it_takes_now_is_assumed(basis: Basis) -> None:
    found = scale(basis, basis.recorded, Limits(), multiples=(2,), most=200)
    assert found.target_provenance is Provenance.ASSUMED
    assert found.ladder[0].p95_wait_ns is not None
    assert found.target_ns == 2 * found.ladder[0].p95_wait_ns


def test_hard_budgets_and_connections_break_where_their_dearest_moment_grows_to_them(tmp_path: Path) -> None:
    """40 requests at $1/3600 in two hours, 30 of them in the first: $1/120."""
    receipts = [answer(number, T0 + (number // 30) * NS_PER_HOUR + number * NS_PER_S) for number in range(40)]
    overlapping = [
        msgspec.structs.replace(each, timing=msgspec.structs.replace(each.timing, total_ns=3 * NS_PER_S))
        for each in receipts
    ]
    keep(tmp_path, overlapping)
    everything = read(tmp_path)
    hourly = Budget(name="hourly", limit=Money.from_usd(Decimal(1) / 12), every=Every.HOUR)
    soft = msgspec.structs.replace(hourly, name="soft", hard=False)
    others = msgspec.structs.replace(hourly, name="others", per="user", only="bob")
    (found,) = budget_breaks(everything, [hourly, soft, others])
    assert (found.name, found.multiple) == ("[budgets.hourly]", 10.0)
    (calls,) = connection_breaks(everything, {"box": 6, "elsewhere": 1})
    assert (calls.name, calls.multiple) == ("[placements.box] max_connections = 6", 4.0)
