"""OpenAI's Responses that are stored: what a request goes on from, and the bodies of their own addresses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from millicent.core.errors import InvalidRequest, NotFound

_REFERENCE = "item_reference"


class Wanted(NamedTuple):
    """What a request wants of earlier ones: the response it goes on from, and those that single items are of."""

    previous: str | None
    responses: tuple[str, ...]


class Turn(NamedTuple):
    """One stored response: what was sent for it, as a JSON array, and its body."""

    id: str
    input: str
    body: str


class Earlier(NamedTuple):
    """What was found: the items of the conversation so far, in order, and items that the request refers to, by id."""

    items: tuple[msgspec.Raw, ...] = ()
    by_id: Mapping[str, msgspec.Raw] = {}


class _Asked(msgspec.Struct, frozen=True):
    previous_response_id: Any = None
    input: Any = None


class _Item(msgspec.Struct, frozen=True):
    id: str | None = None


class _Body(msgspec.Struct, frozen=True):
    output: list[msgspec.Raw]


_asked = msgspec.json.Decoder(_Asked)
_items = msgspec.json.Decoder(list[msgspec.Raw])
_item = msgspec.json.Decoder(_Item)
_body = msgspec.json.Decoder(_Body)


def wanted(body: bytes) -> Wanted | None:
    """None for nearly every request: it brings all it needs. What is wrong with a body, decoding it says."""
    if b"previous_response_id" not in body and b"item_reference" not in body:
        return None
    try:
        asked = _asked.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    previous = asked.previous_response_id if isinstance(asked.previous_response_id, str) else None
    items = asked.input if isinstance(asked.input, list) else []
    references = [
        item["id"]
        for item in items
        if isinstance(item, dict) and item.get("type") == _REFERENCE and isinstance(item.get("id"), str)
    ]
    found = Wanted(previous, tuple(dict.fromkeys(response_of(each) for each in references)))
    return found if found.previous is not None or found.responses else None


def response_of(item_id: str) -> str:
    """Which response an item is of: an item's id names it, between its kind and its number."""
    return "resp_" + item_id.partition("_")[2].rpartition("_")[0]


def earlier(conversation: Sequence[Turn], others: Sequence[Turn]) -> Earlier:
    items = tuple(item for turn in conversation for item in (*_items.decode(turn.input), *output_of(turn)))
    known = [*items, *(item for turn in others for item in output_of(turn))]
    return Earlier(items, {found: item for item in known if (found := _item.decode(item).id) is not None})


def output_of(turn: Turn) -> list[msgspec.Raw]:
    return _body.decode(turn.body).output


def resolved(items: Sequence[msgspec.Raw], earlier: Earlier) -> list[msgspec.Raw]:
    """The items, each reference replaced by what it refers to. Raises InvalidRequest naming one that isn't there."""
    found = []
    for i, raw in enumerate(items):
        reference = _reference(raw) if b"item_reference" in bytes(raw) else None
        if reference is not None and reference not in earlier.by_id:
            raise InvalidRequest(
                f"`input[{i}]` refers to `{reference[:80]}`, which isn't stored here, or not any more: send the "
                "item itself.",
                param=f"input[{i}].id",
                code="item_not_found",
            )
        found.append(raw if reference is None else earlier.by_id[reference])
    return found


def _reference(raw: msgspec.Raw) -> str | None:
    try:
        item = msgspec.json.decode(raw)
    except msgspec.DecodeError:
        return None
    if not isinstance(item, dict) or item.get("type") != _REFERENCE or not isinstance(item.get("id"), str):
        return None
    name: str = item["id"]
    return name


def previous_not_found(response_id: str) -> InvalidRequest:
    return InvalidRequest(
        f"`previous_response_id`: there is no response `{response_id[:80]}` of this key's, or what it went on from is "
        "gone: send the whole conversation as `input`.",
        param="previous_response_id",
        code="previous_response_not_found",
    )


def not_found(response_id: str) -> NotFound:
    return NotFound(
        f"There is no response `{response_id[:80]}` of this key's: it expired, was deleted, or was sent with "
        "`store: false`."
    )


def deleted_body(response_id: str) -> dict[str, Any]:
    return {"id": response_id, "object": "response", "deleted": True}


def input_items(conversation: Sequence[Turn]) -> list[dict[str, Any]]:
    """All that was put in for the last response, oldest first: its own items after the conversation before it."""
    *before, last = conversation
    listed: list[dict[str, Any]] = []
    for turn in before:
        listed += [*_sent(turn), *(msgspec.json.decode(item) for item in output_of(turn))]
    return listed + _sent(last)


def _sent(turn: Turn) -> list[dict[str, Any]]:
    """With the types and ids that could be left out."""
    named = []
    for number, raw in enumerate(_items.decode(turn.input)):
        item = msgspec.json.decode(raw)
        role = item.get("role")
        told = {"type": "message", "id": f"msg_{turn.id.removeprefix('resp_')}_in{number}"} if role else {}
        if role and isinstance(item.get("content"), str):
            kind = "output_text" if role == "assistant" else "input_text"
            item["content"] = [{"type": kind, "text": item["content"]}]
        named.append(told | item)
    return named


def list_body(items: Sequence[dict[str, Any]], limit: int, after: str | None, order: str) -> dict[str, Any]:
    """One page. Raises InvalidRequest where `after` is no item's id."""
    ordered = list(items if order == "asc" else reversed(items))
    if after is not None:
        places = [place for place, item in enumerate(ordered) if item.get("id") == after]
        if not places:
            raise InvalidRequest(f"`after`: no item `{after[:80]}`; pass the `last_id` of a page.", param="after")
        ordered = ordered[places[0] + 1 :]
    page = ordered[:limit]
    ids = [item.get("id") for item in page]
    return {
        "object": "list",
        "data": page,
        "first_id": ids[0] if ids else None,
        "last_id": ids[-1] if ids else None,
        "has_more": len(ordered) > limit,
    }
