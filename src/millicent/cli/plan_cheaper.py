"""`plan cheaper`: every lever, with what it would have saved of the traffic that really came."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from millicent.cli import home
from millicent.cli.options import exact_json_option, filters

if TYPE_CHECKING:
    from millicent.config import Config
    from millicent.core.money import Money
    from millicent.economics.basis import Basis
    from millicent.economics.levers import Cheaper, Estimate, Lever, Measured
    from millicent.ledger.queries import LedgerQueries, ReceiptFilter


@click.command()
@filters
@click.option("--compare", multiple=True, metavar="MODEL", help="A provider's model to compare with. Repeat it.")
@click.option("--requests", type=click.IntRange(100, 100_000), default=5_000, show_default=True, help="To replay.")
@click.option("--ttl-s", type=click.IntRange(min=1), help="For how long the response cache would keep answers.")
@exact_json_option
def cheaper(compare: tuple[str, ...], requests: int, ttl_s: int | None, json_: bool, **given: Any) -> None:
    """Replay this ledger's traffic through each lever: what it would have saved, how surely, and how to switch it on.

    By default the last 30 days. Caches are replayed by the hashes that receipts keep, what runs on an own engine by
    the simulator (see `millicent replay`), what is paid by the token at the prices on its receipts.
    """
    import msgspec

    from millicent.cli import show
    from millicent.cli.plan_scale import about, engine_basis, progress, read_traffic
    from millicent.core.clock import SystemClock
    from millicent.dashboard.scale_json import cheaper_body
    from millicent.economics.holdouts import measured
    from millicent.economics.levers import cheaper as compare_levers
    from millicent.economics.levers import ground_of
    from millicent.economics.levers_list import LEVERS
    from millicent.economics.recorded import fit_versions
    from millicent.meter.prices import PriceBook
    from millicent.meter.published_prices import published_prices

    settings, queries = home.settings(), home.open_ledger()
    with progress() as said:
        where, recorded = read_traffic(queries, given, said)
        basis = engine_basis(settings, queries, recorded, said)
        said("Comparing places")
        bill, places = _places(settings, queries, where)
        ground = ground_of(
            recorded,
            basis,
            requests,
            fits=queries.fits_named(fit_versions(recorded)),
            cache=settings.cache if ttl_s is None else msgspec.structs.replace(settings.cache, ttl_s=ttl_s),
            prices=PriceBook(settings.prices, published_prices),
            policies=tuple(settings.routing),
            compared=compare,
            bill=bill,
            places=places,
            now_ns=SystemClock().now_ns(),
        )
        found = compare_levers(ground, LEVERS, said, measured=measured(queries, where))
    if json_:
        show.as_json(cheaper_body(found, basis))
        return
    print("\n".join(_text(found, basis, about)))


def _text(found: Cheaper, basis: Basis | None, about: Any) -> list[str]:
    from millicent.cli import show

    lines = [
        f"{found.requests:,} of {found.of:,} answers replayed; they came to {found.cost.human()}.",
        *(about(basis) if basis is not None else []),
        "",
    ]
    known = [each for each in found.levers if each.needs is None]
    header = ("LEVER", "IS ON", "TOUCHES", "SAVES", "95%", "A MONTH", "OF ALL")
    rows = [row for each in known for row in _rows(found, each)]
    lines.append(show.table(header, rows, right=frozenset({"TOUCHES", "SAVES", "A MONTH", "OF ALL"})))
    lines += [
        "",
        "Money is saved where answers are paid by the token; on machines that are paid already, capacity is freed.",
    ]
    for each in found.levers:
        lines += ["", *_details(each)]
    if found.realised:
        names = ("SAVED BY RECEIPTS (ESTIMATED)", "ANSWERS", "SAVED")
        saved = [(each.name, f"{each.requests:,}", each.saved.human()) for each in found.realised]
        lines += ["", show.table(names, saved, right=frozenset({"ANSWERS", "SAVED"}))]
    if found.measured:
        header = ("SAVED AGAINST A HOLD-OUT", "WITH", "WITHOUT", "SAVED", "95%", "PREDICTED", "UNPRICED")
        measured = [_measured(each) for each in found.measured]
        lines += ["", show.table(header, measured, right=frozenset({*header} - {header[0], "95%"}))]
    return [show.printable(line) if "\n" not in line else line for line in lines]


def _rows(found: Cheaper, lever: Lever) -> list[tuple[str, ...]]:
    """One for money, one for capacity."""
    kinds = [(kind, amount) for kind, amount in (("", lever.saved), (" freed", lever.freed)) if amount is not None]
    return [
        (
            lever.title,
            "yes" if lever.on else "no",
            f"{lever.requests / lever.of:.1%}" if lever.of else "-",
            f"{amount.expected.human()}{kind}",
            _span(amount),
            f"{found.monthly(amount.expected).human()}{kind}",
            "-" if lever.share is None else f"{lever.share:.1%}",
        )
        for kind, amount in kinds
    ]


def _measured(each: Measured) -> tuple[str, ...]:
    """Predicted is what the same requests' own receipts say."""
    saved = ("too few yet", "-") if each.saved is None else (each.saved.expected.human(), _span(each.saved))
    reckoned = "-" if each.saved is None else each.reckoned.human()
    return (each.lever, f"{each.with_lever:,}", f"{each.without:,}", *saved, reckoned, f"{each.unpriced:,}")


def _span(amount: Estimate) -> str:
    return "-" if amount.low is None or amount.high is None else f"{amount.low.human()} to {amount.high.human()}"


def _details(lever: Lever) -> list[str]:
    """What was replayed, what it does to time and quality, and the lines that switch it on."""
    from millicent.cli import show

    lines = [f"{lever.title}: {'not known' if lever.needs is not None else f'by {lever.how}'}."]
    if lever.needs is not None:
        lines.append(f"  Needs {lever.needs}.")
    if (took := lever.latency) is not None:
        mean = f"{show.duration(took.mean_before_ns)} to {show.duration(took.mean_after_ns)}"
        p95 = f"{show.duration(took.p95_before_ns)} to {show.duration(took.p95_after_ns)}"
        lines.append(f"  Time until the answer: from {mean} on average, from {p95} for 95 in 100.")
    lines.append(f"  Quality: {lever.quality}.")
    lines += [f"  {note}" for note in lever.notes]
    return [*lines, *(f"    {line}" for line in lever.configuration.splitlines())]


def _places(settings: Config, queries: LedgerQueries, where: ReceiptFilter) -> tuple[Money | None, dict[str, Money]]:
    """A month's bill with whole machines, and what it would be elsewhere."""
    from millicent import config
    from millicent.core.clock import SystemClock
    from millicent.economics.places import Asked
    from millicent.economics.where import where as compare_places

    clock = SystemClock()
    found = compare_places(queries, clock, config.plan_setup(settings, clock.now_ns()), where, Asked())
    places = {each.name: each.monthly for each in found.places if each.monthly is not None}
    return found.accounts_spent or found.spent, places
