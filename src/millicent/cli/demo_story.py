"""What happens in the demo: whose requests, of which features, to which models; and what goes wrong.

Everything is drawn from one random source and a moment at which it ends. The companies, models, prices and people are
made up; the sizes are like those of public traces: answers of some hundred tokens, prompts of some thousand, few users
with much of the traffic, quiet nights and weekends.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from decimal import Decimal
from random import Random

import msgspec

from millicent.backends.fake import FakeAnswer
from millicent.core.chunks import FinishReason, Text
from millicent.core.clock import NS_PER_HOUR, NS_PER_S, hour_start_ns
from millicent.core.errors import MillicentError, UpstreamError
from millicent.core.money import Money
from millicent.core.periods import DAY_NS
from millicent.core.request import Attribution, Limits, Message, OutsideCost, Request
from millicent.core.usage import Provenance
from millicent.step_time import Coefficients

# Placement, tokens read and written a second, seconds before anything comes.
SPEEDS = {"aster": (9000, 70, 0.35), "aster-eu": (9000, 65, 0.40)}
# What steps take on machines, in nanoseconds.
STEPS = {
    "gpu-rented": Coefficients(2e6, 300e6, 660_000, 200_000, 2_000, 20),
    "gpu-owned": Coefficients(3e6, 500e6, 1_400_000, 300_000, 3_000, 40),
}
MODELS: dict[str, tuple[str, ...]] = {
    "aster-large": ("aster", "aster-eu"),
    "aster-small": ("aster",),
    "aster-next": ("aster",),
    "owl-8b": ("gpu-rented",),
    "owl-32b": ("gpu-owned",),
}
TIERS = ("free", "pro", "business")

CONFIG = """# A made-up company's configuration. Nothing here is called: the demo stands in for all of it.

[placements.aster]
kind = "api"
provider = "aster"
base_url = "https://aster.invalid/v1"
models = ["aster-large", "aster-small", "aster-next"]

[placements.aster-eu]
kind = "api"
provider = "aster"
base_url = "https://eu.aster.invalid/v1"
models = ["aster-large"]

[placements.gpu-rented]
kind = "rented"
usd_per_hour = 0.24
base_url = "http://gpu-rented.invalid:8000/v1"

[placements.gpu-owned]
kind = "owned"
capital_usd = 2600
life_years = 4
residual_usd = 300
watts = 260
pue = 1.2
usd_per_kwh = 0.24
annual_usd = 100
base_url = "http://gpu-owned.invalid:8000/v1"

[models.aster-large]
deployments = [{ placement = "aster", weight = 3 }, { placement = "aster-eu" }]

[models.aster-small]
placement = "aster"

[models.aster-next]
placement = "aster"

[models.owl-8b]
placement = "gpu-rented"
fallbacks = ["aster-small"]

[models.owl-32b]
placement = "gpu-owned"
fallbacks = ["aster-large"]

[prices.aster-large]
input = 3
input_cached = 0.3
output = 15

[prices.aster-small]
input = 0.25
input_cached = 0.025
output = 2

[features.support-chat]
owner = "support@example.com"
cost_target_usd = 0.006
latency_target_ms = 20000
revenue_usd_per_request = 0.02
margin_target = 0.6

[features.search-answers]
owner = "search@example.com"
cost_target_usd = 0.002
latency_target_ms = 20000
revenue_usd_per_request = 0.005

[features.code-review]
owner = "platform@example.com"
cost_target_usd = 0.02
revenue_usd_per_request = 0.03

[features.meeting-notes]
owner = "notes@example.com"
cost_target_usd = 0.02
revenue_usd_per_request = 0.025

[features.doc-extraction]
owner = "data@example.com"
cost_target_usd = 0.002
revenue_usd_per_request = 0.004

[features.doc-extraction.useful]
pattern = "total: [0-9]+"

[features.autocomplete]
owner = "editor@example.com"
cost_target_usd = 0.0002
latency_target_ms = 1500
revenue_usd_per_request = 0.0006

# What the assistant is sold for, by tier.
[plans.free]

[plans.pro]
price_usd_per_month = 2
margin_target = 0.7

[plans.business]
price_usd_per_month = 6
margin_target = 0.7

[costs.vector-database]
usd_per_month = 8
feature = "search-answers"

[budgets.company]
limit_usd = 400
hard = false

[budgets.teams]
limit_usd = 120
per = "team"
hard = false

[budgets.free-tier]
limit_usd = 60
per = "tier"
only = "free"
hard = false

[ledger]
durability = "process"
"""


class Feature(msgspec.Struct, frozen=True):
    """`share` of the traffic; tokens in and out are the middles of what is drawn; `cached` the part of a conversation's
    prompt that was read before; `tiers` the weights of who uses it; `at_night` it runs by itself. Some come `together`,
    so many on average."""

    name: str | None
    team: str | None
    model: str
    share: int
    input_tokens: int
    output_tokens: int
    cached: float = 0.0
    tiers: tuple[int, int, int] = (6, 3, 1)
    rated: float = 0.0
    liked: float = 0.8
    at_night: bool = False
    together: int = 1
    retrieval_usd: str | None = None


FEATURES = (
    Feature("support-chat", "support", "aster-large", 300, 950, 190, cached=0.55, rated=0.14, liked=0.83),
    Feature("search-answers", "search", "owl-8b", 260, 1400, 110, rated=0.05, together=4, retrieval_usd="0.0004"),
    Feature("code-review", "platform", "owl-32b", 70, 3200, 300, tiers=(0, 4, 6), rated=0.2, liked=0.71, together=2),
    Feature("meeting-notes", "notes", "aster-large", 48, 11000, 620, tiers=(14, 3, 1), rated=0.08, liked=0.9),
    Feature("doc-extraction", "data", "owl-8b", 150, 2200, 80, tiers=(0, 2, 5), at_night=True, together=8),
    Feature("autocomplete", "editor", "aster-small", 110, 320, 14, tiers=(2, 5, 3)),
    Feature(None, None, "aster-small", 28, 600, 120),
    Feature("experiments", "platform", "aster-next", 7, 1500, 300, tiers=(0, 0, 1)),
)

_USERS = [f"user-{number:03d}" for number in range(1, 241)]
# Six in ten are free, one in ten is a business.
_OF_TIER = {
    tier: [user for number, user in enumerate(_USERS) if TIERS[(number % 10 >= 6) + (number % 10 >= 9)] == tier]
    for tier in TIERS
}
_REPLIES = (
    "Thanks, here is what I found for you.",
    "Two things stand out, and the second matters more.",
    "In short: yes, with one exception that you should check.",
    "I have summed it up in three points below.",
)


class Event(msgspec.Struct, frozen=True):
    """A request at its time, what its backend will do when it is asked, in turn, and what comes of it afterwards."""

    at_ns: int
    request: Request
    answers: tuple[FakeAnswer, ...]
    score: Decimal | None
    cancel_after_s: float | None = None


class Story:
    """`days` up to `end_ns`, with about `per_day` requests on a working day."""

    def __init__(self, random: Random, *, days: int, end_ns: int, per_day: int) -> None:
        self._random = random
        self._per_day = per_day
        self.start_ns = hour_start_ns(end_ns) - days * DAY_NS
        self._end_ns = end_ns
        self._jump_ns = _tuesday_before(end_ns)
        self._outage_ns = (end_ns // DAY_NS - min(9, days - 1)) * DAY_NS + 14 * NS_PER_HOUR
        self._number = 0

    def events(self) -> Iterator[Event]:
        """In order."""
        hour_ns = self.start_ns
        while hour_ns < self._end_ns:
            for at_ns, feature in sorted(self._of_hour(hour_ns), key=lambda each: each[0]):
                if at_ns < self._end_ns:
                    yield self._event(at_ns, feature)
            hour_ns += NS_PER_HOUR

    def _of_hour(self, hour_ns: int) -> Iterator[tuple[int, Feature]]:
        hour = hour_ns // NS_PER_HOUR % 24
        weekend = (hour_ns // DAY_NS + 3) % 7 >= 5  # the epoch was a Thursday
        growth = 1 + 0.3 * (hour_ns - self.start_ns) / max(self._end_ns - self.start_ns, 1)
        by_day = (0.35 if weekend else 1.0) * growth * max(0.08, math.sin(math.pi * (hour - 5) / 17)) / 11.5
        by_night = growth / 5 if hour < 5 else 0.0
        whole = sum(feature.share for feature in FEATURES)
        for feature in FEATURES:
            expected = self._per_day * feature.share / whole * (by_night if feature.at_night else by_day)
            count = _poisson(self._random, expected)
            moments = [self._random.randrange(NS_PER_HOUR) for _ in range(-(-count // feature.together))]
            for number in range(count):
                yield hour_ns + moments[number // feature.together] + self._random.randrange(NS_PER_S), feature

    def _event(self, at_ns: int, feature: Feature) -> Event:
        random = self._random
        self._number += 1
        tier = random.choices(TIERS, feature.tiers)[0]
        user = user_of(random, tier)
        input_tokens = _around(random, feature.input_tokens)
        if feature.name == "support-chat" and at_ns >= self._jump_ns:
            input_tokens = int(input_tokens * 2.6)  # somebody put the whole handbook into the prompt
        output_tokens = _around(random, feature.output_tokens)
        cached = int(input_tokens * feature.cached * random.uniform(0.5, 1.0)) if feature.cached else 0
        attribution = Attribution(
            user=None if feature.name is None else user,
            team=feature.team,
            feature=feature.name,
            tier=tier,
            conversation=f"conv-{user}-{at_ns // (6 * NS_PER_HOUR)}" if feature.cached else None,
            tags={"demo": "true"},
        )
        request = Request(
            id="",
            dialect="openai.chat",
            model=feature.model,
            messages=(Message(role="user", content=f"Made-up question {self._number}."),),
            limits=Limits(max_tokens=4 * feature.output_tokens),
            stream=random.random() < 0.7,
            attribution=attribution,
            outside_costs=_retrieval(feature, at_ns),
        )
        rated = random.random() < feature.rated
        return Event(
            at_ns,
            request,
            self._answers(at_ns, feature, input_tokens, cached, output_tokens),
            Decimal(1 if random.random() < feature.liked else 0) if rated else None,
            random.uniform(0.5, 4.0) if random.random() < 0.012 else None,
        )

    def _answers(
        self, at_ns: int, feature: Feature, input_tokens: int, cached: int, output_tokens: int
    ) -> tuple[FakeAnswer, ...]:
        place = MODELS[feature.model][0]
        words = self._random.choice(_REPLIES)
        if feature.at_night:
            words = f"total: {self._random.randrange(20, 4000)}" if self._random.random() < 0.93 else "no total found"
        good = answer(place, input_tokens, cached, output_tokens, words)
        if feature.model == "owl-8b" and 0 <= at_ns - self._outage_ns < 50 * 60 * NS_PER_S:
            gone = UpstreamError("the server at gpu-rented is unreachable: connection refused", retryable=True)
            return (*[_failed(good, gone)] * 3, answer("aster", input_tokens, 0, output_tokens, words))
        if self._random.random() < (0.018 if place == "aster" else 0.004):
            busy = UpstreamError("the provider is overloaded (529)", retryable=True)
            return (_failed(good, busy), good)
        if self._random.random() < 0.003:
            return (_failed(good, UpstreamError("the provider refused the prompt (400)", retryable=False)),)
        return (good,)


def user_of(random: Random, tier: str) -> str:
    """Few have much of the traffic."""
    users = _OF_TIER[tier]
    return users[min(int(len(users) * random.random() ** 2.6), len(users) - 1)]


def passer_by(random: Random) -> tuple[Feature, dict[str, str]]:
    """Who asks something while the demo is shown: for which feature, and the headers that say so."""
    feature = random.choices(FEATURES, [each.share for each in FEATURES])[0]
    tier = random.choices(TIERS, feature.tiers)[0]
    named = {"User": user_of(random, tier), "Team": feature.team, "Feature": feature.name, "Tier": tier}
    return feature, {f"X-Millicent-{name}": value for name, value in named.items() if value and feature.name}


def improvised(random: Random, feature: Feature, model: str) -> FakeAnswer:
    """What such a request gets of this model."""
    place = MODELS[model][0]
    sizes = (_around(random, feature.input_tokens), _around(random, feature.output_tokens))
    return answer(place, sizes[0], int(sizes[0] * feature.cached), sizes[1], random.choice(_REPLIES))


def answer(place: str, input_tokens: int, cached: int, output_tokens: int, words: str) -> FakeAnswer:
    """In four parts: the first reads the prompt, the others are written at the placement's speed."""
    reads, writes, waits_s = SPEEDS.get(place, (1, 1, 0))  # machines take what their steps take
    parts = min(4, output_tokens)
    sizes = [output_tokens // parts + (i < output_tokens % parts) for i in range(parts)]
    pieces = [words] + ["" if i % 2 else " And so on." for i in range(1, parts)]
    seconds = waits_s + (input_tokens - cached) / reads + output_tokens / writes
    return FakeAnswer(
        chunks=tuple(Text(text or " It goes on.", tokens) for text, tokens in zip(pieces, sizes, strict=True)),
        delay_s=seconds / parts,
        input_tokens=input_tokens,
        cached_tokens=cached,
        context_tokens=200_000,
        provenance=Provenance.MEASURED if place in STEPS else Provenance.REPORTED,
    )


def _failed(good: FakeAnswer, error: MillicentError) -> FakeAnswer:
    return msgspec.structs.replace(good, chunks=(), error=error, finish=FinishReason.ERROR)


def _retrieval(feature: Feature, at_ns: int) -> tuple[OutsideCost, ...]:
    if feature.retrieval_usd is None:
        return ()
    amount = Money.from_usd(feature.retrieval_usd)
    return (OutsideCost("retrieval", "other", Decimal(1), "search", amount, "vector search", at_ns),)


def _tuesday_before(end_ns: int) -> int:
    """09:00 UTC of the last Tuesday at least two days before."""
    day = end_ns // DAY_NS - 2
    while (day + 3) % 7 != 1:
        day -= 1
    return day * DAY_NS + 9 * NS_PER_HOUR


def _around(random: Random, middle: int) -> int:
    """Log-normal around it, never nothing."""
    return max(2, int(middle * random.lognormvariate(0, 0.45)))


def _poisson(random: Random, mean: float) -> int:
    """Knuth's method; means here are small."""
    limit, product, count = math.exp(-mean), random.random(), 0
    while product > limit:
        product *= random.random()
        count += 1
    return count
