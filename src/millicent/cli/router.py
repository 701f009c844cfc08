"""`router`: a difficulty score is learned from graded pairs, and judged before anybody routes by it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from millicent.cli.options import json_option

if TYPE_CHECKING:
    from millicent.routing.difficulty import Pair
    from millicent.routing.evaluation import Estimate, Report

_PLOT_COLUMNS = 61
_PLOT_ROWS = 16

_pairs = click.argument("pairs", nargs=-1, required=True, type=click.Path(path_type=Path, dir_okay=False))
_leave_out = click.option(
    "--leave-out",
    type=click.Path(path_type=Path, dir_okay=False),
    help="A JSON Lines file of prompts that don't count: contaminated ones.",
)


@click.group()
def router() -> None:
    """Learn which prompts need the strong model, and see whether that is worth routing by.

    PAIRS are CSV files with a line of headings, then in each line a prompt, how good the weak model's answer was, and
    the strong one's: from 0 to 1, or true and false.
    """


@router.command()
@_pairs
@click.option("--output", required=True, type=click.Path(path_type=Path, dir_okay=False), help="Where to write it.")
@_leave_out
def train(pairs: tuple[Path, ...], output: Path, leave_out: Path | None) -> None:
    """Learn a difficulty score from graded pairs: the file for `[routing.NAME] scores`."""
    from rich.console import Console

    from millicent.cli import show
    from millicent.routing.difficulty import train as learn

    given, left_out = _given(pairs, leave_out)
    with Console(stderr=True).status(f"Learning from {len(given):,} pairs"):
        scorer = learn(given)
    scorer.save(output)
    show.note(f"Learned from {len(given):,} pairs ({left_out} left out): {output}. See `millicent router eval`.")


@router.command(name="eval")
@_pairs
@_leave_out
@click.option("--folds", type=click.IntRange(2, 50), default=5, show_default=True, help="Of the cross-validation.")
@click.option("--resamples", type=click.IntRange(50, 10_000), default=200, show_default=True, help="Of the bootstrap.")
@click.option(
    "--recover",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.5,
    show_default=True,
    help="The part of the gap between the models that a threshold is to recover.",
)
@click.option("--weak-usd", type=click.FloatRange(0), help="What a request costs on the weak model; with --strong-usd.")
@click.option("--strong-usd", type=click.FloatRange(0), help="What a request costs on the strong model.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of folds and resamples.")
@json_option
def evaluate(
    pairs: tuple[Path, ...],
    leave_out: Path | None,
    folds: int,
    resamples: int,
    recover: float,
    weak_usd: float | None,
    strong_usd: float | None,
    seed: int,
    json_: bool,
) -> None:
    """Judge a score by prompts that it wasn't learned from: cost against quality, beside a random control.

    PGR is the part recovered of the gap between the models, APGR its mean over all shares of strong calls, CPT(50%) the
    share at which half is recovered (RouteLLM, arXiv:2406.18665). A threshold is recommended only where the score beats
    the control; exit status 3 says that it doesn't.
    """
    from rich.progress import Progress

    from millicent.cli import show
    from millicent.routing.evaluation import evaluate as judge
    from millicent.routing.evaluation import held_out_scores

    if (weak_usd is None) != (strong_usd is None):
        raise click.UsageError("--weak-usd and --strong-usd go together")
    given, left_out = _given(pairs, leave_out)
    from rich.console import Console

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(f"{len(given):,} pairs in {folds} folds", total=folds + 1)
        scores = held_out_scores(given, folds, seed, lambda done: progress.update(task, completed=done))
        report = judge(given, scores, recover=recover, resamples=resamples, seed=seed, left_out=left_out)
    costs = None if weak_usd is None or strong_usd is None else (weak_usd, strong_usd)
    if json_:
        show.as_json(_body(report))
    else:
        print(_text(report, costs))
    if report.recommended is None:
        click.get_current_context().exit(3)


def _given(paths: tuple[Path, ...], leave_out: Path | None) -> tuple[list[Pair], int]:
    from millicent.routing.pairs import read_contaminated, read_pairs, without

    read = read_pairs(paths)
    kept = read if leave_out is None else without(read, read_contaminated(leave_out))
    return kept, len(read) - len(kept)


def _body(report: Report) -> dict[str, Any]:
    import msgspec

    body: dict[str, Any] = msgspec.to_builtins(report)
    return {"object": "router_evaluation"} | body


def _text(report: Report, costs: tuple[float, float] | None) -> str:
    from millicent.cli import show

    header = ["STRONG CALLS", *(["USD PER REQUEST"] if costs else []), "QUALITY", "PGR", "95%", "RANDOM", "95% "]
    rows = []
    for step in range(0, 101, 10):
        routed, control = report.curve[step], report.control[step]
        share = step / 100
        cost = [] if costs is None else [f"{(1 - share) * costs[0] + share * costs[1]:.6g}"]
        quality = report.weak + routed.value * (report.strong - report.weak)
        ends = [f"{each.low:.2f} to {each.high:.2f}" for each in (routed, control)]
        rows.append(
            [f"{step}%", *cost, f"{quality:.4f}", f"{routed.value:.3f}", ends[0], f"{control.value:.3f}", ends[1]]
        )
    given = f"{report.pairs:,} pairs, {report.left_out} left out"
    lines = [
        f"{given}; mean grade {report.weak:.4f} weak, {report.strong:.4f} strong, each prompt scored without it.",
        "",
        show.table(header, rows, right=frozenset(header)),
        "",
        *_plot(report),
        "",
        f"APGR      {_said(report.apgr)}   random {_said(report.control_apgr)}   gain {_said(report.gain)}",
        f"CPT(50%)  {_said(report.cpt50)}   random {_said(report.control_cpt50)}",
        "",
    ]
    found = report.recommended
    if found is None:
        lines.append(f"Not recommended: {report.why_not}.")
    else:
        lines.append(
            f"threshold = {found.threshold:.4f} sends {found.strong_share:.0%} to the strong model and recovers "
            f"{_said(found.recovered)} of the gap."
        )
    return "\n".join(lines)


def _plot(report: Report) -> list[str]:
    """PGR over the share of strong calls: `*` the score, `.` the random control."""
    rows = [[" "] * _PLOT_COLUMNS for _ in range(_PLOT_ROWS)]
    for mark, curve in ((".", report.control), ("*", report.curve)):
        for column in range(_PLOT_COLUMNS):
            value = curve[round(100 * column / (_PLOT_COLUMNS - 1))].value
            row = round((1 - max(0.0, min(1.0, value))) * (_PLOT_ROWS - 1))
            rows[row][column] = mark
    labels = {0: "100%", _PLOT_ROWS - 1: "0%"}
    lines = [f"{labels.get(number, ''):>5} |{''.join(row)}" for number, row in enumerate(rows)]
    return ["  PGR  (* score, . random control)", *lines, f"      +{'-' * _PLOT_COLUMNS} 100% strong calls"]


def _said(estimate: Estimate) -> str:
    return f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"
