"""Users & keys, models & placements, the machine's rate, settings, and a receipt's steps."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from functools import partial
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from millicent.core.budgets import Balance, Budget, Every
from millicent.core.clock import ManualClock
from millicent.core.errors import ConfigError, NotFound
from millicent.core.money import Money
from millicent.core.receipts import Receipt
from millicent.core.steps import SeenStep, SeenWork
from millicent.core.usage import Provenance
from millicent.dashboard.configuration import Setting, append_table, placement_table, settings_page
from millicent.dashboard.models import models_page
from millicent.dashboard.site import Alone, Queries
from millicent.dashboard.timeline import timeline
from millicent.dashboard.users import users_page
from millicent.economics.reports import Reports
from millicent.economics.reports import Setting as ReportSetting
from millicent.ledger.queries import LedgerQueries
from support.pages import pages_of, site_of, words


@dataclass(frozen=True)
class AnEngine:
    device: str = "cpu"
    state: str = "ready"
    message: str | None = None
    models: Mapping[str, str] = field(default_factory=lambda: {"smollm2:135m": "loaded", "minilm": "unloaded"})


@dataclass(frozen=True)
class ADeployment:
    model: str
    backend: str
    placement: str | None
    state: str = "closed"
    running: int = 2


@dataclass(frozen=True)
class APlace:
    name: str
    kind: str = "rented"
    accelerators: int = 1
    usd_per_hour: Decimal | None = Decimal("0.10")
    rate_provenance: Provenance = Provenance.ASSUMED
    provider: str | None = None


@dataclass
class AFleet:
    path: Path
    places: list[APlace]
    checked: list[str] = field(default_factory=list)

    def engines(self) -> Sequence[AnEngine]:
        return [AnEngine()]

    def deployments(self) -> Sequence[ADeployment]:
        return [ADeployment("smollm2:135m", "local", "cpu"), ADeployment("gpt-large", "openai-compatible", "openai")]

    def placements(self) -> Sequence[APlace]:
        return self.places

    def rate_of(self, name: str, settings: Mapping[str, str]) -> Decimal | None:
        if settings["kind"] == "owned" and "life_years" not in settings:
            raise ConfigError(f"[placements.{name}] life_years: missing")
        return Decimal(settings.get("usd_per_hour", "0.2"))

    def check(self, path: Path) -> object:
        text = path.read_text()
        self.checked.append(text)
        if "broken" in text:
            raise ConfigError(f"{path}:1: not TOML")
        return None


@dataclass(frozen=True)
class AKey:
    id: str
    name: str | None = None
    scope: str = "client"
    created_at_ns: int = 1_767_225_600 * 10**9
    models: tuple[str, ...] | None = None
    user: str | None = None
    revoked: bool = False

    def state(self, now_ns: int) -> str:
        return "revoked" if self.revoked else "active"


@dataclass
class AControl:
    made: list[AKey] = field(default_factory=list)
    said: list[tuple[str, object]] = field(default_factory=list)

    def keys(self) -> Sequence[AKey]:
        return self.made

    def budgets(self) -> Sequence[tuple[Budget, Sequence[Balance]]]:
        team = Budget(name="teams", limit=Money.from_usd(10), every=Every.MONTH, per="team")
        spent = Balance("search", 0, Money.from_usd(4), Money.from_usd(1))
        return [(Budget(name="all", limit=Money.from_usd(100), every=Every.ONCE, hard=False), []), (team, [spent])]

    async def create(self, fields: Mapping[str, str | None]) -> str:
        self.said.append(("create", dict(fields)))
        return "mk_new_secret"

    async def rotate(self, key_id: str) -> str:
        self.said.append(("rotate", key_id))
        return "mk_a_newsecret"

    async def revoke(self, key_id: str) -> None:
        if key_id != "mk_a":
            raise NotFound(f"there is no key {key_id!r}")
        self.said.append(("revoke", key_id))


SETTINGS = [
    Setting("server", "port", "8080", "default"),
    Setting("placements.openai", "api_key_env", "OPENAI_API_KEY (set in the environment)", "millicent.toml:3"),
]


@dataclass
class Visit:
    administers: bool = True


@pytest.fixture
def visit() -> Visit:
    return Visit()


@pytest.fixture
def fleet(tmp_path: Path) -> AFleet:
    api = APlace("openai", "api", usd_per_hour=None, rate_provenance=Provenance.UNKNOWN, provider="openai")
    return AFleet(tmp_path / "home" / "millicent.toml", [APlace("cpu"), api])


@pytest.fixture
def control() -> AControl:
    return AControl([AKey("mk_a", "web", user="ada"), AKey("mk_b", scope="admin"), AKey("mk_c", revoked=True)])


@pytest.fixture
def steps() -> dict[str, list[SeenStep]]:
    """Those that are remembered, by receipt."""
    return {}


@pytest.fixture
def pages(
    queries: Queries,
    clock: ManualClock,
    fleet: AFleet,
    control: AControl,
    visit: Visit,
    steps: dict[str, list[SeenStep]],
) -> Iterator[TestClient]:
    site = site_of(
        queries,
        clock,
        visitor=lambda _: Alone("mk_b", visit.administers, "good"),
        steps=lambda receipt_id: steps.get(receipt_id, []),
    )
    more = [
        partial(users_page, control=control, reports=Reports(LedgerQueries(fleet.path), clock, ReportSetting())),
        partial(models_page, fleet=fleet),
        partial(settings_page, path=fleet.path, settings=SETTINGS),
    ]
    with pages_of(site, *more) as client:
        yield client


def test_users_are_told_by_what_they_cost_with_a_way_to_their_receipts(pages: TestClient) -> None:
    page = pages.get("/users").text
    assert page.index(">grace<") < page.index(">ada<")
    assert 'href="/receipts?user=grace&amp;range=30d"' in page
    assert 'href="/receipts?none=user&amp;range=30d"' in page
    rows = pages.get("/users?csv=users").text.splitlines()
    assert rows[0] == "user,requests,input_tokens,output_tokens,cost_usd,share,unpriced_requests"
    assert rows[1].startswith("grace,1,18000,1812,0.04062,")


def test_budgets_show_what_is_spent_held_and_left_of_each(pages: TestClient) -> None:
    rows = pages.get("/users?csv=budgets").text.splitlines()
    assert rows[1] == "all,everyone,counts,100,0,0,100,0.0,"
    assert rows[2].startswith("teams,team search,refuses,10,4,1,5,0.5,")


def test_keys_are_shown_with_their_use_and_never_with_what_they_are_checked_by(pages: TestClient) -> None:
    text = words(pages.get("/users").text)
    assert "web client active user ada all" in text
    assert "mk_c client revoked" in text
    assert "key_web" not in text


def test_an_admin_makes_a_key_and_sees_its_token_once(pages: TestClient, control: AControl) -> None:
    form = {"form_token": "good", "name": "ci", "scope": "viewer", "team": " search "}
    made = pages.post("/users/keys", data=form)
    assert made.status_code == 200
    assert "mk_new_secret" in made.text
    assert made.headers["cache-control"] == "no-store"
    fields = {"name": "ci", "scope": "viewer", "user": None, "team": "search", "feature": None, "tier": None}
    assert control.said == [("create", fields)]
    assert "mk_new_secret" not in pages.get("/users").text


def test_an_admin_replaces_and_revokes_a_key(pages: TestClient, control: AControl) -> None:
    assert "mk_a_newsecret" in pages.post("/users/keys/rotate", data={"form_token": "good", "id": "mk_a"}).text
    revoked = pages.post("/users/keys/revoke", data={"form_token": "good", "id": "mk_a"})
    assert revoked.headers["location"] == "/users"
    assert pages.post("/users/keys/revoke", data={"form_token": "good", "id": "mk_z"}).status_code == 404
    assert control.said == [("rotate", "mk_a"), ("revoke", "mk_a")]


def test_the_first_key_must_be_an_admins_or_nobody_could_make_another(pages: TestClient, control: AControl) -> None:
    control.made.clear()
    refused = pages.post("/users/keys", data={"form_token": "good", "scope": "client"})
    assert refused.status_code == 400
    assert "the first key must be an admin key" in words(refused.text).lower()
    assert pages.post("/users/keys", data={"form_token": "good", "scope": "admin"}).status_code == 200


@pytest.mark.parametrize(
    ("path", "form"),
    [
        ("/users/keys", {"scope": "admin"}),
        ("/users/keys/rotate", {"id": "mk_a"}),
        ("/users/keys/revoke", {"id": "mk_a"}),
        ("/models/rate", {"kind": "rented", "usd_per_hour": "1"}),
    ],
)
def test_a_viewer_sees_everything_and_changes_nothing(
    pages: TestClient, control: AControl, fleet: AFleet, visit: Visit, path: str, form: dict[str, str]
) -> None:
    visit.administers = False
    for page in ("/users", "/models", "/models/rate?kind=rented&usd_per_hour=1", "/settings"):
        shown = pages.get(page)
        assert shown.status_code == 200
        assert 'method="post"' not in shown.text
    assert "runs no model" in words(pages.get("/chat").text)
    assert pages.post(path, data={**form, "form_token": "good"}).status_code == 403
    visit.administers = True
    assert pages.post(path, data={**form, "form_token": "stolen"}).status_code == 403
    assert control.said == []
    assert not fleet.path.exists()


def test_models_are_told_with_their_state_and_use(pages: TestClient) -> None:
    rows = pages.get("/models?csv=models").text.splitlines()
    assert rows[1].startswith("gpt-large,healthy,openai,2,1,1812,0,0.04062")
    assert [row.split(",")[0] for row in rows[1:]] == ["gpt-large", "smollm2:135m", "minilm"]
    assert "smollm2:135m,loaded,cpu,2," in rows[2]


def test_placements_tell_what_receipts_carry_and_what_the_time_cost(pages: TestClient) -> None:
    rows = pages.get("/models?csv=placements").text.splitlines()
    assert rows[1].startswith("cpu,rented,1,0.10,")
    assert rows[2].startswith('openai,"api, openai",,,')


def test_an_assumed_rate_leads_to_the_step_that_sets_it(pages: TestClient, fleet: AFleet) -> None:
    assert "Nobody said what an hour of cpu costs." in words(pages.get("/models").text)
    shown = words(pages.get("/models/rate?kind=rented&usd_per_hour=0.35").text)
    assert '[placements.cpu] kind = "rented" usd_per_hour = 0.35' in shown
    # 2444 s and odd nanoseconds of serving time, at $0.35 and $0.10 an hour
    assert re.search(r"used 40 min 44 s of it: 23.8 cents at this rate instead of 6.79 cents", shown)
    saved = pages.post("/models/rate", data={"form_token": "good", "kind": "rented", "usd_per_hour": "0.35"})
    assert saved.headers["location"] == "/models/rate?saved=yes"
    assert fleet.path.read_text() == '[placements.cpu]\nkind = "rented"\nusd_per_hour = 0.35\n'
    assert "Restart the server to use it" in words(pages.get("/models/rate?saved=yes").text)


@pytest.mark.parametrize(
    ("query", "problem"),
    [
        ("kind=rented&usd_per_hour=cheap", "Usd_per_hour='cheap': write a number such as 0.35."),
        ("kind=owned&capital_usd=2400", "[placements.cpu] life_years: missing."),
        ("kind=borrowed", "Kind='borrowed': say whether the machine is rented or owned."),
    ],
)
def test_a_rate_that_cannot_be_is_refused_where_it_was_typed(pages: TestClient, query: str, problem: str) -> None:
    page = pages.get(f"/models/rate?{query}")
    assert problem in words(page.text)
    assert "Write them there" not in page.text


def test_a_rate_that_is_set_is_left_to_the_file(pages: TestClient, fleet: AFleet) -> None:
    fleet.places[0] = APlace("cpu", rate_provenance=Provenance.MEASURED)
    assert "Nobody said" not in pages.get("/models").text
    assert "change it there" in words(pages.get("/models/rate").text)


def test_a_table_is_added_and_nothing_else_in_the_file_is_touched(tmp_path: Path) -> None:
    path = tmp_path / "millicent.toml"
    path.write_text("# ours\n[server]\nport = 1  # odd")
    path.chmod(0o640)
    append_table(path, placement_table("local", {"kind": "owned", "capital_usd": "2400", "life_years": "4"}), len_of)
    assert path.read_text() == (
        '# ours\n[server]\nport = 1  # odd\n\n[placements.local]\nkind = "owned"\ncapital_usd = 2400\nlife_years = 4\n'
    )
    assert path.stat().st_mode & 0o777 == 0o640
    assert list(tmp_path.iterdir()) == [path]


def len_of(path: Path) -> object:
    return len(path.read_text())


def test_what_would_break_the_configuration_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "millicent.toml"
    path.write_text("broken")
    fleet = AFleet(path, [])
    with pytest.raises(ConfigError, match=f"^{re.escape(str(path))}:1: not TOML"):
        append_table(path, "[placements.local]\n", fleet.check)
    assert path.read_text() == "broken"
    assert list(tmp_path.iterdir()) == [path]


def test_settings_are_shown_with_where_each_comes_from(pages: TestClient) -> None:
    text = words(pages.get("/settings").text)
    assert "port 8080 default" in text
    assert "api_key_env OPENAI_API_KEY (set in the environment) millicent.toml:3" in text


def steps_of(own: str, other: str) -> list[SeenStep]:
    both = (SeenWork(own, 0, 1, 400_000), SeenWork(other, 0, 1, 600_000))
    return [
        SeenStep(7, 10**18, 2_000_000, (SeenWork(own, 12, 0, 2_000_000),)),
        SeenStep(8, 10**18 + 2_000_000, 1_000_000, both),
        SeenStep(9, 10**18 + 3_000_000, 1_000_000, (SeenWork(other, 0, 1, 1_000_000),)),
        SeenStep(10, 10**18 + 4_000_000, 1_000_000, (*both, SeenWork(None, 0, 1, 0))),
    ]


def test_steps_are_lanes_of_this_request_and_its_neighbours() -> None:
    seen = timeline("rcpt_a", steps_of("rcpt_a", "rcpt_b"))
    assert seen is not None
    assert (seen.steps, seen.own_steps, seen.span_ns, seen.others) == (4, 3, 5_000_000, 0)
    own, other, nobody = seen.lanes
    assert own.own
    assert [(part.x, part.width, part.kind) for part in own.stretches] == [
        ("0.00", "400.00", "prefill"),
        ("400.00", "200.00", "decode"),
        ("800.00", "200.00", "decode"),
    ]
    assert [(part.x, part.width) for part in other.stretches] == [("400.00", "600.00")]
    assert nobody.receipt is None
    assert timeline("rcpt_a", []) is None


def test_a_receipt_shows_its_steps_while_they_are_remembered(
    pages: TestClient, receipts: list[Receipt], steps: dict[str, list[SeenStep]]
) -> None:
    receipt, other = receipts[0].id, receipts[1].id
    assert "Its steps are no longer remembered" in words(pages.get(f"/receipts/{receipt}").text)
    steps[receipt] = steps_of(receipt, other)
    page = pages.get(f"/receipts/{receipt}").text
    assert "3 steps of its own among the device's 4 steps in 5.00 ms" in words(page)
    assert f'href="/receipts/{other}"' in page
    assert pages.get(f"/receipts/{receipt}?csv=steps").text.splitlines() == [
        "step,after_ns,wall_ns,sequences,prefill_rows,decode_rows,share_ns",
        "7,0,2000000,1,12,0,2000000",
        "8,2000000,1000000,2,0,1,400000",
        "10,4000000,1000000,3,0,1,400000",
    ]
