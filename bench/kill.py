"""Kill a gateway under about 200 requests/s, a hundred times over one ledger, and look for lost or doubled receipts.

    python bench/kill.py [--rounds 100] [--seed 1]

Ends with an error at the first receipt that is missing, doubled or open; else one line in bench/results/kill.jsonl.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import results

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from support.killing import RATE_PER_S, kill_rounds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as home:
        answered, receipts = kill_rounds(Path(home), options.rounds, options.seed)
    row = {
        **results.environment(),
        "rounds": options.rounds,
        "seed": options.seed,
        "requests_per_s": RATE_PER_S,
        "answered": answered,
        "receipts": receipts,
        "missing_doubled_or_open": 0,
        "seconds": round(time.monotonic() - start, 1),
    }
    results.write("kill", row)
    print(row)


if __name__ == "__main__":
    main()
