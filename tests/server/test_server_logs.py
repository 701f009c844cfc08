"""What the gateway writes into its log."""

from __future__ import annotations

import logging
from pathlib import Path

from millicent.server.logs import logging_to

HOSTILE = "a\r\n2026-01-01 00:00:00,000 ERROR forged: \x1b[2J\x9b31m\u202e\u2028"


def test_what_somebody_chose_begins_no_line_of_the_log_and_moves_no_cursor(tmp_path: Path) -> None:
    log = logging.getLogger("millicent.test")
    with logging_to(tmp_path):
        log.warning("alert: %s", HOSTILE)
        log.error("it failed: %s", HOSTILE, exc_info=ValueError(HOSTILE))
        log.info("naïve 漢字")
    written = (tmp_path / "logs" / "millicent.log").read_text(encoding="utf-8")
    first, *rest = written.split("\n")
    assert first.endswith("alert: a\\r\\n2026-01-01 00:00:00,000 ERROR forged: \\x1b[2J\\x9b31m\\u202e\\u2028")
    assert rest[-2].endswith("naïve 漢字")
    assert rest[1].startswith("    ValueError: a")
    assert all(" millicent.test: " in line for line in written.splitlines() if not line.startswith("    "))
    assert not [each for each in written if not each.isprintable() and each != "\n"]
