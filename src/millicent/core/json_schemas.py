"""JSON schemas that somebody configured: whether a text is what one asks for."""

from __future__ import annotations

import json
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from millicent.core.errors import ConfigError

if TYPE_CHECKING:
    from jsonschema.protocols import Validator


def schema_validator(schema: dict[str, Any], at: str) -> Validator:
    """Raises ConfigError where it is no schema; `at` is the section that holds it."""
    from jsonschema.exceptions import SchemaError
    from jsonschema.validators import validator_for
    from referencing import Registry

    plain = _plain(schema)
    kind = validator_for(plain)
    try:
        kind.check_schema(plain)
    except SchemaError as error:
        raise ConfigError(f"{at} json_schema: not a JSON schema ({error.message})") from error
    # An empty registry: a reference to elsewhere is an error, never a download.
    return kind(plain, registry=Registry())


def is_valid(schema: Validator, text: str) -> bool:
    from referencing.exceptions import Unresolvable

    try:
        return bool(schema.is_valid(json.loads(text)))
    except (ValueError, RecursionError, Unresolvable):
        return False


def _plain(value: Any) -> Any:
    """TOML's numbers come as exact decimals; JSON Schema's are JSON's."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return float(value) if isinstance(value, Decimal) else value
