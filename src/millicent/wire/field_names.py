"""What a dialect calls the fields that errors name as OpenAI's chat does."""

from __future__ import annotations

import re
from collections.abc import Mapping

from millicent.core.errors import MillicentError


class FieldNames:
    """`names` are a dialect's, by chat's. One of our messages can stand for several of the client's items, so that of a
    field that is called otherwise no number is told."""

    def __init__(self, names: Mapping[str, str]) -> None:
        self._names = dict(names)
        self._field = re.compile(rf"({'|'.join(map(re.escape, names))})((?:\[\d+\]|\.\w+)*)", re.ASCII)

    def told(self, error: MillicentError) -> tuple[str, str | None]:
        """The error's message, and the field to blame."""
        message = re.sub(r"`([^`]*)`", lambda quoted: f"`{self._of(quoted[1])}`", error.message)
        return message, None if error.param is None else self._of(error.param)

    def _of(self, field: str) -> str:
        found = self._field.fullmatch(field)
        return field if found is None else self._names[found[1]]
