"""What a model thinks before it answers: the text between `<think>` and `</think>`, where an answer begins with it."""

from __future__ import annotations

from enum import Enum, auto

_OPENING, _CLOSING = "<think>", "</think>"


def reasons(template: str) -> bool:
    """Whether the model with this chat template thinks before it answers."""
    return _CLOSING in template


def without_reasoning(prompt: str) -> str:
    """The prompt with a thought that is over before it began, so that the answer comes at once. One that the template
    has closed already stays as it is."""
    if prompt.rstrip().endswith(_CLOSING):
        return prompt
    return f"{prompt}{'' if opens_reasoning(prompt) else _OPENING}\n\n{_CLOSING}\n\n"


def opens_reasoning(prompt: str) -> bool:
    """Whether the prompt ends where the model is to think."""
    return prompt.rstrip().endswith(_OPENING)


class _State(Enum):
    BEGINNING = auto()
    THINKING = auto()
    THOUGHT = auto()
    ANSWER = auto()


class ReasoningSplitter:
    """One answer's text as it comes. White space around the tags and before the answer belongs to neither.

    It goes by characters, so where the pieces are cut changes nothing. An answer that doesn't begin with the tag is
    passed on as it is.
    """

    def __init__(self, *, begun: bool) -> None:
        """`begun`: the prompt has opened the tag."""
        self._state = _State.THINKING if begun else _State.BEGINNING
        self._held = ""
        self._any = False
        self._reasoning: list[str] = []
        self._answer: list[str] = []

    @property
    def thinking(self) -> bool:
        return self._state is _State.THINKING

    def feed(self, text: str) -> tuple[str, str]:
        """The reasoning and the answer's text that this adds."""
        for character in text:
            match self._state:
                case _State.BEGINNING:
                    self._begin(character)
                case _State.THINKING:
                    self._think(character)
                case _State.THOUGHT if character.isspace():
                    continue
                case _:
                    self._state = _State.ANSWER
                    self._answer.append(character)
        return self._news()

    def finish(self) -> tuple[str, str]:
        """What was held back, now that no more text comes."""
        if self._state is _State.BEGINNING:
            self._answer.append(self._held)
        elif self._state is _State.THINKING:
            self._tell(self._held.rstrip())
        self._held = ""
        return self._news()

    def _news(self) -> tuple[str, str]:
        news = "".join(self._reasoning), "".join(self._answer)
        self._reasoning, self._answer = [], []
        return news

    def _begin(self, character: str) -> None:
        self._held += character
        begun = self._held.lstrip()
        if begun == _OPENING:
            self._held, self._state = "", _State.THINKING
        elif not _OPENING.startswith(begun):
            self._answer.append(self._held)
            self._held, self._state = "", _State.ANSWER

    def _think(self, character: str) -> None:
        """Holds what may be the end, and the white space before it."""
        self._held += character
        if self._held.endswith(_CLOSING):
            self._tell(self._held.removesuffix(_CLOSING).rstrip())
            self._held, self._state = "", _State.THOUGHT
            return
        kept = next((size for size in range(len(_CLOSING) - 1, 0, -1) if self._held.endswith(_CLOSING[:size])), 0)
        decided = self._held[: len(self._held) - kept].rstrip()
        self._tell(decided)
        self._held = self._held[len(decided) :]

    def _tell(self, thought: str) -> None:
        self._reasoning.append(thought if self._any else thought.lstrip())
        self._any = self._any or bool(thought.strip())
