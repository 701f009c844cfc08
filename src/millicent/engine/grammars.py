"""Grammars at work: compiled beside the steps, then one mask per token."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from millicent.core.errors import InvalidRequest
from millicent.text.grammars import compile_grammar

if TYPE_CHECKING:
    import llguidance
    import numpy as np

Vocabulary = Callable[[int, Iterable[int]], "llguidance.LLTokenizer"]
"""Makes the vocabulary of a model's output of that size, given the tokens that end an answer."""

_KEPT = 64


class GrammarCompiler:
    """Compiles one model's grammars, one after another on a thread of its own, and keeps the last ones.

    `wake` is called from that thread whenever one is done.
    """

    def __init__(self, vocabulary: Vocabulary | None, size: int, ends: Iterable[int], wake: Callable[[], None]) -> None:
        self._make_vocabulary = vocabulary
        self._size = size
        self._ends = sorted(end for end in ends if end < size)
        self._wake = wake
        self._vocabulary: llguidance.LLTokenizer | None = None
        self._thread = ThreadPoolExecutor(1, "grammars")
        self._kept: OrderedDict[str, Future[llguidance.LLMatcher]] = OrderedDict()

    def compile(self, source: str) -> Future[llguidance.LLMatcher]:
        """Ready for the first token; each answer takes a copy. Fails with InvalidRequest."""
        found = self._kept.get(source)
        if found is None:
            found = self._kept[source] = self._thread.submit(self._compile, source)
            found.add_done_callback(lambda _: self._wake())
            if len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(source)
        return found

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _compile(self, source: str) -> llguidance.LLMatcher:
        if self._make_vocabulary is None or not self._ends:
            raise InvalidRequest("this model's answers cannot follow a grammar; leave it out")
        if self._vocabulary is None:
            self._vocabulary = self._make_vocabulary(self._size, self._ends)
        return compile_grammar(source, self._vocabulary)


class Grammar:
    """What may come next in one answer. Tokens are taken once each: one that is computed again isn't drawn again."""

    def __init__(self, matcher: llguidance.LLMatcher, size: int) -> None:
        """`size` is that of the model's output, padding included."""
        self._matcher = matcher
        self._size = size

    @property
    def finished(self) -> bool:
        """Nothing but the end may come."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    @property
    def error(self) -> str:
        """Why it cannot go on; empty while it can."""
        if not self._matcher.is_error():
            return ""
        return "the grammar became too complex on the way; simplify the schema, or bound its repetitions"

    def take(self, token: int) -> None:
        self._matcher.consume_token(token)

    def valid(self, tokens: list[int]) -> int:
        """How many of these tokens could come next, one after another."""
        return self._matcher.validate_tokens(tokens)

    def copy(self) -> Grammar:
        return Grammar(self._matcher.deep_copy(), self._size)

    def mask(self, scores: np.ndarray) -> None:
        """Leave only what may come (float32 [vocabulary], in place)."""
        import numpy as np

        if bits := self.allowed():
            mask = np.unpackbits(np.frombuffer(bits, dtype=np.uint8), bitorder="little", count=self._size)
            scores[mask == 0] = -np.inf

    def allowed(self) -> bytes:
        """A bit for each token, lowest first, set where it may come next; empty when the grammar cannot go on."""
        bits = self._matcher.compute_bitmask()
        return b"" if self._matcher.is_error() else bits
