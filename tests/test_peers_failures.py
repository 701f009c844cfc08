"""`docs/peers-failures.md` names tests that exist."""

from __future__ import annotations

import re

from source_tree import ROOT, tracked

PAGE = ROOT / "docs" / "peers-failures.md"


def test_every_failure_of_a_peer_has_tests_that_exist() -> None:
    page = PAGE.read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| ") and not line.startswith("| what")]
    assert len(rows) >= 29
    assert [row for row in rows if "`test_" not in row] == []
    sources = "".join(path.read_text(encoding="utf-8") for path in tracked(".py") if path.name.startswith("test_"))
    defined = set(re.findall(r"^(?:async )?def (test_\w+)", sources, re.MULTILINE))
    assert set(re.findall(r"`(test_\w+)`", page)) - defined == set()
