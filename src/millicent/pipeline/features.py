"""`[features.NAME]`: when an output of a feature counts as useful."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from decimal import Decimal
from typing import TYPE_CHECKING, Annotated, Any

import msgspec

from millicent.core.errors import ConfigError

if TYPE_CHECKING:
    from jsonschema.protocols import Validator

_DEFAULT_SCORE = Decimal("0.5")


class UsefulConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """All that is given must hold. `score` and `labels` judge feedback: a score of at least `score`, a label that is
    one of `labels`. `pattern` (a regular expression found somewhere in it) and `json_schema` (the whole of it is JSON
    that the schema allows) judge the output when it ends. A person's verdict, the latest one, beats the output's.
    """

    score: Decimal | None = None
    labels: tuple[str, ...] = ()
    pattern: str | None = None
    json_schema: dict[str, Any] | None = None


class FeatureConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`useful` says when an output counts as useful; without it, feedback with a score of at least 0.5 does.

    `latency_target_ms` is for its requests that bring no `X-Millicent-Latency-Target-Ms` of their own.
    """

    useful: UsefulConfig = UsefulConfig()
    latency_target_ms: Annotated[int, msgspec.Meta(ge=1)] | None = None


class Features:
    """The rules, ready to judge. Verdicts are None where a rule says nothing of what it is shown."""

    def __init__(self, features: Mapping[str, FeatureConfig]) -> None:
        """Raises ConfigError naming the feature and the setting."""
        self._rules = {name: _Rule(name, feature.useful) for name, feature in features.items()}
        self._default = _Rule("", UsefulConfig())
        self._targets = {name: feature.latency_target_ms for name, feature in features.items()}

    def latency_target_ms(self, feature: str | None) -> int | None:
        return None if feature is None else self._targets.get(feature)

    def judges_output(self, feature: str | None) -> bool:
        return self._rule(feature).judges_output

    def output(self, feature: str | None, text: str) -> bool | None:
        """Of a whole answer."""
        return self._rule(feature).output(text)

    def feedback(self, feature: str | None, score: Decimal | None, label: str | None) -> bool | None:
        return self._rule(feature).feedback(score, label)

    def _rule(self, feature: str | None) -> _Rule:
        return self._default if feature is None else self._rules.get(feature, self._default)


class _Rule:
    def __init__(self, feature: str, config: UsefulConfig) -> None:
        at = f"[features.{feature}.useful]"
        if config.score is not None and not 0 <= config.score <= 1:
            raise ConfigError(f"{at} score = {config.score}: must be from 0 to 1")
        nothing_given = config == UsefulConfig()
        self._score = _DEFAULT_SCORE if nothing_given else config.score
        self._labels = frozenset(config.labels)
        try:
            self._pattern = None if config.pattern is None else re.compile(config.pattern)
        except re.error as error:
            raise ConfigError(f"{at} pattern: not a regular expression ({error})") from error
        self._schema = None if config.json_schema is None else _validator(config.json_schema, at)
        self.judges_output = self._pattern is not None or self._schema is not None

    def feedback(self, score: Decimal | None, label: str | None) -> bool | None:
        verdicts = []
        if self._score is not None and score is not None:
            verdicts.append(score >= self._score)
        if self._labels and label is not None:
            verdicts.append(label in self._labels)
        return all(verdicts) if verdicts else None

    def output(self, text: str) -> bool | None:
        if not self.judges_output:
            return None
        if self._pattern is not None and self._pattern.search(text) is None:
            return False
        return self._schema is None or _is_valid(self._schema, text)


def _validator(schema: dict[str, Any], at: str) -> Validator:
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


def _is_valid(schema: Validator, text: str) -> bool:
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
