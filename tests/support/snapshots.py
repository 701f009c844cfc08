"""Golden files: the bytes that go over the wire, kept beside the tests. `UPDATE_SNAPSHOTS=1` rewrites them."""

import os
from pathlib import Path


def check(path: Path, actual: str) -> None:
    if os.environ.get("UPDATE_SNAPSHOTS"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(actual)
    assert path.exists(), f"{path} is missing: run the tests with UPDATE_SNAPSHOTS=1 and read what was written"
    assert actual == path.read_text(), f"{path.name} changed: if that is meant, run with UPDATE_SNAPSHOTS=1"
