from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from millicent.app_pages import effective
from millicent.config import load

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
