"""Which of a policy's models a request goes to, and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from decimal import Decimal
from pathlib import Path

import msgspec

from millicent.core.clock import NS_PER_MS
from millicent.core.errors import ConfigError, InvalidRequest, MillicentError, PaymentRequired, RateLimited, Unavailable
from millicent.core.holdouts import Arm, told
from millicent.core.money import Money
from millicent.core.quotes import Quote
from millicent.core.receipts import RESPONSE_CACHE, Receipt
from millicent.core.request import Message, Request
from millicent.meter.quotes import Asked
from millicent.routing.checks import Checks
from millicent.routing.config import PolicyConfig, RuleConfig
from millicent.routing.difficulty import Scorer
from millicent.routing.language import language_of

# Keys of a receipt's `policy`.
ROUTING, CHOSEN, WHY, QUOTES, VERIFIED = "routing", "chosen", "why", "quotes_usd", "verified"
_RETRY_S = 5
_MOST_WHY = 300


class Candidate(msgspec.Struct, frozen=True):
    """One of the policy's models, where it would run cheapest; or why it can't be asked."""

    model: str
    asked: Asked | None = None
    quote: Quote | None = None
    refusal: MillicentError | None = None


class Decision(msgspec.Struct, frozen=True):
    """`stages` are asked in order: all but the last are verified, where there are several. `reference` is the
    strongest model, where it could have been asked: what savings are counted against. `arm`: where some requests are
    to go to that one whatever the policy says, which of the two this is."""

    policy: str
    stages: tuple[str, ...]
    why: str
    candidates: tuple[Candidate, ...]
    reference: Asked | None
    arm: Arm | None = None

    def explained(self) -> dict[str, str]:
        """What the receipt says of it: in `quotes_usd` each model's expected cost, or why it couldn't be asked."""
        quotes = {each.model: _said(each) for each in self.candidates}
        return {
            ROUTING: self.policy,
            CHOSEN: self.stages[0],
            WHY: self.why,
            QUOTES: msgspec.json.encode(quotes).decode(),
            **told(self.arm),
        }


class Policy:
    """One `[routing.NAME]`, ready to decide: the same request and candidates give the same decision."""

    def __init__(self, name: str, config: PolicyConfig, home: Path) -> None:
        """Raises ConfigError; `scores` are found from `home`."""
        config.check(name)
        self.name = name
        self.config = config
        self._scorer = None if config.scores is None else Scorer.load(home / config.scores)
        self.checks = None if config.verify is None else Checks(config.verify, f"[routing.{name}] verify")

    def aimed(self, request: Request) -> Request:
        """With the policy's target and price where it has none of its own. Raises InvalidRequest for embeddings."""
        if request.embedding is not None:
            raise InvalidRequest(
                f"`{self.name}` is a routing policy, and vectors of different models can't be compared: name a model.",
                param="model",
                code="unsupported_parameter",
            )
        config = self.config
        target, most = request.latency_target_ms, request.max_cost
        if most is None and config.max_cost_usd is not None:
            most = Money.from_usd(config.max_cost_usd)
        target = config.latency_target_ms if target is None else target
        return msgspec.structs.replace(request, latency_target_ms=target, max_cost=most)

    def decide(self, request: Request, candidates: Sequence[Candidate], arm: Arm | None = None) -> Decision:
        """`candidates` are in the order of the policy's models. Raises why none of them may be asked. Only who could go
        without routing, to the strongest model, has an arm: nobody is refused, or late, for the sake of one."""
        able = [each for each in candidates if each.refusal is None]
        if not able:
            refusals = [each.refusal for each in candidates if each.refusal is not None]
            raise next((each for each in refusals if each.retryable), refusals[-1])
        strongest = next((each for each in able if each.model == self.config.strongest), None)
        if strongest is None or not (_is_quick(strongest, request) and _is_paid(strongest, request)):
            arm = None
        stages: tuple[str, ...]
        if arm is not None and arm.without:
            stages, why = (self.config.strongest,), "held out"
        elif self.config.kind == "cascade":
            stages, why = tuple(each.model for each in able), "the first whose answer is verified"
        else:
            choose = {"rules": self._by_rule, "cheapest": self._cheapest, "learned": self._by_score}[self.config.kind]
            wanted, why = choose(request, able)
            stages = (self._standing_in(wanted, able),)
            if stages[0] != wanted:
                why = f"{why}; `{wanted}` can't be asked: {_refusal_of(wanted, candidates)}"
        reference = None if strongest is None else strongest.asked
        return Decision(self.name, stages, why[:_MOST_WHY], tuple(candidates), reference, arm)

    def _standing_in(self, model: str, able: Sequence[Candidate]) -> str:
        """The model itself, else the next stronger one, else the strongest there is."""
        rank = self.config.models.index
        return next((each.model for each in able if rank(each.model) >= rank(model)), able[-1].model)

    def _by_rule(self, request: Request, able: Sequence[Candidate]) -> tuple[str, str]:
        tokens = next((each.asked.input_tokens for each in able if each.asked is not None), 0)
        for number, rule in enumerate(self.config.rules, 1):
            if _holds(rule, request, tokens):
                return rule.model, f"rule {number}"
        return self.config.strongest, "no rule holds"

    def _by_score(self, request: Request, able: Sequence[Candidate]) -> tuple[str, str]:
        del able
        assert self._scorer is not None
        assert self.config.threshold is not None
        score = Decimal(repr(self._scorer.score(_question(request)))).quantize(Decimal("0.0001"))
        hard = score >= self.config.threshold
        sign = ">=" if hard else "<"
        return self.config.models[int(hard)], f"difficulty {score} {sign} {self.config.threshold}"

    def _cheapest(self, request: Request, able: Sequence[Candidate]) -> tuple[str, str]:
        floor = self.config.quality_floor
        good = [each for each in able if floor is None or self.config.quality[each.model] >= floor]
        if not good:
            raise Unavailable(
                f"No model of `{self.name}` that is as good as its quality_floor = {floor} can be asked now: retry.",
                code="quality_floor_unreachable",
                retry_after_s=_RETRY_S,
            )
        quick = [each for each in good if _is_quick(each, request)]
        if not quick:
            raise RateLimited(
                f"No model of `{self.name}` is expected to answer within {request.latency_target_ms} ms: retry later, "
                "or raise `X-Millicent-Latency-Target-Ms`.",
                code="latency_target_unreachable",
                retry_after_s=_RETRY_S,
            )
        paid = [each for each in quick if _is_paid(each, request)]
        if not paid:
            raise PaymentRequired(
                f"No model of `{self.name}` is expected to cost at most ${request.max_cost}: raise "
                "`X-Millicent-Max-Cost-USD`, or ask for less.",
                code="max_cost_exceeded",
                quote=quick[0].quote,
            )
        chosen = min(paid, key=_dearness)
        at_least = "" if floor is None else f" of those with a quality of at least {floor}"
        return chosen.model, f"the cheapest quote{at_least}"


class Policies:
    """All that are configured, by name."""

    def __init__(self, configs: Mapping[str, PolicyConfig], home: Path) -> None:
        self._policies = {name: Policy(name, config, home) for name, config in configs.items()}

    def names(self) -> tuple[str, ...]:
        return tuple(self._policies)

    def find(self, name: str) -> Policy | None:
        return self._policies.get(name)

    def models_of(self, name: str) -> tuple[str, ...]:
        """The models behind a name: itself where it is no policy."""
        policy = self._policies.get(name)
        return (name,) if policy is None else policy.config.models

    def check_models(self, known: Sequence[str]) -> None:
        """Raises ConfigError where a policy has the name of a model, or names one that isn't served."""
        for name, policy in self._policies.items():
            if name in known:
                raise ConfigError(f"[routing.{name}] there is a model `{name}` too: give the policy another name.")
            judge = policy.config.verify.judge if policy.config.verify else None
            for model in (*policy.config.models, *([judge] if judge else [])):
                if model not in known:
                    raise ConfigError(
                        f"[routing.{name}] this server has no model `{model}`, only {', '.join(known)}: serve it too, "
                        "or take it out."
                    )


def learnable(receipt: Receipt) -> Receipt | None:
    """A receipt as one of the model that answered it, for what is learned from answers of a model; None where its
    times are those of a verification too, or of no model."""
    policy = receipt.policy or {}
    if VERIFIED in policy or policy.get(RESPONSE_CACHE) == "hit":
        return None
    return msgspec.structs.replace(receipt, model=policy[CHOSEN]) if CHOSEN in policy else receipt


def _holds(rule: RuleConfig, request: Request, input_tokens: int) -> bool:
    return (
        (rule.feature is None or rule.feature == request.attribution.feature)
        and (rule.min_input_tokens is None or input_tokens >= rule.min_input_tokens)
        and (rule.max_input_tokens is None or input_tokens <= rule.max_input_tokens)
        and (rule.tools is None or rule.tools == bool(request.tools))
        and (rule.language is None or rule.language == language_of(_question(request)))
    )


def _question(request: Request) -> str:
    """What the user said last, or the whole prompt."""
    if request.prompt is not None:
        return request.prompt_text
    said: list[Message] = [each for each in request.messages or () if each.role == "user"]
    return said[-1].text if said else ""


def _is_quick(candidate: Candidate, request: Request) -> bool:
    """What nobody can predict might be."""
    target, quote = request.latency_target_ms, candidate.quote
    if target is None or quote is None:
        return True
    wait = quote.ttft if request.stream else quote.total
    return wait is None or wait.expected <= target * NS_PER_MS


def _is_paid(candidate: Candidate, request: Request) -> bool:
    cost = _cost(candidate)
    return request.max_cost is None or (cost is not None and cost <= request.max_cost)


def _cost(candidate: Candidate) -> Money | None:
    quote = candidate.quote
    return None if quote is None or quote.cost is None else quote.cost.expected


def _dearness(candidate: Candidate) -> tuple[bool, int]:
    """What nobody can price comes last; the earlier of equals first."""
    cost = _cost(candidate)
    return (True, 0) if cost is None else (False, cost.nanousd)


def _said(candidate: Candidate) -> str | None:
    if candidate.refusal is not None:
        return candidate.refusal.code
    cost = _cost(candidate)
    return None if cost is None else str(cost)


def _refusal_of(model: str, candidates: Sequence[Candidate]) -> str:
    found = next((each.refusal for each in candidates if each.model == model), None)
    return found.code if found is not None else "unknown"
