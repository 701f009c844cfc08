"""millicent.toml: what is right is kept, what is wrong is told with its line and a way out."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from millicent.backends.config import Deployment, UpstreamConfig
from millicent.config import WRITTEN_IN, Config, home, line_of, load
from millicent.core.errors import ConfigError


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "millicent.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_without_a_file_the_defaults_hold(tmp_path: Path) -> None:
    assert load(tmp_path / "millicent.toml") == Config()


def test_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    assert load(written(tmp_path, "")) == Config()


def test_what_is_written_is_what_is_loaded(tmp_path: Path) -> None:
    config = load(
        written(
            tmp_path,
            '[server]\nport = 9000\n\n[models.mine]\npreload = true\n[ledger]\ndurability = "process"\n',
        )
    )
    assert config.server.port == 9000
    assert config.server.host == Config().server.host
    assert config.models["mine"].preload
    assert config.ledger.durability == "process"


def test_the_defaults_written_out_load_as_the_defaults(tmp_path: Path) -> None:
    """Every default is a value the check accepts."""
    lines = []
    for section, values in msgspec.to_builtins(Config()).items():
        if section in WRITTEN_IN:
            continue
        lines.append(f"[{section}]")
        lines += [
            f"{key} = {msgspec.json.encode(value).decode()}" for key, value in values.items() if value is not None
        ]
    assert load(written(tmp_path, "\n".join(lines))) == Config()


@pytest.mark.parametrize(
    ("text", "line", "fragments"),
    [
        ("[server]\nprot = 1\n", 2, ["[server]", "`prot`", "did you mean `port`?"]),
        ("# first\n\n[sever]\nport = 1\n", 3, ["[sever]", "did you mean `server`?"]),
        ("[ledger]\nzzz = 1\n", 2, ["`zzz`", "durability"]),
        ('[server]\nhost = "::1"\nport = "x"\n', 3, ["[server] port", "int"]),
        ("[server]\nport = 70000\n", 2, ["[server] port", "65535"]),
        ("[engine]\ndtype = 'fp8'\n", 2, ["[engine] dtype", "fp8"]),
        ("[models.a]\npreload = true\n[models.b]\npreload = 3\n", 4, ["[models.b] preload"]),
        ("[models.a]\n[models.b]\npth = 'x'\n", 3, ["[models.b]", "did you mean `path`?"]),
        ("[server]\nallowed_hosts = [\n  'a',\n  3,\n]\n", 2, ["[server] allowed_hosts"]),
        ("models = 3\n", 1, ["[models.NAME]"]),
        ("server = 3\n", 1, ["[server]", "object"]),
        ("[server\nport = 1\n", 1, ["not TOML"]),
        ("[server]\nport = 1\nport = 2\n", 3, ["not TOML"]),
        ("[server]\napi_key = 'sk-1'\n", 2, ["`api_key`", "secret", "environment"]),
        ("[models.a]\nhf_token = 'x'\n", 2, ["`hf_token`", "secret"]),
        ("[server]\n\nport = 'a' # why\n", 3, ["port"]),
        ("[upstreams.a]\nbase_url = 'http://x'\n", 1, ["[upstreams] is not a section"]),
        ("[placements.a]\nkind = 'api'\nbase_ulr = 'http://x'\n", 3, ["[placements.a]", "did you mean `base_url`?"]),
        ("[placements.a]\nkind = 'api'\nmax_connections = 0\n", 3, ["[placements.a] max_connections"]),
        ("[placements.a]\nkind = 'api'\nserver = 'olama'\n", 3, ["[placements.a] server", "olama"]),
        ("[placements.a]\nkind = 'api'\nbase_url = 'x'\n", 1, ["[placements.a] base_url", "https://host/v1"]),
        ("[placements.a]\nkind = 'api'\nbase_url = 'http://u:p@x'\n", 1, ["without a name, a password"]),
        ("[placements.a]\nkind = 'api'\napi_key = 'sk-1'\n", 3, ["`api_key`", "secret"]),
        ("[placements.a]\nbase_url = 'http://x'\n", 1, ["[placements.a]", "kind"]),
        ("[models.a]\nplacement = 'b'\n", 1, ["no [placements.b]"]),
        ("[placements.box]\nkind = 'api'\n[models.a]\nplacement = 'bx'\n", 3, ["did you mean `box`?"]),
        ("[models.a]\nmodel = 'b'\n", 1, ["[models.a] model", "`placement`"]),
        (
            "[placements.b]\nkind = 'api'\n[models.a]\nplacement = 'b'\npath = 'x'\n",
            3,
            ["[models.a] path", "runs elsewhere"],
        ),
        (
            "[placements.b]\nkind = 'api'\n[models.a]\ndeployments = [{placement = 'b'}, {placement = 'b'}]\n",
            3,
            ["name each placement once"],
        ),
    ],
)
def test_each_mistake_is_told_in_one_line_with_its_place(
    text: str, line: int, fragments: list[str], tmp_path: Path
) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load(path)
    message = caught.value.message
    assert message.startswith(f"{path}:{line}: "), message
    assert "\n" not in message
    for fragment in fragments:
        assert fragment in message


def test_a_placement_that_is_called_keeps_both_its_halves(tmp_path: Path) -> None:
    text = """
[placements.there]
kind = "api"
provider = "openai"
api_key_env = "OPENAI_API_KEY"
timeout_s = 30
[models.small]
deployments = [{ placement = "there", model = "gpt-4o-mini", weight = 3 }]
[models.large]
placement = "there"
"""
    config = load(written(tmp_path, text))
    assert config.placements["there"].provider == "openai"
    assert config.upstreams["there"].timeout_s == 30
    assert config.upstreams["there"].spoken("openai") == "openai"
    assert config.models["small"].deployed == (Deployment("there", "gpt-4o-mini", 3),)
    assert config.models["large"].deployed == (Deployment("there"),)


@pytest.mark.parametrize(
    ("fields", "variable", "says"),
    [
        ({"api_key_env": "TEST_KEY"}, None, "TEST_KEY is not set"),
        ({"api_key_env": "TEST_KEY"}, " ", "empty"),
        ({"api_key_env": "TEST_KEY"}, "a\nb", "one printable line"),
        ({"api_key_file": "/nowhere/key"}, None, "can't be read"),
        ({"headers_env": {"X-A": "TEST_KEY"}}, None, "headers_env.X-A"),
    ],
)
def test_a_key_that_can_not_be_had_is_told(
    fields: dict[str, Any], variable: str | None, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if variable is not None:
        monkeypatch.setenv("TEST_KEY", variable)
    config = UpstreamConfig(**fields)
    asked = config.headers if config.headers_env else config.secret
    with pytest.raises(ConfigError, match=says) as caught:
        asked("there")
    assert "[placements.there]" in caught.value.message


def test_a_key_in_a_file_is_read_without_its_line_end(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("sk-1\n")
    assert UpstreamConfig(api_key_file=str(tmp_path / "key")).secret("there") == "sk-1"


def test_settings_that_count_tokens_are_not_secrets(tmp_path: Path) -> None:
    assert load(written(tmp_path, "[engine]\nstep_tokens = 64\n")).engine.step_tokens == 64


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "millicent.toml"
    path.write_bytes(b"\xff\xfe[")
    with pytest.raises(ConfigError, match="UTF-8"):
        load(path)


def test_home_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MILLICENT_HOME", str(tmp_path))
    assert home() == tmp_path
    monkeypatch.setenv("MILLICENT_HOME", "")
    assert home() == Path.home() / ".millicent"


@given(
    before=st.lists(
        st.sampled_from(["", "# note", "[a]", "x = [\n 1,\n 2]", 'y = """\n[b]\nkey = 1\n"""']), unique=True
    ),
)
def test_lines_are_found_whatever_stands_before(before: list[str]) -> None:
    head = "\n".join(before)
    text = f"{head}\n[b]\n# about the key\nkey = 7\n"
    expected = text.splitlines().index("key = 7") + 1
    assert line_of(text, ("b", "key")) == expected


def test_a_price_keeps_the_digits_it_was_written_with(tmp_path: Path) -> None:
    text = '[placements.box]\nkind = "rented"\nusd_per_hour = 0.12345678901234567890123\n'
    assert load(written(tmp_path, text)).placements["box"].usd_per_hour == Decimal("0.12345678901234567890123")


def test_a_placement_that_does_not_add_up_is_told_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"toml:2: \[placements.box\] usd_per_hour: missing"):
        load(written(tmp_path, '\n[placements.box]\nkind = "rented"\n'))


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('[models.a]\nretries = 2\nfallbacks = ["b", "b"]\n', r"3?.*\[models.a\] fallbacks: names a model twice"),
        ('[models.a]\nfallbacks = ["a"]\n', r"\[models.a\] fallbacks: names a model twice, or itself"),
        ('[models.a]\nbalance = "fair"\n', r":2: \[models.a\] balance"),
        ("[models.a]\nretries = 11\n", r":2: \[models.a\] retries"),
        ("[models.a]\nbreaker = { failures = 0 }\n", r":2: \[models.a\] breaker failures"),
        ('[features.f]\nplacements = ["moon"]\n', r"\[features.f\] placements: there is no `moon`"),
    ],
)
def test_policies_and_placements_of_features_are_checked(text: str, complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "millicent.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=complaint):
        load(path)


def test_a_models_policy_is_read_beside_its_other_settings(tmp_path: Path) -> None:
    path = tmp_path / "millicent.toml"
    path.write_text(
        '[placements.p]\nkind = "api"\nbase_url = "http://127.0.0.1:1"\n'
        '[models.a]\nplacement = "p"\nbalance = "cheapest"\ntimeout_s = 2.5\nfallbacks = ["b"]\n'
        "[models.a.breaker]\ncooldown_s = 3\n"
        '[features.f]\nplacements = ["p", "local"]\n'
    )
    config = load(path)
    policy = config.policies["a"]
    assert (policy.balance, policy.timeout_s, policy.fallbacks, policy.retries) == ("cheapest", 2.5, ("b",), 2)
    assert policy.breaker.cooldown_s == 3
    assert config.models["a"].placement == "p"
    assert config.features["f"].placements == ("p", "local")


@pytest.mark.parametrize(
    ("machine", "problem"),
    [
        ('kind = "api"\nprovider = "openai"', 'kind = "api": must be rented, owned or provisioned'),
        ('kind = "rented"', "usd_per_hour: missing"),
        ('kind = "rented"\nusd_per_hour = 1\nlike = "nowhere"', "like: there is no placement `nowhere`"),
        ('kind = "rented"\nusd_per_hour = 1\noutput_tokens_per_s = 0', "output_tokens_per_s = 0: must be above 0"),
        (
            'kind = "rented"\nusd_per_hour = 1\nrequests_per_hour = 9\noutput_tokens_per_s = 9',
            "requests_per_hour: `output_tokens_per_s` says what it can do already",
        ),
        ('kind = "rented"\nusd_per_hour = 1\nstandard_utilization = 0.5', "standard_utilization: is for receipts"),
    ],
)
def test_a_machine_to_compare_is_checked(tmp_path: Path, machine: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=r"\[machines.gpu\]") as raised:
        load(written(tmp_path, f"[machines.gpu]\n{machine}\n"))
    assert problem in raised.value.message
