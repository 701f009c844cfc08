"""A varied set of receipts, a ledger that answers from memory, and a server with a stand-in for the public API."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import msgspec
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Route
from starlette.testclient import TestClient

from millicent.core.accounts import Account
from millicent.core.clock import NS_PER_HOUR, NS_PER_MS, NS_PER_S, Clock, ManualClock, SystemClock, hour_start_ns
from millicent.core.money import Money
from millicent.core.receipts import (
    Accelerator,
    Attempt,
    Line,
    Meter,
    PriceSource,
    Receipt,
    Role,
    Status,
    Timing,
)
from millicent.core.request import Attribution
from millicent.core.usage import Count, Leaf, Provenance, Usage
from millicent.dashboard.figures import total_provenance
from millicent.dashboard.routes import dashboard_routes
from millicent.ledger.queries import GroupBy, ReceiptFilter, ReceiptPage, Totals
from support.pages import site_of

HOSTILE = "<script>alert('user')</script>"
RATE = Decimal("0.10")  # dollars per hour
CHROMIUM = Path("/usr/bin/chromium")


@dataclass
class MemoryQueries:
    """The ledger's questions, answered from two lists that a test may change at any time."""

    rows: list[Receipt]
    hours: list[Account] = field(default_factory=list)

    def receipt(self, receipt_id: str) -> Receipt | None:
        return next((row for row in self.rows if row.id == receipt_id), None)

    def _matching(self, where: ReceiptFilter) -> list[Receipt]:
        def matches(row: Receipt) -> bool:
            who = ("key", "team", "user", "feature", "tier", "conversation", "run")
            return (
                all(getattr(where, name) in {None, getattr(row.attribution, name)} for name in who)
                and where.model in {None, row.model}
                and where.status in {None, row.status}
                and (where.from_ns is None or row.created_at_ns >= where.from_ns)
                and (where.to_ns is None or row.created_at_ns < where.to_ns)
            )

        return sorted((row for row in self.rows if matches(row)), key=lambda row: row.id, reverse=True)

    def receipts(self, where: ReceiptFilter, *, limit: int = 50, after: str | None = None) -> ReceiptPage:
        rows = [row for row in self._matching(where) if after is None or row.id < after]
        return ReceiptPage(tuple(rows[:limit]), rows[limit - 1].id if len(rows) > limit else None)

    def totals(self, by: GroupBy, where: ReceiptFilter, book: str = "actual", *, zone: str = "UTC") -> list[Totals]:
        assert book == "actual"
        groups: dict[str | None, list[Receipt]] = {}
        for row in self._matching(where):
            if row.status is not None:
                top = {"model": row.model, "status": row.status.value, "placement": row.placement}
                if by in ("day", "hour"):
                    top[by] = _label(row.created_at_ns, by, zone)
                groups.setdefault(top[by] if by in top else getattr(row.attribution, by), []).append(row)
        return [
            Totals(
                group=group,
                requests=len(rows),
                input_tokens=sum(row.usage.input_tokens or 0 for row in rows),
                output_tokens=sum(row.usage.output_tokens or 0 for row in rows),
                serving_ns=sum(row.accelerator.serving_ns for row in rows),
                cost=Money.total(row.total for row in rows if row.total is not None),
                unpriced=sum(row.total is None for row in rows),
                assumed=sum(row.total is not None and total_provenance(row) is Provenance.ASSUMED for row in rows),
                unknown_usage=sum(None in {row.usage.input_tokens, row.usage.output_tokens} for row in rows),
            )
            for group, rows in groups.items()
        ]

    def accounts(self, from_ns: int, to_ns: int) -> list[Account]:
        return [hour for hour in self.hours if from_ns <= hour.hour_ns < to_ns]


def _label(at_ns: int, by: str, zone: str) -> str:
    """As the ledger calls a day or an hour."""
    at = datetime.fromtimestamp(at_ns // NS_PER_S, ZoneInfo(zone))
    return f"{at:%Y-%m-%d}" if by == "day" else f"{at:%Y-%m-%dT%H}:00:00{at.isoformat()[19:].replace('+00:00', 'Z')}"


def make_receipt(number: int, at_ns: int, **changes: object) -> Receipt:
    """A local answer that went well; `changes` replace its fields."""
    output = 20 + number * 7 % 90
    prefill_ns, decode_ns = 18_250_113 + number * 1013, output * 3_104_977
    serving = Decimal(prefill_ns + decode_ns)
    price = RATE / 3600
    end_ns = at_ns + prefill_ns + decode_ns * 3 + 4_200_000
    receipt = Receipt(
        id=f"rcpt_{number:026d}",
        created_at_ns=at_ns,
        settled_at_ns=end_ns,
        status=Status.SUCCEEDED,
        model="smollm2:135m",
        served_model="smollm2:135m",
        placement="cpu",
        backend="local",
        dialect="openai",
        stream=True,
        finish_reason="stop",
        attribution=Attribution(user="ada", team="search", feature="summaries", tier="pro"),
        usage=Usage.of(Provenance.MEASURED, input_fresh=31 + number % 40, output_text=output),
        timing=Timing(4_200_000, 4_200_000 + prefill_ns, decode_ns * 3 // (output - 1), end_ns - at_ns),
        accelerator=Accelerator(
            prefill_ns + decode_ns, prefill_ns, decode_ns, output + 1, (output + 1) * 3 - 7, Provenance.MEASURED
        ),
        lines=(
            Line(
                1,
                Role.INFERENCE,
                Meter.ACCELERATOR,
                serving / NS_PER_S,
                "s",
                price,
                Money.price(serving / NS_PER_S, price),
                Provenance.ASSUMED,
                end_ns,
                end_ns,
            ),
        ),
        attempts=(Attempt(1, "local", "cpu", "smollm2:135m", Role.INFERENCE, at_ns, end_ns, Status.SUCCEEDED),),
        hold=Money.from_usd("0.0004"),
        prices=PriceSource("placement cpu", {"usd_per_hour": str(RATE)}),
    )
    return msgspec.structs.replace(receipt, **changes)


def _api_lines(at_ns: int) -> tuple[Line, ...]:
    def line(attempt: int, role: Role, meter: Meter, quantity: int, price: str, known: Provenance) -> Line:
        unit_price = Decimal(price)
        amount = Money.price(quantity, unit_price)
        return Line(attempt, role, meter, Decimal(quantity), "tokens", unit_price, amount, known, at_ns, at_ns)

    refund = Line(
        2,
        Role.ADJUSTMENT,
        Meter.OTHER,
        Decimal(1),
        "entry",
        None,
        Money.from_usd("-0.0125"),
        Provenance.REPORTED,
        at_ns,
        at_ns + 3 * NS_PER_HOUR,
        note="Credit for the first attempt, invoice 2026-07",
    )
    return (
        line(1, Role.INFERENCE, Meter.INPUT, 9_000, "0.0000025", Provenance.REPORTED),
        line(2, Role.RETRY, Meter.INPUT, 1_000, "0.0000025", Provenance.REPORTED),
        line(2, Role.RETRY, Meter.INPUT_CACHED, 8_000, "0.00000125", Provenance.REPORTED),
        line(2, Role.RETRY, Meter.OUTPUT, 1_812, "0.00001", Provenance.COUNTED),
        refund,
    )


def _retried(api_at: int) -> dict[str, object]:
    """A provider's answer whose first attempt failed, with a later credit."""
    return {
        "model": "gpt-large",
        "served_model": "gpt-large-2026-05-01",
        "placement": "openai",
        "backend": "openai-compatible",
        "attribution": Attribution(key="key_web", user="grace", team="support", feature="answers", tags={"ab": "b"}),
        "usage": Usage(
            {
                Leaf.INPUT_FRESH: Count(10_000, Provenance.REPORTED),
                Leaf.INPUT_CACHE_READ: Count(8_000, Provenance.REPORTED),
                Leaf.OUTPUT_TEXT: Count(1_812, Provenance.COUNTED),
            }
        ),
        "accelerator": Accelerator(),
        "lines": _api_lines(api_at),
        "saved": {"prefix_cache": Money.from_usd("0.01")},
        "list_price": Money.from_usd("0.0706"),
        "prices": PriceSource("genai-prices 0.0.36", {"input": "2.5 / M", "cached": "1.25 / M", "output": "10 / M"}),
        "attempts": (
            Attempt(
                1,
                "openai-compatible",
                "openai",
                "gpt-large",
                Role.INFERENCE,
                api_at,
                api_at + 812 * NS_PER_MS,
                Status.FAILED,
                "upstream closed the connection",
            ),
            Attempt(
                2,
                "openai-compatible",
                "openai",
                "gpt-large",
                Role.RETRY,
                api_at + 900 * NS_PER_MS,
                api_at + 9_300 * NS_PER_MS,
                Status.SUCCEEDED,
            ),
        ),
        "timing": Timing(2_100_000, 1_420 * NS_PER_MS, 4_350_000, 9_312 * NS_PER_MS),
    }


def varied_receipts(now_ns: int) -> list[Receipt]:
    """One of each kind a ledger may hold, among ordinary ones."""

    def at(minutes: int) -> int:
        return now_ns - minutes * 60 * NS_PER_S - 123_456_789

    ordinary = [make_receipt(n, at(90 - n)) for n in range(1, 31)]
    nobody = {"usage": Usage(), "accelerator": Accelerator(), "lines": (), "attempts": ()}
    unpriced = tuple(msgspec.structs.replace(ordinary[0].lines[0], unit_price_usd=None, amount=None) for _ in range(1))
    unknown = {Leaf.INPUT_FRESH: Count(204, Provenance.COUNTED), Leaf.OUTPUT_TEXT: Count(None, Provenance.UNKNOWN)}
    hostile = Attribution(user=HOSTILE, feature='"><img src=x onerror=alert(1)>', tags={"<b>": "&amp;"})
    open_fields = {"settled_at_ns": None, "status": None, "finish_reason": None, "timing": Timing(), "lines": ()}
    failed = {"status": Status.FAILED, "finish_reason": "error", "error": "the engine process ended while this ran"}
    cut_off = {"status": Status.INTERRUPTED, "finish_reason": None, "error": "cut off by a crash; closed by recovery"}
    return [
        *ordinary,
        make_receipt(41, at(40), **_retried(at(40))),
        make_receipt(42, at(30), **failed, attribution=Attribution()),
        make_receipt(43, at(26), status=Status.CANCELLED, finish_reason="cancelled"),
        make_receipt(44, at(22), **cut_off),
        make_receipt(
            45, at(18), status=Status.REFUSED, finish_reason=None, hold=None, error="budget 'web' is spent", **nobody
        ),
        make_receipt(46, at(15), lines=unpriced, placement="lab", attribution=Attribution(feature="nightly-eval")),
        make_receipt(47, at(12), usage=Usage(unknown), accelerator=Accelerator()),
        make_receipt(48, at(9), attribution=hostile),
        make_receipt(49, at(5), attribution=Attribution(user="=HYPERLINK(0)", feature="summaries")),
        make_receipt(50, now_ns - 3 * NS_PER_S, **open_fields),
    ]


def varied_accounts(now_ns: int) -> list[Account]:
    def account(
        ago: int, device: str, placement: str, wall_s: int, parts_s: tuple[int, ...], **rate: object
    ) -> Account:
        odd_ns = 137_911  # nanoseconds that only an exact sum keeps
        serving, overhead, lost, down = (part * NS_PER_S for part in parts_s)
        known = {"usd_per_hour": RATE, "rate_provenance": Provenance.ASSUMED} | rate
        return msgspec.structs.replace(
            Account(
                device=device,
                placement=placement,
                hour_ns=hour_start_ns(now_ns) - ago * NS_PER_HOUR,
                accelerators=1,
                wall_ns=wall_s * NS_PER_S,
                serving_ns=serving + odd_ns,
                overhead_ns=overhead,
                lost_ns=lost,
                idle_ns=wall_s * NS_PER_S - serving - overhead - lost - down - odd_ns,
                down_ns=down,
                usd_per_hour=None,
                rate_provenance=Provenance.UNKNOWN,
                cost=Money.from_usd(RATE * wall_s / 3600),
            ),
            **known,
        )

    return [
        account(0, "cpu", "cpu", 1260, (402, 0, 0, 0)),
        account(1, "cpu", "cpu", 3600, (1810, 12, 3, 25)),
        account(2, "cpu", "cpu", 3600, (220, 0, 0, 0)),
        account(3, "cpu", "cpu", 1804, (12, 640, 0, 0)),
        account(
            1,
            "cuda:0",
            "lab",
            3600,
            (3100, 200, 0, 0),
            usd_per_hour=None,
            rate_provenance=Provenance.UNKNOWN,
            cost=None,
        ),
    ]


@dataclass
class FakeApi:
    """Answers as the public API does. The last message's text chooses what happens."""

    rows: list[Receipt]
    clock: Clock
    calls: list[dict[str, object]] = field(default_factory=list)
    seen: Counter[str] = field(default_factory=Counter)
    cancelled: int = 0

    def routes(self) -> list[BaseRoute]:
        return [
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/receipts/{id}", self.receipt),
        ]

    async def chat(self, request: Request) -> Response:
        body = await request.json()
        self.calls.append({"body": body, "headers": dict(request.headers)})
        text = body["messages"][-1]["content"]
        self.seen[text] += 1
        if text == "busy" and self.seen[text] == 1:
            error = {"error": {"message": "the queue is full; try again", "type": "service_unavailable"}}
            return JSONResponse(error, 503, headers={"Retry-After": "1"})
        if text == "locked" and request.headers.get("authorization") != "Bearer mk_test":
            return JSONResponse({"error": {"message": "this server requires an API key"}}, 401)
        receipt = make_receipt(100 + len(self.calls), self.clock.now_ns())
        receipt = msgspec.structs.replace(receipt, attribution=Attribution(feature="chat-page"))
        stream = self._stream(receipt, text)
        return StreamingResponse(stream, media_type="text/event-stream", headers={"X-Millicent-Receipt": receipt.id})

    async def _stream(self, receipt: Receipt, text: str) -> AsyncIterator[str]:
        words = {
            "hostile": ["<img src=x onerror=", "alert(1)>\n\n", "```html\n<script>", "alert(2)</script>\n```\n", "end"],
            "slow": [f"word{n} " for n in range(10_000)],
            "broken": ["half an ", "answer"],
        }.get(text, ["A millicent ", "is a thousandth ", "of a cent.\n\n", "Paragraph ", "two."])
        cost = None if text == "unpriced" else 0.0
        finished = False
        try:
            for number, word in enumerate(words, 1):
                usage = {"prompt_tokens": 12, "completion_tokens": number, "cost": cost and number * 1e-6}
                if text != "unpriced":
                    usage["cost"] = round(number * 1e-6, 9)
                yield _event({"choices": [{"index": 0, "delta": {"content": word}}], "usage": usage})
                await asyncio.sleep(0.03)
            if text == "broken":
                return
            last = {"prompt_tokens": 12, "completion_tokens": len(words), "cost": None if cost is None else 0.0000042}
            finish = [{"index": 0, "delta": {}, "finish_reason": "stop"}]
            yield _event({"choices": finish, "usage": last})
            yield _event({"choices": [], "usage": last})
            yield "data: [DONE]\n\n"
            finished = True
        finally:
            self.cancelled += not finished
            status = Status.SUCCEEDED if finished else Status.CANCELLED
            self.rows.append(msgspec.structs.replace(receipt, status=status))

    async def receipt(self, request: Request) -> Response:
        found = next((row for row in self.rows if row.id == request.path_params["id"]), None)
        if found is None:
            return JSONResponse({"error": {"message": "no such receipt"}}, 404)
        return JSONResponse({"id": found.id, "settled_at": "2026-01-01T00:00:00Z", "total_usd": str(found.total)})


def _event(chunk: dict[str, object]) -> str:
    return f"data: {json.dumps(chunk)}\n\n"


def make_app(queries: MemoryQueries, api: FakeApi, clock: Clock) -> Starlette:
    site = site_of(queries, clock, models=lambda: ["smollm2:135m", "gpt-large"])
    return Starlette(routes=[*dashboard_routes(site), *api.routes()])


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock(start_ns=1_767_225_600 * NS_PER_S + 21 * 60 * NS_PER_S)


@pytest.fixture
def receipts(clock: ManualClock) -> list[Receipt]:
    """The ledger's receipts; a test may add to them or clear them."""
    return varied_receipts(clock.now_ns())


@pytest.fixture
def accounts(clock: ManualClock) -> list[Account]:
    return varied_accounts(clock.now_ns())


@pytest.fixture
def queries(receipts: list[Receipt], accounts: list[Account]) -> MemoryQueries:
    return MemoryQueries(receipts, accounts)


@pytest.fixture
def client(queries: MemoryQueries, receipts: list[Receipt], clock: ManualClock) -> Iterator[TestClient]:
    app = make_app(queries, FakeApi(receipts, clock), clock)
    with TestClient(app, base_url="http://127.0.0.1:8080") as client:
        yield client


@pytest.fixture
def live_receipts() -> list[Receipt]:
    return varied_receipts(SystemClock().now_ns())


@pytest.fixture
def api(live_receipts: list[Receipt]) -> FakeApi:
    return FakeApi(live_receipts, SystemClock())


@pytest.fixture
def origin(live_receipts: list[Receipt], api: FakeApi) -> Iterator[str]:
    """The address of a real server on a free loopback port."""
    clock = SystemClock()
    queries = MemoryQueries(live_receipts, varied_accounts(clock.now_ns()))
    yield from serve(make_app(queries, api, clock), 0)


def serve(app: Starlette, port: int) -> Iterator[str]:
    listener = socket.create_server(("127.0.0.1", port))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", ws="none", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    server.should_exit = True
    thread.join(60)
    listener.close()


@pytest.fixture(scope="session")
def chromium() -> str:
    if not CHROMIUM.exists():
        pytest.skip(f"there is no Chromium at {CHROMIUM}")
    return str(CHROMIUM)


@pytest.fixture(scope="module")
def browser(chromium: str) -> Iterator[Any]:
    from playwright import sync_api

    flags = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync"]
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=flags)
        yield browser
        browser.close()


@pytest.fixture
def serving() -> Callable[[Starlette], AbstractContextManager[str]]:
    """Any application on a free loopback port, for as long as its context lasts."""
    return contextmanager(lambda app: serve(app, 0))
