"""Parts of a message in OpenAI's chat: text, pictures, and what only an upstream of the same dialect knows."""

from __future__ import annotations

import re

import msgspec

from millicent.core.errors import InvalidRequest
from millicent.core.request import ImagePart, OtherPart, Part, TextPart
from millicent.wire.decoding import decode_at, json_text

_DATA = re.compile(r"data:(?P<kind>[\w.+/-]+)(?:;[\w.+=-]+)*?;base64,", re.ASCII)


class ImageUrl(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    url: str
    detail: str | None = None


class _Part(msgspec.Struct, frozen=True):
    type: str
    text: str | None = None
    image_url: ImageUrl | str | None = None


_decoder = msgspec.json.Decoder(_Part)
_fields_decoder = msgspec.json.Decoder(dict[str, msgspec.Raw])


def read(raw: msgspec.Raw, where: str) -> Part:
    """Raises InvalidRequest naming the part."""
    part = decode_at(raw, _decoder, where)
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
    return OtherPart(part.type, json_text(raw, where), where)


def _text(part: _Part, raw: msgspec.Raw, where: str) -> TextPart:
    if part.text is None:
        raise InvalidRequest(
            f"`{where}.text` is missing: send the text.", param=f"{where}.text", code="missing_required_parameter"
        )
    fields = decode_at(raw, _fields_decoder, where) if len(raw) > _least(part) else {}
    if unknown := [field for field in fields if field not in {"type", "text"}]:
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
