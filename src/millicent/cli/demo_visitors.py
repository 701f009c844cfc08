"""Made-up users who go on asking while the demo is shown, so that what is live lives."""

from __future__ import annotations

import threading
from random import Random

from millicent.cli.client import READY, Client
from millicent.cli.demo_story import passer_by
from millicent.core.errors import MillicentError

# Not many more than there were before, or all that is watched would change.
_AT_ONCE = 2
_PAUSE_S = 90.0


class Visitors:
    """A few threads that ask over HTTP, as anybody does. They give up once the server lets them in no more."""

    def __init__(self, random: Random) -> None:
        self._random = random
        self._stopped = threading.Event()

    def hear(self, line: str) -> None:
        """What the server says: they come when it is ready."""
        print(line)
        if line.startswith(READY):
            client = Client(line.removeprefix(READY).strip())
            for _ in range(_AT_ONCE):
                threading.Thread(target=self._ask, args=(client,), name="demo visitor", daemon=True).start()

    def leave(self) -> None:
        self._stopped.set()

    def _ask(self, client: Client) -> None:
        while not self._stopped.wait(self._random.expovariate(1 / _PAUSE_S)):
            feature, headers = passer_by(self._random)
            body = {
                "model": feature.model,
                "messages": [{"role": "user", "content": "Made-up question of a made-up user."}],
                "max_tokens": 4 * feature.output_tokens,
            }
            try:
                client.answer(body, headers)
            except MillicentError:
                return
