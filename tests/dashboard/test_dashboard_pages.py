from __future__ import annotations

import html
import re
from collections.abc import Callable
from decimal import Decimal
from urllib.parse import parse_qsl

import msgspec
import pytest
from starlette.testclient import TestClient

from millicent.core.accounts import Account
from millicent.core.clock import NS_PER_HOUR, ManualClock, iso_utc, parse_time_ns
from millicent.core.errors import LedgerUnavailable
from millicent.core.money import Money
from millicent.core.receipts import Receipt, Status
from millicent.dashboard.overview import over_time
from millicent.dashboard.selection import TIMES, parse
from millicent.dashboard.site import Queries
from millicent.ledger.queries import GroupBy, ReceiptFilter, ReceiptPage, Totals
from millicent.ledger.zones import labels
from support.pages import exported, pages_of, site_of, words

PAGES = ["/", "/chat", "/receipts", "/receipts/rows", "/accounts", "/receipts/rcpt_none", "/receipts?colour=red"]


def receipt_ids(page: str) -> list[str]:
    return re.findall(r'data-receipt="([^"]+)"', page)


@pytest.mark.parametrize("path", [*PAGES, "/static/pages.css", "/static/chat.js", "/receipts.csv", "/receipts.json"])
def test_every_answer_carries_the_strict_security_headers(client: TestClient, path: str) -> None:
    headers = client.get(path).headers
    assert "default-src 'self'" in headers["content-security-policy"]
    assert "frame-ancestors 'none'" in headers["content-security-policy"]
    assert "unsafe" not in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "same-origin"


@pytest.mark.parametrize("path", PAGES)
def test_no_page_has_inline_script_or_style_or_anything_from_elsewhere(client: TestClient, path: str) -> None:
    page = client.get(path).text
    assert not re.findall(r"<script(?![^>]*\bsrc=\"/static/)", page)
    assert not re.findall(r"<style|\sstyle=|\son[a-z]+=\"", page)
    assert not re.findall(r"(?:src|href)=\"(?:https?:)?//", page)


def test_what_a_caller_named_itself_is_shown_as_text_on_every_page(client: TestClient, receipts: list[Receipt]) -> None:
    hostile = next(receipt for receipt in receipts if "<script>" in (receipt.attribution.user or ""))
    for path in ("/", "/receipts", "/receipts?by=user", f"/receipts/{hostile.id}", "/receipts?user=<script>x"):
        page = client.get(path).text
        assert "<script>alert" not in page
        assert "<script>x" not in page
        assert "<img src=x" not in page
    assert "&lt;script&gt;alert" in client.get(f"/receipts/{hostile.id}").text


def test_the_overview_tells_totals_by_feature_and_model_and_each_is_a_filter(client: TestClient) -> None:
    page = client.get("/").text
    assert 'href="/?feature=summaries"' in page
    assert 'href="/?model=gpt-large"' in page
    filtered = client.get("/?feature=answers")
    assert len(receipt_ids(filtered.text)) == 1
    assert "4.06 cents" in words(filtered.text)


def test_what_is_assumed_unpriced_unattributed_or_unknown_is_said_with_what_to_do(client: TestClient) -> None:
    text = words(client.get("/receipts/rows").text)
    assert "Rate assumed: $0.10 /hour for this machine" in text
    assert "set [placements.cpu] usd_per_hour" in text
    assert "2 receipts are unpriced and not in the cost" in text
    assert "1 receipt names no feature; send X-Millicent-Feature" in text
    assert "1 receipt has token counts that nobody reported" in text


def test_an_empty_ledger_says_how_to_make_the_first_call(client: TestClient, receipts: list[Receipt]) -> None:
    receipts.clear()
    text = words(client.get("/").text)
    assert "curl http://127.0.0.1:8080/v1/chat/completions" in text
    assert '"model": "smollm2:135m"' in text
    assert "No receipts match" in client.get("/receipts").text


def test_a_selection_without_receipts_is_told_apart_from_an_empty_ledger(client: TestClient) -> None:
    text = words(client.get("/?feature=nobody").text)
    assert "No receipts in this selection" in text
    assert "No receipts yet" not in text


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("user=grace", 1),
        ("team=support", 1),
        ("key=key_web", 1),
        ("status=cancelled", 1),
        ("status=failed&feature=summaries", 0),
        ("model=gpt-large&range=1h", 1),
        ("feature=&status=&user=", 40),
    ],
)
def test_receipts_are_filtered_by_what_the_address_says(client: TestClient, query: str, expected: int) -> None:
    response = client.get(f"/receipts?{query}")
    assert response.status_code == 200
    assert len(receipt_ids(response.text)) == expected


def test_times_in_the_address_bound_the_receipts_to_the_exclusive_end(
    client: TestClient, receipts: list[Receipt]
) -> None:
    at_ns = receipts[30].created_at_ns
    microseconds_only = at_ns - at_ns % 1000
    from_text, to_text = iso_utc(microseconds_only), iso_utc(microseconds_only + 1000)
    assert receipt_ids(client.get("/receipts", params={"from": from_text, "to": to_text}).text) == [receipts[30].id]
    assert receipt_ids(client.get("/receipts", params={"from": to_text, "to": to_text}).text) == []
    with_offset = from_text.replace("Z", "+00:00")
    assert receipt_ids(client.get("/receipts", params={"from": with_offset, "to": to_text}).text) == [receipts[30].id]


@pytest.mark.parametrize(
    ("query", "now", "begins"),
    [
        ("range=1h", "2026-03-30T10:07:08Z", "2026-03-30T09:07:08Z"),
        ("range=24h", "2026-03-30T10:07:08Z", "2026-03-29T10:00:00Z"),
        ("range=7d", "2026-03-30T10:07:08Z", "2026-03-23T00:00:00Z"),
        ("range=30d", "2026-03-30T10:07:08Z", "2026-02-28T00:00:00Z"),
        ("range=7d&zone=Asia/Kolkata", "2026-03-30T20:00:00Z", "2026-03-23T18:30:00Z"),
        # Berlin's clocks went ahead between that midnight and now.
        ("range=7d&zone=Europe/Berlin", "2026-03-30T10:07:08Z", "2026-03-22T23:00:00Z"),
    ],
)
def test_a_week_begins_with_a_day_of_the_zone_and_a_day_with_a_quarter_hour(query: str, now: str, begins: str) -> None:
    found = parse(parse_qsl(query), TIMES, now_ns=parse_time_ns(now), default_range="24h")
    assert found.where.from_ns == parse_time_ns(begins)
    assert found.where.to_ns is None


@pytest.mark.parametrize("path", ["/", "/receipts", "/accounts", "/receipts.json"])
@pytest.mark.parametrize(
    "query", ["from=0001-01-01&zone=Asia/Tokyo", "to=9999-12-31T23:59:59&zone=America/New_York", "from=9999-12-31"]
)
def test_a_time_that_no_receipt_can_have_is_said_to_be_none(client: TestClient, path: str, query: str) -> None:
    answer = client.get(f"{path}?{query}")
    assert answer.status_code == 400
    assert "is not a time" in answer.text


@pytest.mark.parametrize(
    ("query", "told"),
    [
        ("colour=red", "unknown parameter 'colour'"),
        ("status=fine", "status='fine' is not known; use one of succeeded"),
        ("range=3d", "range='3d' is not known; use one of 1h"),
        ("from=yesterday", "from='yesterday' is not a time; write it as"),
        ("limit=0", "limit='0' must be a whole number from 1 to 500"),
        ("limit=x", "limit='x' must be"),
        ("user=a&user=b", "parameter 'user' stands twice"),
    ],
)
def test_an_address_that_cannot_be_read_says_what_was_wrong_and_what_to_write(
    client: TestClient, query: str, told: str
) -> None:
    for path in ("/receipts", "/receipts.csv", "/receipts.json"):
        response = client.get(f"{path}?{query}")
        assert response.status_code == 400
        assert told.lower() in words(response.text).lower()
    assert client.get(f"/receipts.json?{query}").json()["error"]["param"] == query.partition("=")[0]


def test_totals_are_grouped_by_what_the_address_says(client: TestClient) -> None:
    assert 'href="/receipts?by=user&amp;user=grace"' in client.get("/receipts?by=user").text
    refused = client.get("/receipts?by=colour")
    assert refused.status_code == 400
    assert "by='colour' is not known; use one of feature" in html.unescape(refused.text).lower()


@pytest.mark.parametrize(
    "path", ["/?by=user", "/?limit=5", "/receipts/rows?after=x", "/receipts.csv?by=user", "/accounts?user=a"]
)
def test_a_parameter_that_a_page_would_not_honour_is_refused_by_name(client: TestClient, path: str) -> None:
    response = client.get(path)
    assert response.status_code == 400
    assert "unknown parameter" in response.text.lower()


def test_pages_follow_each_other_by_address_without_gap_or_repetition(
    client: TestClient, receipts: list[Receipt]
) -> None:
    seen: list[str] = []
    path: str | None = "/receipts?limit=7&status=succeeded"
    while path is not None:
        page = client.get(path).text
        seen += receipt_ids(page)
        older = re.search(r'rel="next" href="([^"]+)"', page)
        path = html.unescape(older[1]) if older else None
        assert path is None or "status=succeeded" in path
    wanted = [receipt.id for receipt in receipts if receipt.status is Status.SUCCEEDED]
    assert seen == sorted(wanted, reverse=True)


def test_csv_and_json_are_the_same_selection_with_the_same_values(client: TestClient) -> None:
    for query in ("", "?feature=summaries", "?status=cancelled", "?limit=5", "?feature=nobody", "?user=grace&range=7d"):
        rows = client.get(f"/receipts.json{query}").json()["data"]
        table = exported(client, f"/receipts.csv{query}")
        assert [row["id"] for row in rows] == [row["id"] for row in table]
        assert [row["id"] for row in rows] == receipt_ids(client.get(f"/receipts{query}").text)
        for row, cells in zip(rows, table, strict=True):
            as_text = {name: "" if cell is None else cell for name, cell in row.items()}
            as_text |= {name: str(cell).lower() for name, cell in row.items() if isinstance(cell, bool)}
            assert {name: str(cell) for name, cell in as_text.items()} == {
                name: cell.removeprefix("'") for name, cell in cells.items()
            }


def test_the_export_holds_exact_dollars_and_never_a_zero_for_what_is_unpriced(
    client: TestClient, receipts: list[Receipt]
) -> None:
    by_id = {row["id"]: row for row in client.get("/receipts.json").json()["data"]}
    assert len(by_id) == len(receipts)
    for receipt in receipts:
        usd = by_id[receipt.id]["total_usd"]
        assert (None if usd is None else Money.from_usd(Decimal(usd))) == receipt.total
    assert by_id[receipts[36].id]["output_tokens"] is None


def test_an_exports_limit_says_where_to_go_on(client: TestClient, receipts: list[Receipt]) -> None:
    first = client.get("/receipts.json?limit=15").json()
    assert (first["object"], first["has_more"], len(first["data"])) == ("list", True, 15)
    rest = client.get(f"/receipts.json?after={first['next']}").json()
    assert (rest["has_more"], rest["next"]) == (False, None)
    ids = [row["id"] for row in first["data"] + rest["data"]]
    assert ids == sorted((receipt.id for receipt in receipts), reverse=True)


def test_a_spreadsheet_does_not_run_what_a_caller_named_itself(client: TestClient) -> None:
    table = client.get("/receipts.csv?user==HYPERLINK(0)").text
    assert ",'=HYPERLINK(0)," in table


def test_a_receipt_in_full_shows_lines_that_add_up_to_its_amount(client: TestClient, receipts: list[Receipt]) -> None:
    receipt = receipts[30]
    page = client.get(f"/receipts/{receipt.id}").text
    lines = page[page.index('id="lines"') : page.index('id="time"')]
    amounts = [Decimal(text) for text in re.findall(r'<td class="num">(-?[\d,.]+)</td></tr>', lines)]
    assert receipt.total is not None
    assert len(amounts) == len(receipt.lines) + 1
    assert sum(amounts[:-1]) == amounts[-1] == receipt.total.usd
    assert min(amounts) < 0
    assert {str(amount.as_tuple().exponent) for amount in amounts} == {"-5"}
    assert f'href="/v1/receipts/{receipt.id}"' in page
    text = words(page)
    for told in ("4.06 cents", "upstream closed the connection", "Credit for the first attempt", "genai-prices 0.0.36"):
        assert told in text


def test_an_open_receipt_says_so_and_follows_its_answer(client: TestClient, receipts: list[Receipt]) -> None:
    page = client.get(f"/receipts/{receipts[-1].id}").text
    assert 'data-open="true"' in page
    assert "/static/receipt.js" in page
    assert "Running for 3.00 s , and held to at most 40 millicents" in words(page)
    closed = client.get(f"/receipts/{receipts[0].id}").text
    assert "/static/receipt.js" not in closed


@pytest.mark.parametrize(
    ("number", "told"),
    [
        (42, "the engine process ended while this ran"),
        (44, "cut off by a crash; closed by recovery"),
        (45, "Nothing ran, so there is nothing to pay."),
        (46, "Set [placements.lab] usd_per_hour"),
        (47, "Unknown: the backend shows no steps."),
    ],
)
def test_each_kind_of_receipt_says_what_happened(client: TestClient, number: int, told: str) -> None:
    assert told in words(client.get(f"/receipts/rcpt_{number:026d}").text)


def test_a_receipt_that_is_not_there_is_a_designed_page(client: TestClient) -> None:
    response = client.get("/receipts/rcpt_none")
    assert response.status_code == 404
    assert "There is no receipt 'rcpt_none' in this ledger" in words(response.text)
    assert 'href="/receipts"' in response.text


def test_accounts_show_the_equality_and_its_check(client: TestClient, accounts: list[Account]) -> None:
    page = client.get("/accounts").text
    assert page.count('class="ok"') == len(accounts) + 2
    assert 'class="bad"' not in page
    assert 'title="402,000,137,911 ns">402.000' in page
    assert "so far" in words(page)


def test_an_hour_that_does_not_balance_is_marked(client: TestClient, accounts: list[Account]) -> None:
    accounts[0] = msgspec.structs.replace(accounts[0], idle_ns=accounts[0].idle_ns + 1)
    page = client.get("/accounts").text
    assert page.count('class="bad"') == 2


def test_accounts_of_several_accelerators_balance_against_all_of_them(
    client: TestClient, accounts: list[Account]
) -> None:
    one = accounts[1]
    accounts[:] = [msgspec.structs.replace(one, accelerators=2, idle_ns=one.idle_ns + one.wall_ns)]
    page = client.get("/accounts").text
    assert 'class="bad"' not in page
    assert "7,200.000" in page


def test_no_device_time_is_told_with_what_begins_it(client: TestClient, accounts: list[Account]) -> None:
    accounts.clear()
    assert "Accounts begin when the server starts an engine" in words(client.get("/accounts").text)


def test_an_assumed_rate_is_not_told_once_the_device_is_long_gone(
    client: TestClient, accounts: list[Account], clock: ManualClock
) -> None:
    clock.advance(3 * NS_PER_HOUR)
    assert "Rate assumed" not in client.get("/receipts/rows").text


class _Unreachable:
    """A ledger that cannot be read."""

    def _raise(self) -> LedgerUnavailable:
        return LedgerUnavailable("the ledger's disk is full; free some space", retry_after_s=5)

    def receipt(self, receipt_id: str) -> Receipt | None:
        raise self._raise()

    def receipts(self, where: ReceiptFilter, *, limit: int = 50, after: str | None = None) -> ReceiptPage:
        raise self._raise()

    def totals(self, by: GroupBy, where: ReceiptFilter, book: str = "actual", *, zone: str = "UTC") -> list[Totals]:
        raise self._raise()

    def accounts(self, from_ns: int, to_ns: int) -> list[Account]:
        raise self._raise()


class _Stale(_Unreachable):
    def accounts(self, from_ns: int, to_ns: int) -> list[Account]:
        return []


def _client(queries: Queries, clock: ManualClock, refresh: Callable[[], None]) -> TestClient:
    async def ask() -> None:
        refresh()

    return pages_of(site_of(queries, clock, refresh=ask))


@pytest.mark.parametrize("path", ["/", "/receipts", "/receipts/rcpt_1", "/receipts.csv", "/receipts.json", "/accounts"])
def test_a_ledger_out_of_reach_is_told_in_words_with_when_to_retry(clock: ManualClock, path: str) -> None:
    with _client(_Unreachable(), clock, lambda: None) as client:
        response = client.get(path)
    assert response.status_code == 503
    assert response.headers["retry-after"] == "5"
    assert "disk is full; free some space" in words(response.text)


def test_accounts_ask_for_a_checkpoint_and_say_when_there_was_none(clock: ManualClock) -> None:
    asked = []

    def refuse() -> None:
        asked.append(1)
        raise LedgerUnavailable("the writer is stopped; restart the server")

    with _client(_Stale(), clock, refuse) as client:
        text = words(client.get("/accounts").text)
    assert asked == [1]
    assert "These figures end at the last checkpoint: the writer is stopped" in text


def test_what_names_no_feature_can_be_selected_by_its_row(client: TestClient) -> None:
    assert "none=feature" in client.get("/").text
    page = client.get("/receipts?none=feature&range=all")
    assert page.status_code == 200
    assert "remove this filter" in page.text
    assert client.get("/receipts?none=feature&feature=search").status_code == 400
    assert client.get("/receipts?none=weather").status_code == 400


@pytest.mark.parametrize(
    ("zone", "hours", "expected"),
    [
        ("Europe/Berlin", ("00:00:00Z", "03:00:00Z"), ["02:00+02:00", "02:00+01:00", "03:00", "04:00"]),
        ("Asia/Kolkata", ("00:30:00Z", "02:30:00Z"), ["06:00", "07:00", "08:00"]),
        ("UTC", ("00:00:00Z", "02:00:00Z"), ["00:00", "01:00", "02:00"]),
    ],
)
def test_a_day_on_which_clocks_change_has_all_of_its_hours_in_order(
    zone: str, hours: tuple[str, ...], expected: list[str]
) -> None:
    """Empty hours were left out on such days, and the one that comes twice stood in any order."""
    chosen = parse((("zone", zone), ("from", "2026-10-25")), TIMES, now_ns=0, default_range="24h")
    at = [labels("hour", zone)(parse_time_ns(f"2026-10-25T{hour}")) for hour in hours]
    found = [Totals(each, 1, 0, 0, 0, Money(0), 0, 0, 0) for each in reversed(at)]
    chart = over_time(found, "hour", chosen)[1]
    assert [str(label)[11:] for label in chart.x] == expected
    assert [value for value in chart.series[0].values if value] == [1, 1]


@pytest.mark.parametrize("query", ["", "?feature=search", "?none=feature", "?user=ada&range=all", "?none=user"])
def test_every_link_of_the_overview_leads_somewhere(client: TestClient, query: str) -> None:
    """The way from one feature to what has none asked for both at once, which is refused."""
    links = set(re.findall(r'href="(/(?:receipts)?\?[^"]*|/receipts[^"]*)"', client.get(f"/{query}").text))
    assert links
    for link in links:
        assert client.get(link.replace("&amp;", "&")).status_code == 200, link


@pytest.mark.parametrize(
    ("asked", "leads"),
    [
        (f"rcpt_{41:026d}", f"/receipts/rcpt_{41:026d}"),
        ("GRACE", "/receipts?user=grace"),
        ("nightly", "/receipts?feature=nightly-eval"),
        ("key_web", "/receipts?key=key_web"),
    ],
)
def test_a_search_with_one_answer_goes_there(client: TestClient, asked: str, leads: str) -> None:
    response = client.get("/receipts/search", params={"q": asked}, follow_redirects=False)
    assert (response.status_code, response.headers["location"]) == (303, leads)


def test_a_search_with_several_answers_lists_them_and_one_with_none_says_so(client: TestClient) -> None:
    page = client.get("/receipts/search?q=a").text
    assert 'href="/receipts?user=ada"' in page
    assert 'href="/receipts?feature=answers"' in page
    assert 'href="/receipts?team=search"' in page
    assert "Nothing is called so." in words(client.get("/receipts/search?q=zebra").text)
    assert 'action="/receipts/search"' in client.get("/receipts").text
    hostile = client.get("/receipts/search", params={"q": "<script>x"}).text
    assert "<script>x" not in hostile
