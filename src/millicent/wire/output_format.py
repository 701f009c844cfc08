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
    """Any JSON object; one of the `schema`, as llama.cpp's server has it."""

    schema: dict[str, Any] | None = None


class NamedSchema(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`strict` false is taken as true here: the answer follows the schema either way. An upstream is told."""

    schema: dict[str, Any]
    name: Name = "answer"
    description: str | None = None
    strict: bool | None = None


class JsonSchema(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="json_schema"):
    json_schema: NamedSchema


class Grammar(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="grammar"):
    """An extension, in the shape of OpenAI's grammars for custom tools."""

    syntax: Literal["lark", "regex"]
    definition: Annotated[str, msgspec.Meta(min_length=1)]


Choice = Annotated[list[Annotated[str, msgspec.Meta(min_length=1)]], msgspec.Meta(min_length=1, max_length=1024)]
ResponseFormat = TextFormat | JsonObject | JsonSchema | Grammar


class StructuredOutputs(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """vLLM's way to say it; its older `guided_*` fields are the same one by one. A grammar is Lark or GBNF."""

    json: dict[str, Any] | str | None = None
    json_object: bool | None = None
    regex: Annotated[str, msgspec.Meta(min_length=1)] | None = None
    choice: Choice | None = None
    grammar: Annotated[str, msgspec.Meta(min_length=1)] | None = None

    def read(self, where: str) -> OutputFormat | None:
        """`where` names the field it came as."""
        given = [field for field in self.__struct_fields__ if getattr(self, field) not in (None, False)]
        if len(given) > 1:
            raise InvalidRequest(f"`{where}` has {given[0]} and {given[1]}: send one of them.", param=where)
        if isinstance(self.json, str):
            _check_size(len(self.json), where)
            return OutputFormat("json_schema", self.json)
        if self.json is not None:
            return OutputFormat("json_schema", schema_text(self.json, where))
        if self.regex is not None:
            _check_size(len(self.regex), where)
            return OutputFormat("regex", self.regex)
        grammar = self.grammar
        if self.choice is not None:
            grammar = "start: " + " | ".join(msgspec.json.encode(one).decode() for one in self.choice)
        if grammar is not None:
            _check_size(len(grammar), where)
            return OutputFormat("lark", grammar)
        return OutputFormat("json_object") if self.json_object else None


def read(form: ResponseFormat | None) -> OutputFormat | None:
    match form:
        case JsonObject(schema) if schema is not None:
            return OutputFormat("json_schema", schema_text(schema, "response_format.schema"))
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
