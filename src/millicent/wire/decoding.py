"""Bytes to typed bodies: strict, and every complaint names the field."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import msgspec

from millicent.core.errors import InvalidRequest
from millicent.core.request import Extra

T = TypeVar("T")

_WHOLE = re.compile(r"\d{1,9}", re.ASCII)
_AT = re.compile(r" - at (?:`key` in )?`(?P<path>[^`]+)`$")
_UNKNOWN = re.compile(r"^Object contains unknown field `(?P<field>[^`]*)`")
_MISSING = re.compile(r"^Object missing required field `(?P<field>[^`]*)`")


def decode_body(body: bytes, decoder: msgspec.json.Decoder[T], known_fields: Iterable[str]) -> T:
    """The body as the decoder's type. Raises InvalidRequest, with `param` where a field is to blame."""
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        raise _invalid_field(str(error), known_fields) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(
            f"The body is not valid JSON: {error}. Send one JSON object in UTF-8.", code="invalid_json"
        ) from None
    except RecursionError:
        raise InvalidRequest("The body is nested too deeply. Flatten it.", code="invalid_json") from None


def decode_with_extra(
    body: bytes, decoder: msgspec.json.Decoder[T], known_fields: Iterable[str]
) -> tuple[T, dict[str, Extra]]:
    """The same, but fields at the top that nobody here knows are kept, each with what is said where they can't be
    honoured."""
    try:
        return decoder.decode(body), {}
    except msgspec.ValidationError as error:
        if not _UNKNOWN.match(str(error)) or _AT.search(str(error)):
            raise _invalid_field(str(error), known_fields) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return decode_body(body, decoder, known_fields), {}  # which says what is wrong with it
    fields = decode_body(body, _fields_decoder, ())
    known = frozenset(getattr(decoder.type, "__struct_encode_fields__", ()))
    extra = {}
    for field in [field for field in fields if field not in known]:
        refusal = _invalid_field(f"Object contains unknown field `{field}`", known_fields)
        extra[field] = Extra(json_text(fields.pop(field), field), refusal.message, refusal.code)
    return decode_body(msgspec.json.encode(fields), decoder, known_fields), extra


_fields_decoder = msgspec.json.Decoder(dict[str, msgspec.Raw])


def decode_at(raw: msgspec.Raw, decoder: msgspec.json.Decoder[T], where: str) -> T:
    """A part of a body that was left undecoded, `where` naming it. Raises InvalidRequest as `decode_body` does."""
    try:
        return decoder.decode(raw)
    except msgspec.ValidationError as error:
        raise _invalid_field(str(error), getattr(decoder.type, "__struct_fields__", ()), where) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"`{where}` is not valid JSON: {error}.", param=where, code="invalid_json") from None
    except RecursionError:
        raise InvalidRequest(f"`{where}` is nested too deeply. Flatten it.", param=where, code="invalid_json") from None


def json_text(raw: msgspec.Raw, where: str) -> str:
    """A part of a body that stays JSON. Raises InvalidRequest where it is none."""
    decode_at(raw, _any_decoder, where)
    return bytes(raw).decode().strip()


_any_decoder = msgspec.json.Decoder()


def read_limit(query: Mapping[str, str], usual: int, most: int) -> int:
    """How many a page of a list may hold. Raises InvalidRequest."""
    said = query.get("limit", str(usual))
    if not _WHOLE.fullmatch(said) or not 1 <= int(said) <= most:
        raise InvalidRequest(f"Invalid `limit`: `{said[:40]}`; send 1 to {most}.", param="limit")
    return int(said)


def _invalid_field(message: str, known_fields: Iterable[str], where: str = "") -> InvalidRequest:
    at = _AT.search(message)
    inside = at["path"].removeprefix("$").removesuffix("[...]") if at else ""
    path = (where + inside).removeprefix(".")
    if unknown := _UNKNOWN.match(message):
        field = _join(path, unknown["field"])
        close = difflib.get_close_matches(unknown["field"], list(known_fields), n=1)
        hint = f"did you mean `{close[0]}`?" if close else "remove it."
        return InvalidRequest(f"Unknown field `{field}`: {hint}", param=field, code="unknown_parameter")
    if missing := _MISSING.match(message):
        field = _join(path, missing["field"])
        return InvalidRequest(f"Missing required field `{field}`.", param=field, code="missing_required_parameter")
    said = message[: at.start()] if at else message
    if not path:
        return InvalidRequest(f"The body must be one JSON object. {said}.", code="invalid_type")
    return InvalidRequest(f"Invalid `{path}`: {said}.", param=path)


def _join(path: str, field: str) -> str:
    return f"{path}.{field}" if path else field


def refuse_unless_neutral(body: msgspec.Struct, neutral: Mapping[str, tuple[Any, ...]], where: str = "") -> None:
    """Refuse by name each field of `neutral` that is set to anything but the values that change nothing.

    Booleans are told from the numbers they equal: `n: true` isn't `n: 1`.
    """
    for field, values in neutral.items():
        value = getattr(body, field)
        if value is None or any(type(value) is type(fine) and value == fine for fine in values):
            continue
        name = _join(where, field)
        allowed = " or ".join(msgspec.json.encode(fine).decode() for fine in values)
        advice = f"leave it out or send {allowed}." if allowed else "leave it out."
        raise InvalidRequest(
            f"`{name}` is not supported by this server: {advice}", param=name, code="unsupported_parameter"
        )
