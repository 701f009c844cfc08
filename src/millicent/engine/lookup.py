"""Guesses from the text itself: what followed these tokens the last time (prompt lookup)."""

from __future__ import annotations

from collections.abc import Sequence

# Long enough that it mostly means the same passage again, short enough to find it soon.
_GRAM_TOKENS = 3


class Lookup:
    """One sequence's. Finding and keeping up take time in proportion to the new tokens."""

    def __init__(self) -> None:
        self._after: dict[tuple[int, ...], int] = {}  # a gram to where its last occurrence but the current one ends
        self._indexed = _GRAM_TOKENS - 1

    def guess(self, tokens: Sequence[int], most: int) -> list[int]:
        """Up to `most` tokens that may come after these, which are those of the call before and more."""
        for end in range(self._indexed + 1, len(tokens)):
            self._after[tuple(tokens[end - _GRAM_TOKENS : end])] = end
        self._indexed = max(self._indexed, len(tokens) - 1)
        start = self._after.get(tuple(tokens[-_GRAM_TOKENS:]))
        if start is None or most <= 0:
            return []
        guesses = list(tokens[start : start + most])
        while len(guesses) < most:  # what repeats with a short period goes on so
            guesses += guesses[: most - len(guesses)]
        return guesses
