"""What is made of a prompt besides its answer: its hashes, marks for a provider's cache, and where it is held."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterable

import msgspec

from millicent.caching.marking import longest_mark
from millicent.caching.prompt_caching import WRITTEN, Marks, PromptCaching, marked
from millicent.caching.segments import prompt_of
from millicent.core import holdouts
from millicent.core.clock import Clock
from millicent.core.money import ZERO
from millicent.core.prompts import BYTES_PER_TOKEN, Prompt
from millicent.core.protocols import Backend, Call
from millicent.core.receipts import Receipt
from millicent.core.request import Request
from millicent.meter.prices import Prices
from millicent.meter.quotes import ALL_INPUT, CachedInput

PricesOf = Callable[[Call], Prices | None]


class Prompts:
    """`secret` keys the hashes; without it there are none, and nothing that rests on them. `kept_at` are the placements
    whose provider keeps what is marked; at `marked_at` prompts are marked."""

    def __init__(
        self, secret: bytes | None, clock: Clock, marked_at: Collection[str] = (), kept_at: Collection[str] = ()
    ) -> None:
        self._secret = secret
        self._clock = clock
        self._kept_at = frozenset(kept_at)
        self._marked_at = frozenset(marked_at)
        self._caching = PromptCaching()

    def hashed(self, request: Request) -> Request:
        if self._secret is None:
            return request
        return msgspec.structs.replace(request, hashed=prompt_of(request, self._secret))

    async def prepare(
        self, request: Request, backend: Backend, prices_of: PricesOf, arm: holdouts.Arm | None
    ) -> tuple[Request, Call, Marks | None]:
        """The request as the backend would run it, with marks where they pay. A request whose maximum isn't ten times
        what writes may cost beyond fresh input is not marked, nor is who is to go without."""
        call = await backend.prepare(request)
        if call.placement not in self._marked_at:
            return request, call, None
        prices = prices_of(call)
        service = None if prices is None else prices.service
        marks = self._caching.marks(request, call.placement, call.served_model, service, self._clock.now_ns())
        if marks is None or not marks.at:
            return request, call, marks
        most = request.max_cost
        if most is not None and marks.surcharge.nanousd * 10 > most.nanousd:
            return request, call, _unmarked(marks)
        marks = msgspec.structs.replace(marks, arm=arm)
        if arm is not None and arm.without:
            return request, call, _unmarked(marks)
        request = marked(request, marks)
        return request, await backend.prepare(request), marks

    def cached(self, request: Request, call: Call, marks: Marks | None) -> CachedInput | None:
        """What the provider's cache makes of its input. Of marks that the caller set nobody knows what is there
        already: all of it may have to be written."""
        if marks is not None and marks.at:
            return marks.cached
        ttl = longest_mark(request) if call.placement in self._kept_at else None
        return None if ttl is None else CachedInput({}, {WRITTEN[ttl]: ALL_INPUT})

    def begun(self, receipt_id: str, marks: Marks | None) -> None:
        """An attempt is about to run."""
        if marks is not None:
            self._caching.begin(receipt_id, marks, self._clock.now_ns())

    def settled(self, receipt_id: str, receipt: Receipt | None) -> None:
        """None where the usage on the receipt isn't that of the last attempt."""
        self._caching.settle(receipt_id, receipt)

    def remember(self, receipts: Iterable[Receipt]) -> None:
        """What was asked before the start, oldest first."""
        for receipt in receipts:
            if receipt.placement in self._marked_at:
                self._caching.remember(receipt)


def _unmarked(marks: Marks) -> Marks:
    return msgspec.structs.replace(marks, at=(), surcharge=ZERO, cached=None)


def told_of(marks: Marks | None) -> dict[str, str]:
    """What a receipt says of them: `3 for 5m`, or `1 for 1h, 1 for 5m`."""
    kept = Counter(ttl for _, ttl in marks.at) if marks is not None else Counter()
    said = {"prompt_cache_marks": ", ".join(f"{kept[ttl]} for {ttl}" for ttl in sorted(kept))} if kept else {}
    return said | holdouts.told(None if marks is None else marks.arm)


# A conversation shorter than this is read again as soon as it is moved.
_LEAST_BYTES = 1024 * BYTES_PER_TOKEN
_MOST_HELD = 50_000


class Affinity:
    """Where conversations were answered last: there their prompts' beginnings are likely to be in a cache. A tenant's
    say nothing of another's. Bounded: those that were longest not gone on with are forgotten."""

    def __init__(self) -> None:
        self._places: OrderedDict[tuple[str, str | None, bytes], str] = OrderedDict()

    def held(self, model: str, key: str | None, prompt: Prompt | None, place: str) -> None:
        """The whole prompt was answered there."""
        if prompt is None or prompt.length < _LEAST_BYTES:
            return
        name = (model, key, prompt.segments[-1].chain)
        self._places[name] = place
        self._places.move_to_end(name)
        if len(self._places) > _MOST_HELD:
            self._places.popitem(last=False)

    def holder(self, model: str, key: str | None, prompt: Prompt | None) -> str | None:
        """Where the longest earlier prompt was answered that this one goes on from, or repeats."""
        if prompt is None or prompt.length < _LEAST_BYTES:
            return None
        found = (self._places.get((model, key, segment.chain)) for segment in reversed(prompt.segments))
        return next((place for place in found if place is not None), None)
