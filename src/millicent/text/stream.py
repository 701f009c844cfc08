"""Tokens in, showable text out: never half a character, never the beginning of what may become a stop string."""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Sequence
from typing import Protocol

from millicent.core.errors import InvalidRequest


class TokenBytes(Protocol):
    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token adds to the text; none for a control token."""
        ...


class TextStream:
    """One answer's text. Everything pushed comes out again, joined equal to `decode` of all, up to the first stop
    string, which is left out. The first is the one that ends first; of those that end together, the longest.

    A token costs time in proportion to its own text, however long the answer and the stop strings are.
    """

    def __init__(self, tokenizer: TokenBytes, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._matcher = _StopMatcher(stop) if stop else None
        self._state = 0
        self._held = ""  # as long as the state is deep: it begins a stop string
        self.stop = ""  # the stop string that ended it

    def push(self, token: int, *, heed_stops: bool = True) -> str:
        """What can be shown now that `token` has come. Empty once stopped. Until stop strings are heeded, and then it
        is for good, text passes without a look at them."""
        text = self._utf8.decode(self._tokenizer.token_bytes(token))
        return self._show(text) if heed_stops else text

    def finish(self) -> str:
        """What was held back, now that no more tokens come. A character cut off in the middle becomes U+FFFD."""
        shown = self._show(self._utf8.decode(b"", final=True)) + self._held
        self._held = ""
        return shown

    def _show(self, text: str) -> str:
        if self.stop:
            return ""
        if self._matcher is None:
            return text
        matcher, state = self._matcher, self._state
        for index, character in enumerate(text):
            state = matcher.next_state(state, character)
            if matcher.stop_length[state]:
                whole = self._held + text[: index + 1]
                cut = len(whole) - matcher.stop_length[state]
                self._held, self.stop = "", whole[cut:]
                return whole[:cut]
        self._state = state
        whole = self._held + text
        cut = len(whole) - matcher.depth[state]
        self._held = whole[cut:]
        return whole[:cut]


class _StopMatcher:
    """Aho-Corasick over the stop strings: the state is the longest end of the text that begins one of them.

    `depth` is that end's length; `stop_length` the length of the longest stop string that ends here, else 0.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        if not all(stop):
            raise InvalidRequest("stop: a stop string cannot be empty; leave it out", param="stop")
        self._goto: list[dict[str, int]] = [{}]
        self._fail = [0]
        self.depth = [0]
        self.stop_length = [0]
        for string in stop:
            self._add(string)
        self._link()

    def next_state(self, state: int, character: str) -> int:
        while state and character not in self._goto[state]:
            state = self._fail[state]
        return self._goto[state].get(character, 0)

    def _add(self, string: str) -> None:
        state = 0
        for character in string:
            if character not in self._goto[state]:
                self._goto.append({})
                self._fail.append(0)
                self.depth.append(self.depth[state] + 1)
                self.stop_length.append(0)
                self._goto[state][character] = len(self._goto) - 1
            state = self._goto[state][character]
        self.stop_length[state] = len(string)

    def _link(self) -> None:
        """Breadth first, so that a state's failure link is ready before those of its children."""
        queue = deque(self._goto[0].values())
        while queue:
            state = queue.popleft()
            for character, child in self._goto[state].items():
                self._fail[child] = self.next_state(self._fail[state], character)
                self.stop_length[child] = max(self.stop_length[child], self.stop_length[self._fail[child]])
                queue.append(child)
