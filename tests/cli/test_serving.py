"""What `serve` makes of its arguments and of millicent.toml, and how models are fetched and listed."""

from __future__ import annotations

import json
from decimal import Decimal
from io import StringIO
from pathlib import Path

import pytest

from millicent.app import ServeOptions
from millicent.backends.config import ModelConfig
from millicent.cli import run
from millicent.cli.serving import chosen, in_precision, placement_of
from millicent.config import Config
from millicent.core.errors import ConfigError
from millicent.core.usage import Provenance
from millicent.hub import InstalledModel, Progress
from millicent.meter.placements import PlacementConfig

RENTED = PlacementConfig(kind="rented", usd_per_hour=Decimal("1.5"))


@pytest.fixture(autouse=True)
def _own_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MILLICENT_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MILLICENT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "home").mkdir()


@pytest.fixture
def model_file(tmp_path: Path) -> Path:
    path = tmp_path / "home" / "tiny.gguf"
    path.write_bytes(b"GGUF" * 250)
    return path


class Terminal(StringIO):
    def isatty(self) -> bool:
        return True


def pulled(name: str, cache: Path, progress: Progress | None = None) -> InstalledModel:
    if progress is not None:
        progress(5, 10)
    return InstalledModel(name, cache / "models" / name, 98_362_432, "pypi:x==1")


def test_a_model_can_be_given_by_its_path(model_file: Path, tmp_path: Path) -> None:
    wanted = chosen((str(model_file),), Config(), tmp_path, "local")
    assert list(wanted) == ["tiny", "minilm"]
    assert (wanted["tiny"].path, wanted["tiny"].placement, wanted["tiny"].preload) == (model_file, "local", True)


def test_a_precision_on_the_command_line_is_for_every_model_and_one_in_the_file_for_its_own(
    model_file: Path, tmp_path: Path
) -> None:
    settings = Config(models={"mine": ModelConfig(path="tiny.gguf", dtype="fp32", quantize="int8")})
    as_written = chosen((), settings, tmp_path / "home", "local")["mine"]
    assert (as_written.dtype, as_written.quantize) == ("fp32", "int8")
    told = in_precision(settings, None, "int4")
    assert told.engine.quantize == "int4"
    overruled = chosen((), told, tmp_path / "home", "local")["mine"]
    assert (overruled.dtype, overruled.quantize) == ("fp32", None)


def test_a_draft_model_is_named_like_any_other_in_the_file_or_for_all_on_the_command_line(
    model_file: Path, tmp_path: Path
) -> None:
    small = ModelConfig(path="tiny.gguf", quantize="int4")
    settings = Config(models={"mine": ModelConfig(path="tiny.gguf", draft="small"), "small": small})
    wanted = chosen((), settings, tmp_path / "home", "local")
    draft = wanted["mine"].draft
    assert draft is not None
    assert (draft.name, draft.path, draft.quantize) == ("small", model_file, "int4")
    assert wanted["small"].draft is None
    told = chosen(("mine",), settings, tmp_path / "home", "local", draft=str(model_file))["mine"].draft
    assert told is not None
    assert (told.name, told.quantize) == ("tiny", None)


def test_a_word_that_is_no_precision_is_refused_with_those_that_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["serve", "--quantize", "int2"]) == 2
    assert "'int4'" in capsys.readouterr().err


def test_quantize_says_in_one_line_what_stands_in_its_way(
    model_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["quantize", str(model_file), "--to", "int8", "--out", str(tmp_path)]) == 1
    assert "exists already; name another folder" in capsys.readouterr().err


def test_a_model_in_the_configuration_goes_by_its_name_there(model_file: Path, tmp_path: Path) -> None:
    settings = Config(models={"mine": ModelConfig(path="tiny.gguf", keep_alive_s=60)})
    wanted = chosen((), settings, tmp_path / "home", "local")
    assert wanted["mine"].path == model_file
    assert (wanted["mine"].keep_alive_s, wanted["mine"].preload) == (60, False)
    assert chosen(("mine",), settings, tmp_path / "home", "local")["mine"].preload


def test_two_models_of_one_name_are_refused(model_file: Path, tmp_path: Path) -> None:
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF")
    with pytest.raises(ConfigError, match="two models would be called 'tiny'"):
        chosen((str(model_file), str(tmp_path / "tiny.gguf")), Config(), tmp_path, "local")


def test_without_a_name_the_default_model_is_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("millicent.hub.pull", pulled)
    wanted = chosen((), Config(), tmp_path, "local")
    assert list(wanted) == ["smollm2:135m", "minilm"]
    assert isinstance(wanted["smollm2:135m"].path, Path)


def test_the_embedding_model_is_fetched_when_it_is_first_asked_for(
    monkeypatch: pytest.MonkeyPatch, model_file: Path, tmp_path: Path
) -> None:
    fetched: list[str] = []

    def pull(name: str, cache: Path, progress: Progress | None = None) -> InstalledModel:
        fetched.append(name)
        return pulled(name, cache, progress)

    monkeypatch.setattr("millicent.hub.pull", pull)
    offered = chosen((str(model_file),), Config(), tmp_path, "local")["minilm"]
    assert (fetched, offered.preload) == ([], False)
    assert not isinstance(offered.path, Path)
    assert offered.path() == tmp_path / "cache" / "models" / "minilm"
    assert fetched == ["minilm"]


def test_an_embedding_model_that_is_named_is_served_like_any_other(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("millicent.hub.pull", pulled)
    wanted = chosen(("minilm",), Config(), tmp_path, "local")
    assert list(wanted) == ["minilm"]
    assert wanted["minilm"].preload


ELSEWHERE = """
[placements.there]
kind = "rented"
usd_per_hour = 2
base_url = "http://127.0.0.1:8000/v1"
[models.far]
placement = "there"
"""


def test_models_elsewhere_need_no_engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[ServeOptions] = []
    monkeypatch.setattr("millicent.app.serve", seen.append)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    (tmp_path / "home" / "millicent.toml").write_text(ELSEWHERE)
    assert run(["serve"]) == 0
    [options] = seen
    assert options.models == {}
    assert [(each.placement, each.models) for each in options.elsewhere] == [("there", {"far": "far"})]
    assert [placement.name for placement in options.providers] == ["there"]
    assert options.placement.rate_provenance is Provenance.ASSUMED


def test_models_here_and_elsewhere_are_served_together(
    monkeypatch: pytest.MonkeyPatch, model_file: Path, tmp_path: Path
) -> None:
    seen: list[ServeOptions] = []
    monkeypatch.setattr("millicent.app.serve", seen.append)
    (tmp_path / "home" / "millicent.toml").write_text(ELSEWHERE + '[models.near]\npath = "tiny.gguf"\n')
    assert run(["serve"]) == 0
    assert run(["serve", str(model_file), "far"]) == 0
    assert [list(options.models) for options in seen] == [["near", "minilm"], ["tiny", "minilm"]]
    assert all(options.elsewhere for options in seen)


def test_a_machine_that_nobody_priced_has_an_assumed_rate() -> None:
    placement = placement_of(Config())
    assert placement.rate_provenance is Provenance.ASSUMED
    assert placement.usd_per_hour is not None


def test_the_configured_placement_is_taken() -> None:
    placement = placement_of(Config(placements={"box": RENTED}))
    assert (placement.name, placement.usd_per_hour) == ("box", Decimal("1.5"))


def test_several_placements_are_refused_for_one_machine() -> None:
    with pytest.raises(ConfigError, match="keep that one"):
        placement_of(Config(placements={"a": RENTED, "b": RENTED}))


def test_the_command_line_goes_before_the_file(
    monkeypatch: pytest.MonkeyPatch, model_file: Path, tmp_path: Path
) -> None:
    seen: list[ServeOptions] = []
    monkeypatch.setattr("millicent.app.serve", seen.append)
    (tmp_path / "home" / "millicent.toml").write_text('[server]\nport = 9000\nhost = "::1"\n')
    assert run(["serve", str(model_file), "--port", "0"]) == 0
    [options] = seen
    assert (options.config.server.port, options.config.server.host) == (0, "::1")
    assert options.home == tmp_path / "home"


def test_pull_says_what_came_and_where_it_lies(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("millicent.hub.pull", pulled)
    assert run(["pull", "minilm"]) == 0
    assert capsys.readouterr() == (f"minilm: 98.4 MB at {tmp_path}/cache/models/minilm\n", "")
    assert run(["pull", "minilm", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["bytes"] == 98_362_432


def test_a_download_shows_a_bar_to_whoever_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setattr("millicent.hub.pull", pulled)
    assert run(["pull", "minilm"]) == 0
    assert "Fetching minilm" in terminal.getvalue()


def test_an_unknown_model_is_one_line_with_a_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["pull", "smolm2"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: no model 'smolm2'")
    assert "smollm2:135m" in err


def test_models_lists_what_is_here_and_what_can_be_fetched(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    here = InstalledModel("org/name", Path("/models/name"), 5_000_000, "huggingface:org/name@abc")
    monkeypatch.setattr("millicent.hub.list_installed", lambda _: [here])
    assert run(["models", "--json"]) == 0
    listed = {each["name"]: each for each in json.loads(capsys.readouterr().out)["data"]}
    assert (listed["org/name"]["installed"], listed["org/name"]["bytes"]) == (True, 5_000_000)
    assert (listed["minilm"]["installed"], listed["minilm"]["bytes"]) == (False, None)
    assert run(["models"]) == 0
    out = capsys.readouterr().out
    assert "not here   83.5 MB" in out
    assert "installed   5.0 MB" in out
