"""Promise 1 from the outside: an answer that came whole has its receipt, however the gateway died."""

from __future__ import annotations

from pathlib import Path

from support.killing import kill_rounds


def test_a_gateway_killed_under_load_leaves_no_receipt_missing_doubled_or_open(tmp_path: Path) -> None:
    """Ten kills at the ledger are in test_ledger_kill; a hundred of these in bench/kill.py."""
    answered, receipts = kill_rounds(tmp_path, rounds=3, seed=20_260_101)
    assert 0 < answered <= receipts
