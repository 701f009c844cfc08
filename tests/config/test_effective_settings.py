from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from millicent.app_pages import effective
from millicent.config import load
from millicent.core.errors import ConfigError
from millicent.dashboard.configuration import append_table, placement_table

FILE = """[server]
port = 9000

[placements.openai]
kind = "api"
api_key_env = "SOME_KEY"
base_url = "https://example.com/v1"

[models.gpt]
placement = "openai"
retries = 3
"""


def test_every_setting_says_where_it_comes_from_and_no_secret_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "millicent.toml"
    path.write_text(FILE)
    config = load(path)
    monkeypatch.setenv("SOME_KEY", "sk-very-secret")
    given = msgspec.structs.replace(config, server=msgspec.structs.replace(config.server, host="127.0.0.2"))
    found = {(each.section, each.name): (each.value, each.origin) for each in effective(given, path)}
    assert found["server", "port"] == ("9000", "millicent.toml:2")
    assert found["server", "host"] == ("127.0.0.2", "command line")
    assert found["server", "max_body_mb"] == ("32", "default")
    assert found["placements.openai", "api_key_env"] == ("SOME_KEY (set in the environment)", "millicent.toml:6")
    assert found["models.gpt", "retries"] == ("3", "millicent.toml:11")
    assert ("models.gpt", "path") not in found
    assert "very-secret" not in str(found)


def test_without_a_file_everything_is_a_default(tmp_path: Path) -> None:
    path = tmp_path / "millicent.toml"
    assert {setting.origin for setting in effective(load(path), path)} == {"default"}


def test_the_first_run_steps_lines_are_read_as_they_were_meant(tmp_path: Path) -> None:
    path = tmp_path / "millicent.toml"
    path.write_text("# mine\n[server]\nport = 9000 # odd\n")
    owned = {"kind": "owned", "capital_usd": "2400", "life_years": "4", "watts": "180", "usd_per_kwh": "0.22"}
    append_table(path, placement_table("local", owned), load)
    assert path.read_text().startswith("# mine\n[server]\nport = 9000 # odd\n\n[placements.local]\n")
    config = load(path)
    assert config.server.port == 9000
    placement = config.placements["local"].placement("local")
    # 2400 / 4 years / 8760 hours, and 0.18 kW at $0.22
    assert str(placement.usd_per_hour) == "0.108093150685"


@pytest.mark.parametrize(
    ("before", "problem"),
    [
        ('[placements.local]\nkind = "rented"\nusd_per_hour = 1\n', "not TOML"),
        ("[server]\nprot = 1\n", "has no setting `prot`"),
        ("placements = {}\n", "not TOML"),
    ],
)
def test_lines_that_do_not_fit_the_file_leave_it_as_it_was(tmp_path: Path, before: str, problem: str) -> None:
    path = tmp_path / "millicent.toml"
    path.write_text(before)
    with pytest.raises(ConfigError, match=problem) as refused:
        append_table(path, placement_table("local", {"kind": "rented", "usd_per_hour": "0.35"}), load)
    assert str(path) in refused.value.message
    assert ".new" not in refused.value.message
    assert path.read_text() == before
