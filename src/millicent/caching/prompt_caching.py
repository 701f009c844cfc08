"""Where to mark a prompt for a provider's cache that is paid for by the write: only where it is likely to come again.

A write costs more than fresh input and a read much less. Of each boundary between segments it is known how often what
lies before it came again, and how soon; a mark is set where that pays on average at the provider's prices. What it
really saved is booked when the answer settles, and a tenant whose marks have lost money gets no more of them until its
other traffic could bear it: see `_Account.allows`. Belongs to one thread; what it knows is bounded.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from decimal import Decimal
from typing import Generic, NamedTuple, TypeVar

import msgspec

from millicent.caching.marking import can_mark, longest_mark, with_marks
from millicent.core.clock import NS_PER_S
from millicent.core.holdouts import Arm
from millicent.core.money import Money
from millicent.core.prompts import BYTES_PER_TOKEN, Prompt
from millicent.core.receipts import Receipt
from millicent.core.request import CacheMark, Request
from millicent.core.usage import Leaf, Usage
from millicent.meter.prices import PriceList
from millicent.meter.quotes import CachedInput

# How long a provider keeps a prefix after its last use, less what a request takes until it is read.
TTL_NS: dict[CacheMark, int] = {"5m": 290 * NS_PER_S, "1h": 3590 * NS_PER_S}
# As what each mark makes of what it is the first to have.
WRITTEN: dict[CacheMark, Leaf] = {"5m": Leaf.INPUT_CACHE_WRITE_5M, "1h": Leaf.INPUT_CACHE_WRITE_1H}
# Marks may lose this part of what a tenant's input costs without them, besides what one write does.
ALLOWED_PERCENT = 5
# Shorter prefixes are not kept; a mark on one costs nothing. As the provider's documentation has it, by the beginning
# of what the model's name contains.
_LEAST_TOKENS = {
    "haiku-4-5": 4096,
    "opus-4-5": 4096,
    "opus-4-6": 4096,
    "opus-4-7": 4096,
    "sonnet-4-6": 2048,
    "3-5-haiku": 2048,
    "3-haiku": 2048,
}
_USUAL_LEAST_TOKENS = 1024
# As much as two sightings counts what is known of the family, where little is known of a prefix itself.
_FAMILY_WEIGHT = 2
# A family's counts are halved here, so that it follows its traffic.
_MOST_COUNTED = 256
_MOST_CHAINS = 20_000
_MOST_ACCOUNTS = 2_000
_MOST_FAMILIES = 10_000

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Place(NamedTuple):
    """Where a prefix is kept: what is known of it there says nothing of elsewhere. `model` is its public name, `key`
    the tenant."""

    placement: str
    model: str
    key: str | None


class _Recent(Generic[K, V]):
    """What was used lately."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._kept: OrderedDict[K, V] = OrderedDict()

    def get(self, name: K) -> V | None:
        return self._kept.get(name)

    def use(self, name: K, made: type[V]) -> V:
        found = self._kept.get(name)
        if found is None:
            found = self._kept[name] = made()
            if len(self._kept) > self._most:
                self._kept.popitem(last=False)
        else:
            self._kept.move_to_end(name)
        return found


class _Repeats:
    """How often something came again, of how many times, within each time to live."""

    __slots__ = ("again", "times")

    def __init__(self) -> None:
        self.times = 0
        self.again: dict[CacheMark, int] = {"5m": 0, "1h": 0}

    def note(self, gap_ns: int | None) -> None:
        """Once more, after so long; None: it isn't a repetition."""
        self.times += 1
        for ttl, ttl_ns in TTL_NS.items():
            self.again[ttl] += gap_ns is not None and gap_ns <= ttl_ns
        if self.times > _MOST_COUNTED:
            self.times //= 2
            self.again = {ttl: count // 2 for ttl, count in self.again.items()}


class _Prefix:
    """A prompt's beginning, at one place. `is_tail`: it was a whole prompt, and nothing went on from it yet. `writer`
    is the request that is about to write it, `kept_ns` how long the provider keeps it after each use."""

    __slots__ = ("cached_until_ns", "is_tail", "kept_ns", "repeats", "seen_ns", "writer")

    def __init__(self) -> None:
        self.repeats = _Repeats()
        self.seen_ns: int | None = None
        self.cached_until_ns = self.kept_ns = 0
        self.is_tail = False
        self.writer: str | None = None

    def chance(self, ttl: CacheMark, gap_ns: int, family: float) -> float:
        """That it comes again in time: as often as it did, this time with its gap included."""
        again = self.repeats.again[ttl] + (gap_ns <= TTL_NS[ttl])
        return (again + _FAMILY_WEIGHT * family) / (self.repeats.times + 1 + _FAMILY_WEIGHT)


class _Account:
    """A tenant's model at a placement, in nano-dollars: `balance` is what marks saved less what they cost, `base` what
    all input would have cost without, `at_risk` what those that run may cost."""

    __slots__ = ("at_risk", "balance", "base", "bytes_per_token")

    def __init__(self) -> None:
        self.balance = self.base = self.at_risk = 0
        self.bytes_per_token = float(BYTES_PER_TOKEN)

    def allows(self, surcharge: int) -> bool:
        """Whether all is well if this write is never read: marks have lost nothing so far, and none other runs; or the
        loss is within the part of the base that they may lose. So the input never costs more than that part, and one
        write, above what it would without marks, whatever comes."""
        left = self.balance - self.at_risk
        return left >= 0 or left - surcharge >= -self.base * ALLOWED_PERCENT // 100

    def learn_length(self, prompt: Prompt, tokens: int) -> None:
        if prompt.length and tokens:
            told = min(8.0, max(1.0, prompt.length / tokens))
            self.bytes_per_token += (told - self.bytes_per_token) / 4


class Terms(NamedTuple):
    """Dollars per million tokens: fresh, read from the cache, and written into it, for each time to live on sale; five
    minutes always are."""

    fresh: Decimal
    read: Decimal
    written: dict[CacheMark, Decimal]

    @classmethod
    def of(cls, prices: PriceList | None, input_tokens: int) -> Terms | None:
        """None where they aren't known, or nothing could be saved."""
        tier = None if prices is None else prices.tier(input_tokens)
        if tier is None or tier.input is None or tier.input_cached is None or tier.cache_write_5m is None:
            return None
        written: dict[CacheMark, Decimal] = {"5m": tier.cache_write_5m}
        if tier.cache_write_1h is not None:
            written["1h"] = tier.cache_write_1h
        return cls(tier.input, tier.input_cached, written) if tier.input_cached < tier.input else None

    def gain(self, ttl: CacheMark, chance: float) -> float:
        """Of a token marked each time it comes, per time, in fresh tokens: it is read with this chance, else written
        again."""
        saved, surcharge = self.fresh - self.read, self.written[ttl] - self.fresh
        return (chance * float(saved) - (1 - chance) * float(surcharge)) / float(self.fresh)

    def best(self, chances: Mapping[CacheMark, float]) -> CacheMark | None:
        """For how long to keep a prefix, so that it gains most; None where it gains nothing."""
        gains = {ttl: self.gain(ttl, chance) for ttl, chance in chances.items()}
        best = max(gains, key=gains.__getitem__, default=None)
        return best if best is not None and gains[best] > 0 else None

    def surcharge(self, ttl: CacheMark, tokens: int) -> Money:
        return Money.price(tokens, (self.written[ttl] - self.fresh).scaleb(-6))

    def saved(self, usage: Usage) -> Money:
        """What caches saved of it, less what writing cost."""
        beside = (
            (Leaf.INPUT_CACHE_READ, self.fresh - self.read),
            (Leaf.INPUT_CACHE_WRITE_5M, self.fresh - self.written.get("5m", self.fresh)),
            (Leaf.INPUT_CACHE_WRITE_1H, self.fresh - self.written.get("1h", self.fresh)),
        )
        return Money.total(Money.price(usage.tokens(leaf) or 0, each.scaleb(-6)) for leaf, each in beside)


class Marks(msgspec.Struct, frozen=True):
    """What was decided for one attempt: after which of the prompt's known segments a mark stands, and what that costs
    at most; `cached` is what the cache then makes of the input. Without any it is still seen. Prefixes of fewer than
    `least` tokens aren't kept there. `arm`: where some requests that would be marked are to go without, which of the
    two this is."""

    place: Place
    least: int
    prompt: Prompt
    terms: Terms
    at: tuple[tuple[int, CacheMark], ...] = ()
    surcharge: Money = Money(0)
    cached: CachedInput | None = None
    arm: Arm | None = None


class _Running(NamedTuple):
    marks: Marks
    began_ns: int


class PromptCaching:
    """`marks` decides, `begin` and `settle` tell what came of it."""

    def __init__(self) -> None:
        self._accounts: _Recent[Place, _Account] = _Recent(_MOST_ACCOUNTS)
        self._families: _Recent[tuple[Place, bytes], _Repeats] = _Recent(_MOST_FAMILIES)
        self._prefixes: _Recent[tuple[Place, bytes], _Prefix] = _Recent(_MOST_CHAINS)
        self._running: dict[str, _Running] = {}

    def marks(
        self, request: Request, placement: str, served_model: str, prices: PriceList | None, now_ns: int
    ) -> Marks | None:
        """None where there is nothing to learn or to gain: no prices, no prompt, or the caller set marks."""
        prompt = request.hashed
        if prompt is None or not prompt.segments or longest_mark(request) is not None:
            return None
        place = Place(placement, request.model, request.attribution.key)
        tokens = self._tokens(place, prompt)
        terms = Terms.of(prices, tokens[-1])
        if terms is None:
            return None
        found = Marks(place, least_tokens(served_model), prompt, terms)
        at = [
            (index, ttl)
            for index, ttl in self._worth_marking(found, tokens, now_ns)
            if can_mark(request, _number(prompt, index))
        ]
        while at:
            cached = self._cached_input(found, at, tokens, now_ns)
            surcharge = Money.total(
                found.terms.surcharge(ttl, cached.expected[leaf])
                for ttl, leaf in WRITTEN.items()
                if leaf in cached.expected
            )
            marked = msgspec.structs.replace(found, at=tuple(at), surcharge=surcharge, cached=cached)
            account = self._accounts.get(place) or _Account()
            if not marked.surcharge.nanousd or account.allows(marked.surcharge.nanousd):
                return marked
            at.pop()
        return found

    def begin(self, receipt_id: str, marks: Marks, now_ns: int) -> None:
        """The attempt is about to run. One of the same receipt that ran before has failed."""
        self._release(receipt_id)
        self._running[receipt_id] = _Running(marks, now_ns)
        self._accounts.use(marks.place, _Account).at_risk += marks.surcharge.nanousd
        self._see(marks, now_ns)
        for index, _ in marks.at:
            self._prefix(marks, index).writer = receipt_id

    def settle(self, receipt_id: str, receipt: Receipt | None) -> None:
        """The answer is over; None, or one whose input nobody counted: nothing is known of it."""
        running = self._release(receipt_id)
        tokens = None if receipt is None else receipt.usage.input_tokens
        if running is None or receipt is None or not tokens:
            return
        marks, began_ns = running
        account = self._accounts.use(marks.place, _Account)
        account.base += Money.price(tokens, marks.terms.fresh.scaleb(-6)).nanousd
        account.learn_length(marks.prompt, tokens)
        if not marks.at:
            return
        account.balance += marks.terms.saved(receipt.usage).nanousd
        read = receipt.usage.tokens(Leaf.INPUT_CACHE_READ) or 0
        written = (receipt.usage.tokens(leaf) for leaf in (Leaf.INPUT_CACHE_WRITE_5M, Leaf.INPUT_CACHE_WRITE_1H))
        kept = bool(read or any(written))
        # Where the provider found it: what lies before isn't known to be kept any longer for that.
        ends, length = marks.prompt.ends(), marks.prompt.length
        hit = min((index for index, _ in marks.at), key=lambda index: abs(ends[index] * tokens - read * length))
        for index, ttl in marks.at:
            prefix = self._prefix(marks, index)
            if not kept:
                prefix.cached_until_ns = 0
            elif read and index == hit:
                prefix.cached_until_ns = began_ns + (prefix.kept_ns or TTL_NS[ttl])
            elif not read or index > hit:
                prefix.kept_ns = TTL_NS[ttl]
                prefix.cached_until_ns = began_ns + prefix.kept_ns

    def remember(self, receipt: Receipt) -> None:
        """A receipt from before the start: what was asked, and when."""
        if receipt.prompt is None or not receipt.prompt.segments or receipt.placement is None:
            return
        place = Place(receipt.placement, receipt.model, receipt.attribution.key)
        if receipt.usage.input_tokens:
            self._accounts.use(place, _Account).learn_length(receipt.prompt, receipt.usage.input_tokens)
        unpriced = Terms(Decimal(1), Decimal(1), {})
        least = least_tokens(receipt.served_model or receipt.model)
        self._see(Marks(place, least, receipt.prompt, unpriced), receipt.created_at_ns)

    def _worth_marking(self, found: Marks, tokens: Sequence[int], now_ns: int) -> list[tuple[int, CacheMark]]:
        """In order. The longest prefix that is cached, since reading costs nothing; the longest that came before, if it
        is likely to come again; the whole prompt, if this family's are gone on from; and before any of them the tools
        and the system prompt, which others share and which are written anyway."""
        prompt, least = found.prompt, found.least
        prefixes = [
            self._prefixes.get((found.place, segment.chain)) if length >= least else None
            for segment, length in zip(prompt.segments, tokens, strict=True)
        ]
        cached = _last(prefix is not None and prefix.cached_until_ns > now_ns for prefix in prefixes)
        seen = _last(_gap_ns(prefix, now_ns) is not None for prefix in prefixes)
        gap_ns = None if seen is None else _gap_ns(prefixes[seen], now_ns)
        family = self._family_chances(found, gap_ns if seen is not None and _is_tail(prefixes[seen]) else None)
        wanted: dict[int, CacheMark] = {}
        if cached is not None:
            wanted[cached] = "5m"
        sold = tuple(found.terms.written)
        if seen is not None and (prefix := prefixes[seen]) is not None and gap_ns is not None:
            chances = {ttl: prefix.chance(ttl, gap_ns, family[ttl]) for ttl in sold}
            written_by_another = prefix.writer is not None and prefix.cached_until_ns <= now_ns
            if not written_by_another and (ttl := found.terms.best(chances)) is not None:
                wanted[seen] = ttl
                # What is kept for longer must stand before what isn't.
                sold = tuple(each for each in sold if (each, ttl) != ("1h", "5m"))
        last = len(prompt.segments) - 1
        worth = found.terms.best({ttl: family[ttl] for ttl in sold})
        if last != seen and tokens[last] >= least and worth is not None:
            wanted[last] = worth
        head = _leading(prompt) - 1
        if wanted and head >= 0 and tokens[head] >= least:
            wanted.setdefault(head, "5m")
        longest_kept = max((index for index, ttl in wanted.items() if ttl == "1h"), default=-1)
        return [(index, "1h" if index <= longest_kept else "5m") for index in sorted(wanted)]

    def _family_chances(self, found: Marks, gap_ns: int | None) -> dict[CacheMark, float]:
        """That another prompt goes on from one of this family's; `gap_ns`: after so long this one does, None: it
        doesn't. Where little is known it is unlikely."""
        family = self._families.get(_family(found)) or _Repeats()
        return {
            ttl: (family.again[ttl] + (gap_ns is not None and gap_ns <= ttl_ns)) / (family.times + 2)
            for ttl, ttl_ns in TTL_NS.items()
        }

    def _cached_input(
        self, found: Marks, at: Sequence[tuple[int, CacheMark]], tokens: Sequence[int], now_ns: int
    ) -> CachedInput:
        """What lies before the last mark that is cached would be read; what lies between marks behind it, written."""
        expected: Counter[Leaf] = Counter()
        at_most: Counter[Leaf] = Counter()
        so_far = 0
        for index, ttl in at:
            prefix = self._prefixes.get((found.place, found.prompt.segments[index].chain))
            at_most[WRITTEN[ttl]] += tokens[index] - so_far
            if prefix is None or prefix.cached_until_ns <= now_ns:
                expected[WRITTEN[ttl]] += tokens[index] - so_far
            else:
                expected = Counter({Leaf.INPUT_CACHE_READ: tokens[index]})
            so_far = tokens[index]
        return CachedInput(dict(expected), dict(at_most))

    def _see(self, marks: Marks, now_ns: int) -> None:
        """What of it came again, and whether it goes on from a whole prompt before it."""
        prefix: _Prefix | None = None
        gone_on_ns: int | None = None
        for segment, length in zip(marks.prompt.segments, self._tokens(marks.place, marks.prompt), strict=True):
            if length < marks.least:
                continue
            prefix = self._prefixes.use((marks.place, segment.chain), _Prefix)
            if prefix.seen_ns is not None:
                gap_ns = now_ns - prefix.seen_ns
                prefix.repeats.note(gap_ns)
                if prefix.is_tail:
                    gone_on_ns, prefix.is_tail = gap_ns, False
            prefix.seen_ns = now_ns
        if prefix is not None:
            prefix.is_tail = True
            self._families.use(_family(marks), _Repeats).note(gone_on_ns)

    def _tokens(self, place: Place, prompt: Prompt) -> list[int]:
        """How long the prompt is up to the end of each segment; estimated by what the account's prompts had."""
        account = self._accounts.get(place)
        each = float(BYTES_PER_TOKEN) if account is None else account.bytes_per_token
        return [round(end / each) for end in prompt.ends()]

    def _prefix(self, marks: Marks, index: int) -> _Prefix:
        return self._prefixes.use((marks.place, marks.prompt.segments[index].chain), _Prefix)

    def _release(self, receipt_id: str) -> _Running | None:
        running = self._running.pop(receipt_id, None)
        if running is not None:
            marks = running.marks
            account = self._accounts.use(marks.place, _Account)
            account.at_risk = max(0, account.at_risk - marks.surcharge.nanousd)  # it may have been forgotten meanwhile
            for index, _ in marks.at:
                prefix = self._prefix(marks, index)
                if prefix.writer == receipt_id:
                    prefix.writer = None
        return running


def marked(request: Request, marks: Marks) -> Request:
    """With the marks that were decided on."""
    return with_marks(request, {_number(marks.prompt, index): ttl for index, ttl in marks.at})


def least_tokens(model: str) -> int:
    """The shortest prefix that the provider keeps of this model's."""
    return next((least for name, least in _LEAST_TOKENS.items() if name in model), _USUAL_LEAST_TOKENS)


def _number(prompt: Prompt, index: int) -> int:
    """Of a known segment, among all there were."""
    return index + (prompt.omitted if index >= len(prompt.first) else 0)


def _family(marks: Marks) -> tuple[Place, bytes]:
    """Prompts that begin with the same segment."""
    return marks.place, marks.prompt.segments[0].chain


def _leading(prompt: Prompt) -> int:
    """How many segments come before its first message."""
    kinds = [segment.kind in {"tools", "system"} for segment in prompt.first]
    return kinds.index(False) if False in kinds else len(kinds)


def _is_tail(prefix: _Prefix | None) -> bool:
    return prefix is not None and prefix.is_tail


def _gap_ns(prefix: _Prefix | None, now_ns: int) -> int | None:
    """Since it was last seen, where that is not too long ago for any cache."""
    if prefix is None or prefix.seen_ns is None:
        return None
    gap_ns = now_ns - prefix.seen_ns
    return gap_ns if gap_ns <= TTL_NS["1h"] else None


def _last(found: Iterable[bool]) -> int | None:
    """The place of the last that is true."""
    return max((index for index, each in enumerate(found) if each), default=None)
