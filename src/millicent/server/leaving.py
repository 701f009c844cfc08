"""Who is to know when a client leaves: the requests that are under way on its connection."""

from __future__ import annotations

from collections.abc import Callable

from starlette.types import Scope

_LEAVING = "millicent.leaving"


class Leaving:
    """One connection's. `listen` is called when somebody begins to watch: what isn't read isn't noticed."""

    def __init__(self, listen: Callable[[], None]) -> None:
        self._listen = listen
        self._left = False
        self._watching: set[Callable[[], None]] = set()

    def watch(self, told: Callable[[], None]) -> None:
        """Call it, once, when the client has left: now, where it has."""
        if self._left:
            told()
        else:
            self._watching.add(told)
            self._listen()

    def unwatch(self, told: Callable[[], None]) -> None:
        self._watching.discard(told)

    def left(self) -> None:
        self._left = True
        watching, self._watching = self._watching, set()
        for told in watching:
            told()

    def put(self, scope: Scope) -> None:
        scope[_LEAVING] = self


def leaving_of(scope: Scope) -> Leaving:
    """That of a request's connection, which HttpProtocol has set; within this process nobody leaves."""
    found: Leaving | None = scope.get(_LEAVING)
    return Leaving(lambda: None) if found is None else found
