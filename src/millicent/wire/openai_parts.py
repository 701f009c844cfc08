"""Parts of a message in OpenAI's chat: text, pictures, and what only an upstream of the same dialect knows."""

from __future__ import annotations

import re
from typing import Any

import msgspec

from millicent.core.errors import InvalidRequest
from millicent.core.request import ImagePart, OtherPart, Part, TextPart

_DATA = re.compile(r"data:(?P<kind>[\w.+/-]+)(?:;[\w.+=-]+)*?;base64,", re.ASCII)


class ImageUrl(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    url: str
    detail: str | None = None


class _Part(msgspec.Struct, frozen=True):
    type: str
    text: str | None = None
    image_url: ImageUrl | str | None = None


_decoder = msgspec.json.Decoder(_Part)
_any_decoder = msgspec.json.Decoder(dict[str, Any])


def read(raw: msgspec.Raw, where: str) -> Part:
    """Raises InvalidRequest naming the part."""
    try:
        part = _decoder.decode(raw)
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"Invalid `{where}`: {error}.", param=where) from None
    if part.type == "text":
        return _text(part, raw, where)
    if part.type == "image_url":
        if part.image_url is None:
            raise InvalidRequest(
                f"`{where}.image_url` is missing: send the picture's address, or its data.",
                param=f"{where}.image_url",
                code="missing_required_parameter",
            )
        given = part.image_url
        return image(ImageUrl(given) if isinstance(given, str) else given, f"{where}.image_url.url")
    return OtherPart(part.type, bytes(raw).decode(), where)


def _text(part: _Part, raw: msgspec.Raw, where: str) -> TextPart:
    if part.text is None:
        raise InvalidRequest(
            f"`{where}.text` is missing: send the text.", param=f"{where}.text", code="missing_required_parameter"
        )
    unknown = (
        [field for field in _any_decoder.decode(raw) if field not in {"type", "text"}]
        if len(raw) > _least(part)
        else []
    )
    if unknown:
        field = f"{where}.{unknown[0]}"
        raise InvalidRequest(f"Unknown field `{field}`: remove it.", param=field, code="unknown_parameter")
    return TextPart(part.text)


def _least(part: _Part) -> int:
    """Bytes of a text part with nothing else in it, written tersely."""
    return len(part.text or "") + len('{"type":"text","text":""}')


def image(given: ImageUrl, where: str) -> ImagePart:
    """`where` names its address. Raises InvalidRequest."""
    if data := _DATA.match(given.url):
        return ImagePart(data["kind"], given.url[data.end() :], detail=given.detail)
    if not given.url.startswith(("https://", "http://")):
        raise InvalidRequest(f"`{where}` is neither a web address nor base64 data: send one of them.", param=where)
    return ImagePart(url=given.url, detail=given.detail)
