"""Plan: what breaks as it grows, and what would make it cheaper. The pages, and the same as JSON."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from millicent.core.clock import NS_PER_MS
from millicent.core.errors import InvalidRequest
from millicent.core.money import Money
from millicent.core.usage import Provenance
from millicent.dashboard import figures, tables
from millicent.dashboard.charts import Chart
from millicent.dashboard.figures import Figure
from millicent.dashboard.plan import Planning
from millicent.dashboard.replays import KNOWN, Body, Replays
from millicent.dashboard.selection import Selection
from millicent.dashboard.site import Page, Site
from millicent.dashboard.tables import Cell, Column, Table

# So long a page waits for what is nearly there, before it says that it is being simulated.
_PATIENCE_S = 0.1
# Fewer than the commands' own, so that a page is there in some seconds.
_SCALE_REQUESTS, _CHEAPER_REQUESTS = 2_500, 2_000

Show = Callable[[Body], Sequence[Chart | Table]]


def scale_page(planning: Planning, site: Site) -> Page:
    replays = Replays("scale", planning.clock, planning.home, f"--requests={_SCALE_REQUESTS}")
    return _page(site, replays, "What breaks as it grows", "scale", ("latency_target_ms", "machines"), _scale_tables)


def cheaper_page(planning: Planning, site: Site) -> Page:
    replays = Replays("cheaper", planning.clock, planning.home, f"--requests={_CHEAPER_REQUESTS}")
    return _page(site, replays, "What would make it cheaper", "cheaper", ("ttl_s",), _cheaper_tables)


def _page(site: Site, replays: Replays, title: str, name: str, options: tuple[str, ...], tables_of: Show) -> Page:
    path = f"/plan/{name}"
    known = KNOWN | set(options)

    def ask(request: Request) -> tuple[Selection, asyncio.Task[Body]]:
        selection = site.selection(request, known, default_range="30d")
        more = {
            option.replace("_", "-"): str(_whole(selection.params[option], option))
            for option in options
            if option in selection.params
        }
        return selection, replays.ask(selection, more)

    async def show(request: Request) -> Response:
        selection, task = ask(request)
        await asyncio.wait({task}, timeout=_PATIENCE_S)
        found, trouble = None, ""
        if task.done():
            try:
                found = task.result()
            except InvalidRequest as error:
                trouble = error.message
        shown = [] if found is None else tables_of(found)
        assumed = found is not None and found.get("latency_target_provenance") == Provenance.ASSUMED
        known = Provenance.ASSUMED if assumed else None
        return site.answer(
            request,
            f"plan_{name}.html",
            shown=shown,
            selection=selection,
            found=found,
            trouble=trouble,
            target_known=known,
        )

    async def as_json(request: Request) -> Response:
        _, task = ask(request)
        return Response(msgspec.json.encode(await asyncio.shield(task)), media_type="application/json")

    return Page("Plan", title, path, [site.get(path, show), Route(f"/v1/plan/{name}", as_json, methods=["GET"])])


def _whole(text: str, name: str) -> int:
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= 10**9):
        raise InvalidRequest(f"{name}={text!r} must be a whole number from 1 to 1000000000", param=name)
    return int(text)


def _scale_tables(found: Body) -> Sequence[Chart | Table]:
    return (_breaks(found), _machines(found), _ladder(found))


def _breaks(found: Body) -> Table:
    return Table(
        name="breaks",
        title="What breaks, the first first",
        columns=(
            Column("What", "what", number=False),
            Column("At", "multiple"),
            Column("Held at", "held_at", wide=True),
            Column("Seen", "why", number=False),
        ),
        rows=tuple(
            (tables.text(each["name"]), _times(each["multiple"]), _times(each["held_at"]), tables.text(each["why"]))
            for each in found["breaks"]
        ),
        empty="Nothing breaks up to the largest multiple.",
        note="In multiples of the traffic's busiest stretch, on what there is now. Budgets and connections are"
        " arithmetic on receipts; the rest is simulated.",
    )


def _machines(found: Body) -> Table:
    return Table(
        name="machines",
        title="Machines that meet the latency target",
        columns=(
            Column("Traffic", "multiple"),
            Column("Requests a month", "requests_per_month", wide=True),
            Column("Machines", "machines"),
            Column("Busy", "utilization", wide=True),
            Column("95 in 100 wait", "p95_wait_ns"),
            Column("Receipts a month", "busy_cost_per_month_usd", wide=True),
            Column("Machines a month", "wall_cost_per_month_usd"),
        ),
        rows=tuple(
            (
                _times(each["multiple"]),
                tables.count(each["requests_per_month"]),
                _count_of(found, each["machines"]),
                _part(None if each["outcome"] is None else each["outcome"]["utilization"]),
                _time(each["p95_wait_ms"]),
                _money(each["busy_cost_per_month_usd"]),
                _money(each["wall_cost_per_month_usd"]),
            )
            for each in found["scaled"]
        ),
        note="As few as meet it. Receipts have the device time that is used; machines are up all month.",
    )


def _ladder(found: Body) -> Table:
    return Table(
        name="growth",
        title="On what there is now",
        columns=(
            Column("Traffic", "multiple"),
            Column("Busy", "utilization"),
            Column("KV memory", "kv_peak", wide=True),
            Column("Refused", "refused", wide=True),
            Column("Thrown out", "preemptions", wide=True),
            Column("Median time", "p50_total_ns", wide=True),
            Column("95 in 100 wait", "p95_wait_ns"),
        ),
        rows=tuple(
            (
                _times(each["multiple"]),
                _part(each["utilization"]),
                _part(each["kv_peak"]),
                tables.count(sum(each["refused"].values())),
                tables.count(each["preemptions"]),
                _time(None if each["latency_ms"]["total"] is None else each["latency_ms"]["total"]["p50"]),
                _time(each["p95_wait_ms"]),
            )
            for each in found["on_present_machines"]
        ),
    )


def _cheaper_tables(found: Body) -> Sequence[Chart | Table]:
    known = [each for each in found["levers"] if each["needs"] is None]
    columns = (
        Column("Lever", "lever", number=False),
        Column("Is on", "on", number=False, wide=True),
        Column("Touches", "touches", wide=True),
        Column("Saves", "saved_usd", wide=True),
        Column("Frees", "capacity_freed_usd", wide=True),
        Column("At least", "low_usd", wide=True),
        Column("At most", "high_usd", wide=True),
        Column("A month", "a_month_usd"),
        Column("Of all", "share", wide=True),
    )
    return (
        Table(
            name="levers",
            title=f"{found['requests']:,} answers, replayed through each lever",
            columns=columns,
            rows=tuple(_lever(each) for each in known),
            empty="Nothing to replay in this period.",
            note="Saves: money, of what is paid by the token. Frees: device time at its rate, on machines that are paid"
            " already. At least and at most are the ends of a 95% interval. Savings of several levers don't add up.",
        ),
        Table(
            name="realised",
            title="What levers that are on have saved",
            columns=(
                Column("Lever", "lever", number=False),
                Column("Answers", "answers"),
                Column("Saved", "saved_usd"),
            ),
            rows=tuple(
                (tables.text(each["name"]), tables.count(each["requests"]), _money(each["saved_usd"]))
                for each in found["realised"]
            ),
            empty="Receipts name no lever that has saved anything.",
            note="As receipts have it, against list price.",
        ),
        _measured(found),
    )


def _measured(found: Body) -> Table:
    return Table(
        name="measured",
        title="What they saved, against a random hold-out",
        columns=(
            Column("Lever", "lever", number=False),
            Column("With it", "requests_with", wide=True),
            Column("Without", "requests_without", wide=True),
            Column("Saved", "saved_usd"),
            Column("At least", "low_usd", wide=True),
            Column("At most", "high_usd", wide=True),
            Column("Predicted", "predicted_usd"),
        ),
        rows=tuple(_measured_row(each) for each in found["measured"]),
        empty="Nothing was held out: [holdout] share = 0.05 has one request in twenty go without routing, the response"
        " cache and marks for providers' caches, so that what they save is measured.",
        note="Saved: what requests with the lever would have cost more, had they cost what those without it did, on"
        " average; at least and at most are the ends of a 95% interval. Predicted: what receipts of the same requests"
        " say.",
    )


def _measured_row(each: Body) -> tuple[Cell, ...]:
    saved = each["saved_usd"]
    requests = (tables.count(each["requests_with"]), tables.count(each["requests_without"]))
    if saved is None:
        too_few = Cell(Figure("too few yet", "", "fewer than 30 drawings on one side"), None)
        return (tables.text(each["lever"]), *requests, too_few, _money(None), _money(None), _money(None))
    amounts = (_money(saved[end]) for end in ("expected", "low", "high"))
    return (tables.text(each["lever"]), *requests, *amounts, _money(each["predicted_usd"]))


def _lever(lever: Body) -> tuple[Cell, ...]:
    saved, freed = lever["saved_usd"], lever["capacity_freed_usd"]
    either = saved or freed or {"low": None, "high": None}
    monthly = [Money.from_usd(each["a_month"]) for each in (saved, freed) if each is not None]
    return (
        tables.text(lever["title"]),
        tables.text("yes" if lever["on"] else "no"),
        _part(lever["requests"] / lever["of"] if lever["of"] else None),
        _money(saved and saved["expected"]),
        _money(freed and freed["expected"]),
        _money(either["low"]),
        _money(either["high"]),
        tables.money(Money.total(monthly), Provenance.ESTIMATED),
        _part(lever["share"]),
    )


def _count_of(found: Body, machines: int | None) -> Cell:
    if found["elsewhere"]:
        return Cell(Figure("—", "", "it runs elsewhere, and is paid by the token"), None)
    return Cell(Figure("none do", "", "not even many more"), None) if machines is None else tables.count(machines)


def _times(multiple: float | None) -> Cell:
    return Cell(Figure("—" if multiple is None else f"{multiple:g}", "" if multiple is None else "x", ""), multiple)


def _part(part: float | None) -> Cell:
    return Cell(figures.percent(part), part)


def _time(ms: float | None) -> Cell:
    ns = None if ms is None else round(ms * NS_PER_MS)
    return tables.duration(ns, None if ns is None else Provenance.ESTIMATED)


def _money(usd: str | None) -> Cell:
    if usd is None:
        return Cell(Figure("—", "", ""), None)
    return tables.money(Money.from_usd(usd), Provenance.ESTIMATED)
