"""Every page, full of the demo, in a real browser: accessible, within its width, usable by keyboard, quiet in the
console, and served from this address alone. Pages that join the navigation are looked at here without more."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")

pytestmark = pytest.mark.browser

# What a page shows only where asked for.
ASKED = [
    "/models/rate?kind=rented&usd_per_hour=1",
    "/receipts?by=user&status=failed",
    "/sign-in",
    "/receipts/rcpt_none",
    "/receipts/search?q=a",
]


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A demo of two days."""
    home = tmp_path_factory.mktemp("demo") / "home"
    asked = ["--home", str(home), "--days", "2", "--per-day", "40", "--port", "0", "--still"]
    line = [sys.executable, "-m", "millicent", "demo", *asked]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        assert server.stdout is not None
        said = ""
        for told in server.stdout:
            said += told
            if found := re.search(r"ready on (http://\S+)", told):
                yield found[1]
                break
        else:
            pytest.fail(f"the demo didn't start: {said}")
        server.terminate()


@pytest.fixture(scope="module")
def paths(address: str) -> list[str]:
    """Every page that the navigation leads to, those beside them, a receipt, and what must be asked for."""
    found: dict[str, None] = {}
    waiting = ["/"]
    with httpx.Client(base_url=address) as client:
        while waiting:
            path = waiting.pop()
            if path in found:
                continue
            found[path] = None
            page = client.get(path).text
            for navigation in re.findall(r"<nav[^>]*aria-label=\"Pages[^>]*>.*?</nav>", page, re.DOTALL):
                waiting += re.findall(r"href=\"([^\"]+)\"", navigation)
        [receipt] = re.findall(r"href=\"(/receipts/rcpt_[^\"]+)\"", client.get("/receipts?limit=1").text)
    assert {"/", "/users", "/models", "/accounts", "/receipts", "/settings", "/chat"} <= set(found)
    return [*found, receipt, *ASKED]


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    """It must end without an error in the console, and without having asked anyone else for anything."""
    page = browser.new_page(base_url=address, viewport={"width": 1280, "height": 900})
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text) if message.type in {"error", "warning"} else None)
    host = urlsplit(address).netloc
    page.on("request", lambda request: None if urlsplit(request.url).netloc == host else problems.append(request.url))
    yield page
    page.close()
    assert [problem for problem in problems if "status of 404" not in problem] == []


@pytest.fixture(scope="module")
def axe() -> str:
    """axe-core's own script."""
    package = pytest.importorskip("axe_playwright_python", reason="axe-playwright-python is not installed")
    return resources.files(package).joinpath("axe.min.js").read_text(encoding="utf-8")


def serious(page: Any, rules: str) -> list[str]:
    """What axe finds on the page, with everything on it unfolded."""
    page.evaluate("for (const each of document.querySelectorAll('details')) each.open = true")
    options = f"{{runOnly: {rules}, resultTypes: ['violations']}}"
    return [
        f"{violation['id']} ({violation['help']}) at {[node['target'] for node in violation['nodes'][:3]]}"
        for violation in page.evaluate(f"axe.run({options}).then((results) => results.violations)")
        if violation["impact"] in {"serious", "critical"}
    ]


def test_axe_finds_nothing_serious_on_any_page(page: Any, paths: list[str], axe: str) -> None:
    found = []
    for n, path in enumerate(paths):
        page.goto(path)
        page.evaluate(axe)
        found += [f"{path}: {problem}" for problem in serious(page, "['wcag2a', 'wcag2aa', 'best-practice']")]
        if n % 3 == 0:
            page.emulate_media(color_scheme="dark")
            found += [f"{path}, dark: {problem}" for problem in serious(page, "['color-contrast']")]
            page.emulate_media(color_scheme="light")
    assert not found, "\n".join(found)


def test_axe_would_find_what_is_wrong(page: Any, axe: str) -> None:
    page.goto("/settings")
    page.evaluate(axe)
    page.evaluate("document.querySelector('main').append(document.createElement('img'))")
    assert [problem.split()[0] for problem in serious(page, "['wcag2a']")] == ["image-alt"]


def test_no_demo_page_is_wider_than_its_window(page: Any, paths: list[str]) -> None:
    wide = []
    for width in (390, 1440):
        page.set_viewport_size({"width": width, "height": 800})
        for path in paths:
            page.goto(path)
            page.evaluate("for (const each of document.querySelectorAll('details')) each.open = true")
            if page.evaluate("document.documentElement.scrollWidth") > width:
                wide.append(f"{path} at {width}")
    assert wide == []


def test_somebodys_longest_name_leaves_the_others_their_columns(page: Any) -> None:
    """One caller's name of 256 letters pushed every figure of the table out of the window."""
    page.set_viewport_size({"width": 1440, "height": 800})
    for path in ("/features", "/margin?by=user", "/users"):
        page.goto(path)
        beyond = page.evaluate(
            """() => {
                const name = document.querySelector(".sortable tbody th");
                name.textContent = "x".repeat(256);
                const scroll = name.closest(".scroll");
                return scroll.scrollWidth - scroll.clientWidth;
            }"""
        )
        assert beyond == 0, path


def test_every_control_is_reached_by_keyboard_and_shows_that_it_is(page: Any, paths: list[str]) -> None:
    """Tab goes to the skip link first, and through everything once; what has the focus has an outline."""
    for path in paths:
        page.goto(path)
        page.evaluate("document.activeElement.blur()")
        seen: list[str] = []
        for _ in range(15):
            page.keyboard.press("Tab")
            told = page.evaluate(
                """() => { const on = document.activeElement;
                const style = getComputedStyle(on);
                const bare = style.outlineStyle === "none" || style.outlineWidth === "0px";
                return [on.className + " " + on.localName, bare && on !== document.body]; }"""
            )
            seen.append(told[0])
            assert not told[1], f"{path}: {told[0]} has the focus and doesn't show it"
        if path != "/sign-in":  # its field has the focus at once
            assert seen[0].startswith("skip"), path


def test_a_table_is_sorted_by_any_column_and_back(page: Any) -> None:
    page.goto("/models?range=all")
    column = page.locator("section.table").first.locator("tbody tr th")
    page.get_by_role("button", name="Model").first.click()
    names = column.all_text_contents()
    assert names == ["aster-large", "aster-next", "aster-small", "owl-8b", "owl-32b"]
    page.get_by_role("button", name="Model").first.click()
    assert column.all_text_contents() == names[::-1]
    assert page.locator("th[aria-sort=descending]").count() == 1


def test_a_page_prints_without_what_is_only_for_the_screen(page: Any, paths: list[str], tmp_path: Path) -> None:
    page.emulate_media(media="print")
    for path in paths:
        page.goto(path)
        assert not page.is_visible(".top nav")
        if page.locator("[role=note].demo").count():
            assert page.is_visible(".demo")
    page.goto("/?range=all")
    page.pdf(path=tmp_path / "overview.pdf")
    assert (tmp_path / "overview.pdf").stat().st_size > 10_000


def test_a_charts_table_and_csv_are_one_click_away_and_say_the_same(page: Any, address: str) -> None:
    page.goto("/?range=all")
    chart = page.locator("figure.chart").first
    chart.locator("summary").click()
    rows = chart.locator("tbody tr")
    link = chart.locator("a[href*='csv=']").get_attribute("href")
    exported = httpx.get(address + link, timeout=60).text.splitlines()[1:]
    assert rows.count() == len(exported) > 1
    assert [rows.nth(n).locator("th").text_content() for n in range(len(exported))] == [
        line.split(",")[0] for line in exported
    ]
    page.goto(rows.first.locator("a").get_attribute("href"))
    assert page.url.startswith(f"{address}/receipts?from=")
