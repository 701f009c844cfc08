"""A call's arguments, for dialects that show them as an object."""

from __future__ import annotations

from typing import Any

import msgspec

_decoder = msgspec.json.Decoder(dict[str, Any])


def arguments_object(arguments: str) -> dict[str, Any]:
    """What was cut off, or is no object, stands there as it came: no schema takes it for good arguments."""
    try:
        return _decoder.decode(arguments or "{}")
    except (msgspec.MsgspecError, RecursionError):
        return {"_unparsed": arguments}
