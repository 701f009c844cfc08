"""`response_format`: what the answer must be."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from millicent.core.errors import InvalidRequest
from millicent.core.request import OutputFormat

_MAX_BYTES = 256 << 10

Name = Annotated[str, msgspec.Meta(pattern="^[a-zA-Z0-9_-]{1,64}$")]


class TextFormat(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="text"):
    """Whatever the model says."""


class JsonObject(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="json_object"):
    """Any JSON object."""


class NamedSchema(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`strict` false is taken as true here: the answer follows the schema either way. An upstream is told."""

    name: Name
    schema: dict[str, Any]
    description: str | None = None
    strict: bool | None = None


class JsonSchema(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="json_schema"):
    json_schema: NamedSchema


class Grammar(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="grammar"):
    """An extension, in the shape of OpenAI's grammars for custom tools."""

    syntax: Literal["lark", "regex"]
    definition: Annotated[str, msgspec.Meta(min_length=1)]


ResponseFormat = TextFormat | JsonObject | JsonSchema | Grammar


def read(form: ResponseFormat | None) -> OutputFormat | None:
    match form:
        case JsonObject():
            return OutputFormat("json_object")
        case JsonSchema():
            source = schema_text(form.json_schema.schema, "response_format.json_schema.schema")
            return OutputFormat("json_schema", source, form.json_schema.name, form.json_schema.strict)
        case Grammar():
            _check_size(len(form.definition), "response_format.definition")
            return OutputFormat(form.syntax, form.definition)
        case _:
            return None


def schema_text(schema: dict[str, Any], where: str) -> str:
    """Raises InvalidRequest for one that is too large."""
    encoded = msgspec.json.encode(schema)
    _check_size(len(encoded), where)
    return encoded.decode()


def _check_size(size: int, where: str) -> None:
    if size > _MAX_BYTES:
        raise InvalidRequest(
            f"`{where}` has {size} bytes, and at most {_MAX_BYTES} are taken: make it smaller.", param=where
        )
