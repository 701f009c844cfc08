"""Plan: what breaks as it grows, and what would make it cheaper. The pages, and the same as JSON."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from millicent.core.clock import NS_PER_MS
from millicent.core.errors import InvalidRequest
from millicent.core.money import Money
from millicent.core.usage import Provenance
from millicent.dashboard.charts import Chart
from millicent.dashboard.figures import Figure
from millicent.dashboard.plan import Planning, told_as_json, whole
from millicent.dashboard.replays import KNOWN, Body, Replays
from millicent.dashboard.selection import Selection
from millicent.dashboard.site import Page, Site
from millicent.dashboard.tables import Cell, Column, Table, count, duration, if_any, money, part, table_of, text

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
        given = {option: whole(selection.params, option) for option in options}
        more = {name.replace("_", "-"): str(value) for name, value in given.items() if value is not None}
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
        return told_as_json(await asyncio.shield(task))

    return Page("Plan", title, path, [site.get(path, show), Route(f"/v1/plan/{name}", as_json, methods=["GET"])])


def _scale_tables(found: Body) -> Sequence[Chart | Table]:
    return (_breaks(found), _machines(found), _ladder(found))


def _breaks(found: Body) -> Table:
    breaks: Sequence[Body] = found["breaks"]
    return table_of(
        breaks,
        (Column("What", "what", number=False), lambda each: text(each["name"])),
        (Column("At", "multiple"), lambda each: _times(each["multiple"])),
        (Column("Held at", "held_at", wide=True), lambda each: _times(each["held_at"])),
        (Column("Seen", "why", number=False), lambda each: text(each["why"])),
        name="breaks",
        title="What breaks, the first first",
        empty="Nothing breaks up to the largest multiple.",
        note="In multiples of the traffic's busiest stretch, on what there is now. Budgets and connections are"
        " arithmetic on receipts; the rest is simulated.",
    )


def _machines(found: Body) -> Table:
    scaled: Sequence[Body] = found["scaled"]
    return table_of(
        scaled,
        (Column("Traffic", "multiple"), lambda each: _times(each["multiple"])),
        (Column("Requests a month", "requests_per_month", wide=True), lambda each: count(each["requests_per_month"])),
        (Column("Machines", "machines"), lambda each: _count_of(found, each["machines"])),
        (
            Column("Busy", "utilization", wide=True),
            lambda each: part(each["outcome"] and each["outcome"]["utilization"]),
        ),
        (Column("95 in 100 wait", "p95_wait_ns"), lambda each: _time(each["p95_wait_ms"])),
        (
            Column("Receipts a month", "busy_cost_per_month_usd", wide=True),
            lambda each: _money(each["busy_cost_per_month_usd"]),
        ),
        (Column("Machines a month", "wall_cost_per_month_usd"), lambda each: _money(each["wall_cost_per_month_usd"])),
        name="machines",
        title="Machines that meet the latency target",
        note="As few as meet it. Receipts have the device time that is used; machines are up all month.",
    )


def _ladder(found: Body) -> Table:
    ladder: Sequence[Body] = found["on_present_machines"]
    return table_of(
        ladder,
        (Column("Traffic", "multiple"), lambda each: _times(each["multiple"])),
        (Column("Busy", "utilization"), lambda each: part(each["utilization"])),
        (Column("KV memory", "kv_peak", wide=True), lambda each: part(each["kv_peak"])),
        (Column("Refused", "refused", wide=True), lambda each: count(sum(each["refused"].values()))),
        (Column("Thrown out", "preemptions", wide=True), lambda each: count(each["preemptions"])),
        (Column("Median time", "p50_total_ns", wide=True), lambda each: _median(each["latency_ms"]["total"])),
        (Column("95 in 100 wait", "p95_wait_ns"), lambda each: _time(each["p95_wait_ms"])),
        name="growth",
        title="On what there is now",
    )


def _cheaper_tables(found: Body) -> Sequence[Chart | Table]:
    known = [each for each in found["levers"] if each["needs"] is None]
    realised: Sequence[Body] = found["realised"]
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
        table_of(
            realised,
            (Column("Lever", "lever", number=False), lambda each: text(each["name"])),
            (Column("Answers", "answers"), lambda each: count(each["requests"])),
            (Column("Saved", "saved_usd"), lambda each: _money(each["saved_usd"])),
            name="realised",
            title="What levers that are on have saved",
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
    requests = (count(each["requests_with"]), count(each["requests_without"]))
    if saved is None:
        too_few = Cell(Figure("too few yet", "", "fewer than 30 drawings on one side"), None)
        return (text(each["lever"]), *requests, too_few, _money(None), _money(None), _money(None))
    amounts = (_money(saved[end]) for end in ("expected", "low", "high"))
    return (text(each["lever"]), *requests, *amounts, _money(each["predicted_usd"]))


def _lever(lever: Body) -> tuple[Cell, ...]:
    saved, freed = lever["saved_usd"], lever["capacity_freed_usd"]
    either = saved or freed or {"low": None, "high": None}
    monthly = [Money.from_usd(each["a_month"]) for each in (saved, freed) if each is not None]
    return (
        text(lever["title"]),
        text("yes" if lever["on"] else "no"),
        part(lever["requests"] / lever["of"] if lever["of"] else None),
        _money(saved and saved["expected"]),
        _money(freed and freed["expected"]),
        _money(either["low"]),
        _money(either["high"]),
        money(Money.total(monthly), Provenance.ESTIMATED),
        part(lever["share"]),
    )


def _count_of(found: Body, machines: int | None) -> Cell:
    if found["elsewhere"]:
        return Cell(Figure("—", "", "it runs elsewhere, and is paid by the token"), None)
    return Cell(Figure("none do", "", "not even many more"), None) if machines is None else count(machines)


def _times(multiple: float | None) -> Cell:
    return Cell(Figure("—" if multiple is None else f"{multiple:g}", "" if multiple is None else "x", ""), multiple)


def _time(ms: float | None) -> Cell:
    ns = None if ms is None else round(ms * NS_PER_MS)
    return duration(ns, None if ns is None else Provenance.ESTIMATED)


def _median(latency: Body | None) -> Cell:
    return _time(None if latency is None else latency["p50"])


def _money(usd: str | None) -> Cell:
    return if_any(None if usd is None else Money.from_usd(usd), Provenance.ESTIMATED)
