"""`demo`: a made-up company's weeks, and its pages."""

from __future__ import annotations

import sys
from pathlib import Path

import click


@click.command()
@click.option(
    "--home",
    type=click.Path(file_okay=False, path_type=Path),
    help="Keep the demo in this folder, and show it again at once the next time; by default a temporary one.",
)
@click.option("--days", type=click.IntRange(1, 90), default=21, show_default=True, help="So long a past.")
@click.option(
    "--per-day", type=click.IntRange(1, 5000), default=300, show_default=True, help="So many requests on a working day."
)
@click.option("--seed", type=int, default=1, show_default=True, help="The same number makes the same traffic.")
@click.option("--until", metavar="TIME", help="The past ends here instead of now: a UTC time such as 2026-01-31T12:00.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Listen on this address.")
@click.option("--port", type=click.IntRange(0, 65535), default=8090, show_default=True, help="0 takes a free port.")
@click.option("--still", is_flag=True, help="Nobody goes on asking while it is shown.")
@click.option("--no-serve", is_flag=True, help="Only make the ledger; needs --home.")
def demo(
    home: Path | None,
    days: int,
    per_day: int,
    seed: int,
    until: str | None,
    host: str,
    port: int,
    still: bool,
    no_serve: bool,
) -> None:
    """Show the pages full of a made-up company's traffic.

    Weeks of requests of six features go through the real pipeline, meter and ledger in about a minute; only the models
    are stood in for, and nothing is downloaded or called. Your own ledger is not touched, and every page, header and
    receipt says that it is a demo.
    """
    import tempfile

    from millicent.core.clock import SystemClock, parse_time_ns
    from millicent.core.errors import InvalidRequest

    if no_serve and home is None:
        raise InvalidRequest("--no-serve needs --home: else what is made would be gone at once.")
    try:
        end_ns = SystemClock().now_ns() if until is None else parse_time_ns(until)
    except ValueError:
        raise InvalidRequest(f"--until {until!r} is no time: write it as 2026-01-31T12:00.") from None
    with tempfile.TemporaryDirectory(prefix="millicent-demo-") as temporary:
        folder = Path(temporary) / "home" if home is None else home
        _make(folder, days=days, per_day=per_day, seed=seed, end_ns=end_ns)
        if not no_serve:
            _serve(folder, host, port, still=still)


def _make(home: Path, *, days: int, per_day: int, seed: int, end_ns: int) -> None:
    """The ledger, unless it is there."""
    from millicent.cli.demo_replay import prepare, replay

    config = prepare(home)
    if (home / "ledger.db").exists():
        print(f"Showing the demo that is in {home}.")
        return
    with click.progressbar(length=1000, label=f"{days} days of made-up traffic", file=sys.stderr) as bar:
        done = 0

        def tell(part: float) -> None:
            nonlocal done
            reached = round(part * 1000)
            bar.update(reached - done)
            done = reached

        told = replay(home, config, days=days, per_day=per_day, end_ns=end_ns, seed=seed, tell=tell)
        bar.update(1000 - done)
    print(f"{told:,} requests are in the ledger of {home}.")


def _serve(home: Path, host: str, port: int, *, still: bool) -> None:
    from random import SystemRandom

    import msgspec

    from millicent.app import serve
    from millicent.cli.demo_replay import served
    from millicent.cli.demo_visitors import Visitors
    from millicent.config import FILE_NAME, load
    from millicent.server.config import ServerConfig

    config = msgspec.structs.replace(load(home / FILE_NAME), server=ServerConfig(host=host, port=port))
    random = SystemRandom()
    print("Everything there is made up; end it with Ctrl-C.")
    visitors = Visitors(random)
    try:
        serve(served(home, config, random), print if still else visitors.hear)
    finally:
        visitors.leave()
