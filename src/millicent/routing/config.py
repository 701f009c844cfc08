"""`[routing.NAME]`: a policy that is asked for like a model, and picks one."""

from __future__ import annotations

from decimal import Decimal
from typing import Annotated, Any, Literal

import msgspec

from millicent.core.errors import ConfigError

Kind = Literal["rules", "cheapest", "cascade", "learned"]

# Settings that only some kinds know.
_FIELDS: dict[Kind, tuple[str, ...]] = {
    "rules": ("rules",),
    "cheapest": ("quality", "quality_floor"),
    "cascade": ("verify",),
    "learned": ("scores", "threshold"),
}
_COMMON = ("kind", "models", "latency_target_ms", "max_cost_usd")


class RuleConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`model` is for requests of which all that is given here holds. `language` is what the last user message seems to
    be in, as a two-letter code."""

    model: str
    feature: str | None = None
    min_input_tokens: Annotated[int, msgspec.Meta(ge=0)] | None = None
    max_input_tokens: Annotated[int, msgspec.Meta(ge=0)] | None = None
    tools: bool | None = None
    language: str | None = None


class VerifyConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What an answer must pass, all that is given: a regular expression found somewhere in it; a JSON schema for the
    whole of it; a mean log probability of its tokens; the yes of a `judge`, another model, to `judge_question`."""

    pattern: str | None = None
    json_schema: dict[str, Any] | None = None
    min_logprob: Decimal | None = None
    judge: str | None = None
    judge_question: str = "Is the answer correct and complete?"


class PolicyConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`model = "NAME"` asks for one of `models`, from the weakest to the strongest, which is what the caller would use
    otherwise: savings are counted against it. `rules` takes the model of the first rule that holds, else the strongest.
    `cheapest` takes the lowest quote among those whose `quality` (0 to 1, of each: `millicent eval` finds it) is at
    least `quality_floor`, and that keep to the latency target and the price. `cascade` asks one after another until an
    answer passes `verify`; the last one's isn't verified. `learned` asks the second of two models where the difficulty
    score of the prompt is at least `threshold`; `scores` is a file that `millicent router train` wrote.

    `latency_target_ms` and `max_cost_usd` are for requests that bring none of their own, nor their feature.
    """

    kind: Kind
    models: tuple[str, ...]
    rules: tuple[RuleConfig, ...] = ()
    quality: dict[str, Decimal] = {}
    quality_floor: Decimal | None = None
    verify: VerifyConfig | None = None
    scores: str | None = None
    threshold: Decimal | None = None
    latency_target_ms: Annotated[int, msgspec.Meta(ge=1)] | None = None
    max_cost_usd: Decimal | None = None

    @property
    def strongest(self) -> str:
        return self.models[-1]

    def check(self, name: str) -> None:
        """Raises ConfigError naming the setting."""
        at = f"[routing.{name}]"
        for field in msgspec.structs.fields(self):
            given = getattr(self, field.name) != field.default if field.default is not msgspec.NODEFAULT else None
            if field.default_factory is not msgspec.NODEFAULT:
                given = bool(getattr(self, field.name))
            if given and field.name not in (*_COMMON, *_FIELDS[self.kind]):
                raise ConfigError(f'{at} {field.name}: doesn\'t go with kind = "{self.kind}": remove it')
        if len(self.models) < 2 or len(set(self.models)) < len(self.models) or name in self.models:
            raise ConfigError(f"{at} models: names a model twice, or itself, or fewer than two: name different models")
        if self.max_cost_usd is not None and not (self.max_cost_usd.is_finite() and self.max_cost_usd > 0):
            raise ConfigError(f"{at} max_cost_usd = {self.max_cost_usd}: must be above 0")
        wrong = getattr(self, f"_{self.kind}_trouble")()
        if wrong:
            raise ConfigError(f"{at} {wrong}")

    def _rules_trouble(self) -> str | None:
        if not self.rules:
            return "rules: there are none: write at least one, { model = ..., feature = ... }"
        for number, rule in enumerate(self.rules, 1):
            if rule.model not in self.models:
                return f"rules: rule {number} names `{rule.model}`, which isn't among models: add it there"
        return None

    def _cheapest_trouble(self) -> str | None:
        unknown = sorted(self.quality.keys() - set(self.models))
        if unknown:
            return f"quality: `{unknown[0]}` isn't among models: add it there"
        for model, quality in self.quality.items():
            if not 0 <= quality <= 1:
                return f"quality: {model} = {quality}: must be from 0 to 1"
        if self.quality_floor is None:
            return None
        unrated = [model for model in self.models if model not in self.quality]
        if unrated:
            return f"quality_floor: the quality of `{unrated[0]}` isn't known: measure it with `millicent eval`"
        if max(self.quality.values()) < self.quality_floor:
            return f"quality_floor = {self.quality_floor}: none of the models is as good: lower it"
        return None

    def _cascade_trouble(self) -> str | None:
        verify = self.verify
        checks = () if verify is None else (verify.pattern, verify.json_schema, verify.min_logprob, verify.judge)
        if verify is None or all(check is None for check in checks):
            return "verify: nothing is verified: give pattern, json_schema, min_logprob or judge"
        if verify.min_logprob is not None and not verify.min_logprob <= 0:
            return f"verify min_logprob = {verify.min_logprob}: log probabilities are at most 0"
        return None

    def _learned_trouble(self) -> str | None:
        if len(self.models) != 2:
            return "models: a learned score chooses between two, the weak and the strong one"
        if self.scores is None or self.threshold is None:
            return "scores, threshold: both are needed: `millicent router train` and `eval` give them"
        if not 0 <= self.threshold <= 1:
            return f"threshold = {self.threshold}: must be from 0 to 1"
        return None
