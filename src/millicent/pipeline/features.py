"""`[features.NAME]`: whose a feature is, what it should cost and take, where it runs, and when its output is useful."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import TYPE_CHECKING, Annotated, Any

import msgspec

from millicent.core.errors import ConfigError
from millicent.core.json_schemas import is_valid, schema_validator
from millicent.core.request import Message

if TYPE_CHECKING:
    pass

# Labels of feedback that tell how the tool did that an output called.
TOOL_SUCCEEDED = "tool_succeeded"
TOOL_FAILED = "tool_failed"
_DEFAULT_SCORE = Decimal("0.5")


class UsefulConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """All that is given must hold. `score` and `labels` judge feedback: a score of at least `score`, a label that is
    one of `labels`. `pattern` (a regular expression found somewhere in it) and `json_schema` (the whole of it is JSON
    that the schema allows) judge the output when it ends. With `tool_succeeded` the tool that it called judges: by the
    feedback `tool_succeeded` or `tool_failed`, or its answer in the conversation's next request, in which
    `tool_failure` is a regular expression that tells of a failure. The latest verdict beats the output's own.
    """

    score: Decimal | None = None
    labels: tuple[str, ...] = ()
    pattern: str | None = None
    json_schema: dict[str, Any] | None = None
    tool_succeeded: bool = False
    tool_failure: str | None = None


class FeatureConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`owner` answers for it. Its requests run only on these `placements`, whatever model or fallback; without them, on
    any. Its answers should cost at most `cost_target_usd` on average: `report --by feature` shows both, and nothing is
    refused for that. `latency_target_ms` is for requests that bring no `X-Millicent-Latency-Target-Ms` of their own.
    `useful` says when an output counts as useful; without it, feedback with a score of at least 0.5 does.
    """

    owner: str | None = None
    placements: tuple[str, ...] | None = None
    cost_target_usd: Decimal | None = None
    latency_target_ms: Annotated[int, msgspec.Meta(ge=1)] | None = None
    useful: UsefulConfig = UsefulConfig()

    def check(self, name: str) -> None:
        """Raises ConfigError naming the setting."""
        usd = self.cost_target_usd
        if usd is not None and not (usd.is_finite() and usd > 0):
            raise ConfigError(f"[features.{name}] cost_target_usd = {usd}: must be above 0")


class Features:
    """The rules, ready to judge. Verdicts are None where a rule says nothing of what it is shown."""

    def __init__(self, features: Mapping[str, FeatureConfig]) -> None:
        """Raises ConfigError naming the feature and the setting."""
        for name, feature in features.items():
            feature.check(name)
        self._rules = {name: _Rule(name, feature.useful) for name, feature in features.items()}
        self._default = _Rule("", UsefulConfig())
        self.judges_tools = any(rule.judges_tools for rule in self._rules.values())
        self._placements = {
            name: frozenset(feature.placements) for name, feature in features.items() if feature.placements is not None
        }
        self._targets = {name: feature.latency_target_ms for name, feature in features.items()}

    def placements(self, feature: str | None) -> frozenset[str] | None:
        """Where its requests may run; None is anywhere."""
        return None if feature is None else self._placements.get(feature)

    def latency_target_ms(self, feature: str | None) -> int | None:
        return None if feature is None else self._targets.get(feature)

    def judges_output(self, feature: str | None) -> bool:
        return self._rule(feature).judges_output

    def output(self, feature: str | None, text: str) -> bool | None:
        """Of a whole answer."""
        return self._rule(feature).output(text)

    def feedback(self, feature: str | None, score: Decimal | None, label: str | None) -> bool | None:
        return self._rule(feature).feedback(score, label)

    def tools(self, feature: str | None, answers: Sequence[Message]) -> bool | None:
        """Of an output's calls, by what the tools answered: all must have succeeded."""
        return self._rule(feature).tools(answers)

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
        self._pattern = _pattern(config.pattern, f"{at} pattern")
        self._tool_failure = _pattern(config.tool_failure, f"{at} tool_failure")
        self.judges_tools = config.tool_succeeded
        if config.tool_failure is not None and not config.tool_succeeded:
            raise ConfigError(f"{at} tool_failure: says nothing without tool_succeeded = true")
        self._schema = None if config.json_schema is None else schema_validator(config.json_schema, at)
        self.judges_output = self._pattern is not None or self._schema is not None

    def feedback(self, score: Decimal | None, label: str | None) -> bool | None:
        verdicts = []
        if self._score is not None and score is not None:
            verdicts.append(score >= self._score)
        if self._labels and label is not None:
            verdicts.append(label in self._labels)
        if self.judges_tools and label in {TOOL_SUCCEEDED, TOOL_FAILED}:
            verdicts.append(label == TOOL_SUCCEEDED)
        return all(verdicts) if verdicts else None

    def tools(self, answers: Sequence[Message]) -> bool | None:
        return not any(map(self._failed, answers)) if self.judges_tools and answers else None

    def _failed(self, answer: Message) -> bool:
        """What its caller says of it, where the dialect has a word for that; else what it says itself."""
        if answer.failed:
            return True
        if self._tool_failure is not None:
            return self._tool_failure.search(answer.text) is not None
        return _tells_of_an_error(answer.text)

    def output(self, text: str) -> bool | None:
        if not self.judges_output:
            return None
        if self._pattern is not None and self._pattern.search(text) is None:
            return False
        return self._schema is None or is_valid(self._schema, text)


def _pattern(source: str | None, at: str) -> re.Pattern[str] | None:
    try:
        return None if source is None else re.compile(source)
    except re.error as error:
        raise ConfigError(f"{at}: not a regular expression ({error})") from error


def _tells_of_an_error(content: str) -> bool:
    """A JSON object with a member that says so, as tools and MCP servers write them."""
    try:
        told = json.loads(content)
    except (ValueError, RecursionError):
        return False
    return isinstance(told, dict) and any(told.get(name) for name in ("error", "isError", "is_error"))
