"""What an engine elsewhere says of its load, in the Prometheus figures that it shows at `/metrics`."""

from __future__ import annotations

import asyncio
import logging
import re
from typing import NamedTuple, Protocol
from urllib.parse import urlsplit

from millicent.backends.upstream import Upstream
from millicent.core.errors import MillicentError

log = logging.getLogger(__name__)

_EVERY_S = 1.0
_LIMIT_S = 2.0
# Who has shown none is asked again now and then: it may have been started anew.
_AFTER_FAILURE_S = 60.0
# One figure, with or without labels: `vllm:num_requests_running{model_name="m"} 3.0`.
_FIGURE = re.compile(r"([A-Za-z_:][\w:]*)(?:\{[^\n]*\})?[ \t]+([0-9.eE+]+)")


class Figures(NamedTuple):
    """Requests that an engine works on, and that wait."""

    running: int
    waiting: int


# By server: the names of its two figures. llama.cpp's server shows them where it was started with `--metrics`.
NAMES: dict[str, tuple[str, str]] = {
    "vllm": ("vllm:num_requests_running", "vllm:num_requests_waiting"),
    "sglang": ("sglang:num_running_reqs", "sglang:num_queue_reqs"),
    "tgi": ("tgi_batch_current_size", "tgi_queue_size"),
    "llama.cpp": ("llamacpp:requests_processing", "llamacpp:requests_deferred"),
}


def read_figures(server: str, text: str) -> Figures | None:
    """Summed over an engine's parts and models; None where the figures aren't there."""
    names = NAMES.get(server)
    if names is None:
        return None
    sums: dict[str, float] = {}
    for line in text.splitlines():
        found = _FIGURE.match(line)
        if found is not None and found[1] in names:
            try:
                sums[found[1]] = sums.get(found[1], 0.0) + float(found[2])
            except ValueError:
                return None
    running = sums.get(names[0])
    if running is None or not running < 1e9 or not sums.get(names[1], 0.0) < 1e9:
        return None
    return Figures(round(running), round(sums.get(names[1], 0.0)))


class Watched(Protocol):
    """Who wants to know."""

    @property
    def flights(self) -> int: ...

    def load(self, running: int, waiting: int) -> None: ...


async def watch(server: str, upstream: Upstream, device: Watched) -> None:
    """Ask each second while this gateway has calls there, until cancelled."""
    if server not in NAMES:
        return
    path = urlsplit(upstream.base_url.removesuffix("/v1")).path + "/metrics"
    known: bool | None = None
    while True:
        figures = None
        if device.flights:
            try:
                body = await upstream.get(path, limit_s=_LIMIT_S)
                figures = read_figures(server, body.decode("utf-8", "replace"))
            except MillicentError:
                figures = None
            if (figures is not None) != known:
                known = figures is not None
                log.info("%s %s its load at /metrics", upstream.who, "shows" if known else "doesn't show")
        device.load(*(figures or Figures(0, 0)))
        await asyncio.sleep(_AFTER_FAILURE_S if known is False else _EVERY_S)
