"""The pages in a real browser, against a stand-in for the public API."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from millicent.core.clock import SystemClock
from millicent.core.money import Money
from millicent.core.receipts import Receipt

sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")

pytestmark = pytest.mark.browser


sync_api.expect.set_options(timeout=60_000)


@pytest.fixture
def page(browser: Any, origin: str) -> Iterator[Any]:
    """A page on the chat. It must end without a script error, a blocked resource or a console error, but for the
    browser's note on a refused call that the page itself turns into words."""
    page = browser.new_page(base_url=origin, viewport={"width": 1280, "height": 900})
    page.set_default_timeout(60_000)
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on(
        "console",
        lambda message: (
            problems.append(message.text)
            if message.type in {"error", "warning"} and not re.search("status of (401|503)", message.text)
            else None
        ),
    )
    page.goto("/chat")
    yield page
    page.close()
    assert problems == []


def ask(page: Any, text: str) -> None:
    page.fill("#prompt", text)
    page.keyboard.press("Enter")


def ended(page: Any, state: str) -> None:
    page.wait_for_selector(f"#meter[data-state={state}]")
    page.wait_for_selector("#send:visible")


def under_way(page: Any) -> None:
    sync_api.expect(page.locator("#meter-tokens")).to_have_text(re.compile(r", ([3-9]|\d\d+) out"))


def stop_clock(page: Any) -> None:
    """No timer of the page, loaded anew, fires by itself any more."""
    page.clock.install(time="2026-01-01T00:00:00Z")
    page.clock.pause_at("2026-01-01T00:00:01Z")
    page.reload()


def next_round(page: Any, after_ms: int = 2_000) -> None:
    """Let the live table's timer fire, and its answer be shown: after it says how it stands, its timer runs again."""
    page.evaluate("document.getElementById('live-state').textContent = ''")
    page.clock.fast_forward(after_ms)
    sync_api.expect(page.locator("#live-state")).not_to_have_text("")


def test_the_meter_ticks_while_the_answer_streams_and_ends_on_the_final_usage(page: Any, api: Any) -> None:
    page.evaluate(
        """() => { window.seen = new Set();
        new MutationObserver(() => window.seen.add(document.getElementById("meter-cost").textContent))
          .observe(document.getElementById("meter"), {subtree: true, childList: true, characterData: true}); }"""
    )
    ask(page, "What is a millicent?")
    ended(page, "done")
    assert page.text_content("#meter-cost") == "0.42 millicents"
    assert page.get_attribute("#meter-cost", "title") == "0.0000042 USD"
    assert page.text_content("#meter-tokens") == "12 in, 5 out"
    assert re.fullmatch(r"\d+\.\d tokens/s", page.text_content("#meter-speed"))
    assert {"0.1 millicents", "0.2 millicents", "0.3 millicents"} <= set(page.evaluate("[...window.seen]"))
    answer = page.locator(".turn.assistant .body p")
    assert answer.all_text_contents() == ["A millicent is a thousandth of a cent.", "Paragraph two."]
    body, headers = api.calls[-1]["body"], api.calls[-1]["headers"]
    assert (body["stream"], body["temperature"]) == (True, 0.7)
    assert body["stream_options"] == {"include_usage": True, "continuous_usage_stats": True}
    assert headers["x-millicent-feature"] == "chat-page"
    page.click(".turn-foot a")
    page.wait_for_selector("article.receipt")
    assert "chat-page" in page.text_content("article.receipt")
    page.go_back()
    assert page.locator(".turn.assistant .body p").count() == 2


def test_a_conversation_sends_its_turns_and_its_system_prompt(page: Any, api: Any) -> None:
    page.click(".options summary")
    page.fill("#system", "Be brief.")
    page.fill("#temperature", "0")
    for text in ("one", "two"):
        ask(page, text)
        ended(page, "done")
    body = api.calls[-1]["body"]
    assert [message["role"] for message in body["messages"]] == ["system", "user", "assistant", "user"]
    assert (body["messages"][0]["content"], body["temperature"]) == ("Be brief.", 0)
    page.click("#new-chat")
    assert page.locator("article").count() == 0
    ask(page, "three")
    ended(page, "done")
    assert [message["role"] for message in api.calls[-1]["body"]["messages"]] == ["system", "user"]


def test_what_a_model_writes_is_shown_as_text(page: Any) -> None:
    ask(page, "hostile")
    ended(page, "done")
    answer = page.locator(".turn.assistant .body")
    assert answer.locator("p").all_text_contents() == ["<img src=x onerror=alert(1)>", "end"]
    assert answer.locator("pre code").all_text_contents() == ["<script>alert(2)</script>"]
    assert answer.locator("img, script").count() == 0


def test_stop_ends_the_work_and_the_meter_shows_what_the_receipt_says(page: Any, api: Any) -> None:
    ask(page, "slow")
    under_way(page)
    page.click("#stop")
    ended(page, "stopped")
    assert api.cancelled == 1
    assert api.rows[-1].status == "cancelled"
    sync_api.expect(page.locator(".turn.assistant .turn-foot")).to_have_text(re.compile("^stopped"))
    assert page.text_content("#meter-cost") == api.rows[-1].total.human()


def test_a_new_chat_stops_the_answer_in_progress(page: Any, api: Any) -> None:
    ask(page, "slow")
    under_way(page)
    page.click("#new-chat")
    page.wait_for_selector("#meter[data-state=idle]")
    assert page.locator("article").count() == 0
    ask(page, "hello")
    ended(page, "done")
    assert page.locator(".turn.assistant").count() == 1
    assert api.cancelled == 1


def test_a_busy_server_is_told_in_words_and_the_retry_waits_as_asked(page: Any, api: Any) -> None:
    stop_clock(page)
    ask(page, "busy")
    page.wait_for_selector("#chat-error:visible")
    assert "The queue is full; try again." in page.text_content("#chat-error")
    retry = page.get_by_role("button", name="Try again")
    assert "wait 1 s" in page.text_content("#chat-error")
    assert retry.is_disabled()
    page.clock.fast_forward(1_000)
    retry.click()
    ended(page, "done")
    assert api.seen["busy"] == 2
    assert page.locator(".turn.user").count() == 1
    assert not page.is_visible("#chat-error")


def test_a_server_with_keys_asks_for_one_and_keeps_it_out_of_storage(page: Any) -> None:
    ask(page, "locked")
    page.wait_for_selector("#chat-error input")
    page.fill("#chat-error input", "mk_test")
    page.get_by_role("button", name="Try again").click()
    ended(page, "done")
    assert "mk_test" not in page.evaluate("JSON.stringify(sessionStorage) + JSON.stringify(localStorage)")


def test_an_answer_cut_off_is_told_and_keeps_its_receipt(page: Any) -> None:
    ask(page, "broken")
    page.wait_for_selector("#chat-error:visible")
    assert "The connection ended before the answer did" in page.text_content("#chat-error")
    assert page.text_content(".turn.assistant .body") == "half an answer"
    assert page.locator(".turn-foot a").count() == 1


def test_a_question_that_was_never_answered_gives_way_to_the_next(page: Any, api: Any) -> None:
    ask(page, "busy")
    page.wait_for_selector("#chat-error:visible")
    ask(page, "hello")
    ended(page, "done")
    assert page.locator(".turn.user").all_text_contents() == ["Youhello"]
    assert [message["content"] for message in api.calls[-1]["body"]["messages"]] == ["hello"]


def test_the_conversation_follows_the_answer_until_the_reader_scrolls_up(page: Any) -> None:
    below = "(n => n.scrollHeight - n.scrollTop - n.clientHeight)(document.getElementById('transcript'))"
    page.set_viewport_size({"width": 1280, "height": 500})
    ask(page, "slow")
    sync_api.expect(page.locator("#meter-tokens")).to_have_text(re.compile(r", (9|\d{2,})\d out"))
    page.click(".options summary")
    sync_api.expect(page.locator("#meter-tokens")).to_have_text(re.compile(r", (1[1-9]|[2-9]\d|\d{3,})\d out"))
    assert page.evaluate(below) < 60
    page.evaluate("document.getElementById('transcript').scrollTop = 0")
    under_way(page)
    page.wait_for_timeout(200)
    assert page.evaluate("document.getElementById('transcript').scrollTop") == 0
    page.click("#stop")
    ended(page, "stopped")


def test_an_unpriced_answer_says_so_instead_of_zero(page: Any) -> None:
    ask(page, "unpriced")
    ended(page, "done")
    assert page.text_content("#meter-cost") == "unpriced"


def test_new_receipts_appear_without_reloading_and_are_marked(page: Any, live_receipts: list[Receipt]) -> None:
    stop_clock(page)
    page.evaluate("window.kept = true")
    next_round(page)
    assert page.locator("tr.new").count() == 0
    fresh = _copy(live_receipts[0], 90)
    live_receipts.append(fresh)
    next_round(page)
    page.wait_for_selector(f"tr.new[data-receipt={fresh.id}]")
    assert page.evaluate("window.kept")


def test_a_filter_changes_the_tables_and_the_address_and_leaves_the_chat(page: Any) -> None:
    ask(page, "hello")
    ended(page, "done")
    page.click("#live a[href='/chat?feature=answers']")
    page.wait_for_selector(".chip")
    assert page.locator("tr[data-receipt]").count() == 1
    assert page.url.endswith("/chat?feature=answers")
    assert page.locator(".turn.assistant").count() == 1
    page.go_back()
    page.wait_for_selector(".chip", state="detached")
    assert page.locator("tr[data-receipt]").count() > 1


def test_the_live_table_says_when_it_does_not_update_and_recovers(page: Any) -> None:
    stop_clock(page)
    page.route("**/receipts/rows*", lambda route: route.fulfill(status=503))
    state = page.locator("#live-state")
    next_round(page)
    sync_api.expect(state).to_have_text("not updating (the server answered 503); trying again in 4 s")
    page.unroute("**/receipts/rows*")
    next_round(page, 4_000)
    sync_api.expect(state).to_have_text("live")


def test_an_open_receipt_turns_into_the_closed_one_by_itself(page: Any, live_receipts: list[Receipt]) -> None:
    opened = live_receipts[-1]
    page.goto(f"/receipts/{opened.id}")
    assert "This page follows it" in page.text_content("article")
    live_receipts[-1] = _copy(live_receipts[0], 50)
    page.wait_for_selector("article[data-open=false]")
    assert live_receipts[0].total is not None
    assert live_receipts[0].total.human() in page.text_content("article .amount")


@pytest.mark.parametrize("path", ["/", "/chat", "/receipts", "/receipts?user=ada", "/accounts", "/receipts/{}"])
def test_no_page_overflows_its_width(page: Any, live_receipts: list[Receipt], path: str) -> None:
    page.goto(path.format(live_receipts[30].id))
    for width in (320, 390, 800, 1280):
        page.set_viewport_size({"width": width, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_the_browser_tells_amounts_as_the_server_does(page: Any) -> None:
    amounts = [
        0,
        1,
        999,
        10_000,
        123_456,
        2_100_000,
        9_994_900,
        9_999_600,
        34_567_890,
        999_960_000,
        10**9,
        12345 * 10**8,
    ]
    told = page.evaluate(
        "async (usd) => { const m = await import('/static/figures.js'); return usd.map(m.human); }",
        [sign * nanousd / 10**9 for nanousd in amounts for sign in (1, -1)],
    )
    assert told == [Money(sign * nanousd).human() for nanousd in amounts for sign in (1, -1)]


def test_the_live_table_asks_once_every_two_seconds_and_not_while_hidden(page: Any) -> None:
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url) if "/receipts/rows" in request.url else None)
    stop_clock(page)
    for _ in range(3):
        next_round(page)
    assert len(asked) == 3
    page.evaluate(
        """() => { Object.defineProperty(document, "hidden", {value: true, configurable: true});
        document.dispatchEvent(new Event("visibilitychange")); }"""
    )
    page.clock.fast_forward(3_600_000)
    page.evaluate("document.title")  # a round trip, so that a request would have been seen
    assert len(asked) == 3


def _copy(receipt: Receipt, number: int) -> Receipt:
    now_ns = SystemClock().now_ns()
    return msgspec.structs.replace(receipt, id=f"rcpt_{number:026d}", created_at_ns=now_ns, settled_at_ns=now_ns)
