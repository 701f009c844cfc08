"""A pipeline with a response cache, before a backend that can be held up: for tests of who is given what."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from decimal import Decimal
from typing import Any

from millicent.backends.fake import FakeAnswer, FakeBackend
from millicent.caching.cache import ResponseCache
from millicent.caching.config import CacheConfig
from millicent.caching.store import AnswerStore
from millicent.core.chunks import Text, merge_texts
from millicent.core.clock import NS_PER_S, ManualClock
from millicent.core.idempotency import Claim
from millicent.core.identifiers import SequentialIds
from millicent.core.receipts import Receipt
from millicent.core.request import Attribution, Message, Request, Sampling
from millicent.core.usage import Provenance
from millicent.ledger.memory import MemoryLedger
from millicent.meter.meter import Meter
from millicent.meter.placements import PlacementConfig
from millicent.meter.prices import PriceBook, PriceConfig
from millicent.meter.quotes import Quoter
from millicent.pipeline.answer import Answer
from millicent.pipeline.config import LimitsConfig, ModelPolicy
from millicent.pipeline.estimates import Estimates
from millicent.pipeline.features import FeatureConfig, Features
from millicent.pipeline.holdout import Holdout, HoldoutConfig
from millicent.pipeline.pipeline import Pipeline

WORDS = (Text("Hello", 1), Text(" world", 1))
ANYONE = Attribution()
ON = CacheConfig(enabled=True, store="memory")
PRICES = PriceConfig(input=Decimal(10), input_cached=Decimal(1), output=Decimal(100))


class World:
    """A gateway's pipeline before an API whose calls cost $10 and $100 per million tokens."""

    def __init__(
        self,
        answer: FakeAnswer | Callable[[Request], FakeAnswer] | None = None,
        config: CacheConfig = ON,
        *,
        features: dict[str, FeatureConfig] | None = None,
        policies: dict[str, ModelPolicy] | None = None,
        cached_behind: tuple[str, ...] = (),
        holdout: HoldoutConfig | None = None,
    ) -> None:
        self.clock = ManualClock()
        self.ids = SequentialIds()
        self.ledger = MemoryLedger()
        placements = {
            name: PlacementConfig(kind="api", usd_per_hour=None).placement(name) for name in ("here", "elsewhere")
        }
        self.gate = asyncio.Event()  # the backend's, which waits for it before each chunk
        self.gate.set()
        self.backend = FakeBackend(
            answer or FakeAnswer(WORDS, provenance=Provenance.REPORTED),
            models=("fake", "other"),
            placement="here",
            clock=self.clock,
            sleep=self._work,
        )
        store = AnswerStore(None, max_bytes=1 << 20, max_entries=100)
        self.cache = ResponseCache(config, store, self.clock, secret=b"s" * 32, deployed=b"", policies=cached_behind)
        self.told: list[Receipt] = []
        self.pipeline = Pipeline(
            backends=[self.backend],
            ledger=self.ledger,
            meter=Meter(self.clock, "gw", self.ids),
            placements=placements,
            clock=self.clock,
            limits=LimitsConfig(max_concurrent=64),
            features=Features(features or {}),
            estimates=Estimates(Quoter(lambda *_: None), PriceBook({"fake": PRICES, "other": PRICES})),
            policies=policies,
            cache=self.cache,
            holdout=Holdout(holdout or HoldoutConfig()),
            settled=self.told.append,
        )

    async def _work(self, seconds: float) -> None:
        self.clock.advance(int(seconds * NS_PER_S))
        await asyncio.sleep(0)
        await self.gate.wait()

    def request(self, question: str = "hi", *, who: Attribution = ANYONE, **fields: Any) -> Request:
        asked: dict[str, Any] = {"messages": (Message("user", question),), "sampling": Sampling(temperature=0)}
        asked |= fields
        return Request(id=self.ids.new("rcpt"), dialect="openai.chat", model="fake", attribution=who, **asked)

    async def ask(
        self, question: str = "hi", *, claim: Claim | None = None, cache_control: str | None = None, **fields: Any
    ) -> Receipt:
        """The closed receipt. Raises as the answer does."""
        answer = await self.pipeline.admit(self.request(question, **fields), claim, cache_control=cache_control)
        await read(answer)
        return self.receipt(answer)

    async def outcome(self, question: str = "hi", **fields: Any) -> str | None:
        return outcome(await self.ask(question, **fields))

    def receipt(self, answer: Answer) -> Receipt:
        found = self.ledger.queries.receipt(answer.receipt_id)
        assert found is not None
        return found

    @property
    def calls(self) -> int:
        return len(self.backend.requests)


async def read(answer: Answer) -> tuple[Text, ...]:
    pieces: list[Text] = []
    while (news := await answer.take()) is not None:
        pieces += news
    return merge_texts(pieces, in_order=True)


def outcome(receipt: Receipt) -> str | None:
    return (receipt.policy or {}).get("response_cache")


def run(story: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(60):
            await story()

    asyncio.run(bounded())


async def turns(count: int = 20) -> None:
    for _ in range(count):
        await asyncio.sleep(0)
