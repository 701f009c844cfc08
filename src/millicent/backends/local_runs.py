"""A call to the local engine, before and while it runs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from hashlib import blake2b

import msgspec

from millicent.core.chunks import CallPiece, Candidate, Chunk, End, FinishReason, Text, TokenLogprob, merge_pieces
from millicent.core.errors import InvalidRequest, MillicentError
from millicent.core.usage import Provenance, Usage
from millicent.engine.protocol import Output, ScoredToken, Submit
from millicent.text.reasoning import ReasoningSplitter
from millicent.text.tools import ToolCallParser, ToolFormat

Label = Callable[[int], bytes]
"""What a token is shown as: its text's bytes, or a control token's name."""


def choice_seed(seed: int | None, choice: int) -> int | None:
    """The seed of one of a request's choices: the first has the request's own, and each the same every time."""
    if seed is None or choice == 0:
        return seed
    key = (seed % 2**64).to_bytes(8, "little") + choice.to_bytes(8, "little")
    return int.from_bytes(blake2b(key, digest_size=8, person=b"choice").digest(), "little")


class Reading(msgspec.Struct, frozen=True):
    """How an answer's text is read: whether the model thinks first, and the prompt has begun that; the tools it may
    call, and how."""

    reasons: bool = False
    thinks: bool = False
    tools: ToolFormat | None = None
    names: tuple[str, ...] = ()


class _Choice:
    """One sequence of a run: what waits for the reader, and how it ended."""

    def __init__(self, index: int, echo: str, reading: Reading) -> None:
        self.index = index
        self.reason: FinishReason | None = None
        self.cached_tokens: int | None = None
        self.prefilled_tokens = 0
        self._echo = echo
        self.reasoning_tokens = 0
        self._splitter = ReasoningSplitter(begun=reading.thinks) if reading.reasons else None
        self._parser = ToolCallParser(reading.tools, reading.names) if reading.tools and reading.names else None
        self._reasoning: list[str] = []
        self._calls: list[CallPiece] = []
        self._begun = False
        self._text: list[str] = []
        self._tokens = 0
        self._stop = ""
        self._logprobs: list[TokenLogprob] = []

    def take(self, output: Output, label: Label) -> None:
        if output.cached_tokens is not None:
            self.cached_tokens = output.cached_tokens
        if not self._begun and (output.tokens or output.finish == FinishReason.LENGTH.value):
            self._begun = True
            self._push(self._echo)
        thinking = self._splitter is not None and self._splitter.thinking
        self._push(output.text)
        if thinking or (self._splitter is not None and self._splitter.thinking):
            self.reasoning_tokens += output.tokens
        if output.finish:
            self._finish()
        self._tokens += output.tokens
        self._stop = output.stop
        self._logprobs += [_shown(scored, label) for scored in (*output.scored_prompt, *output.scored)]

    @property
    def has_news(self) -> bool:
        return bool(self._text or self._calls or self._reasoning or self._stop) or (
            self.reason is not None and bool(self._logprobs)
        )

    def end(self, reason: FinishReason) -> FinishReason:
        called = self._parser is not None and self._parser.calls and reason is FinishReason.STOP
        self.reason = FinishReason.TOOL_CALLS if called else reason
        return self.reason

    def news(self, cached_tokens: int | None) -> Text:
        text = Text(
            "".join(self._text),
            self._tokens,
            self.index,
            tuple(self._logprobs),
            cached_tokens,
            merge_pieces(self._calls),
            "".join(self._reasoning),
            stop=self._stop,
        )
        self._stop = ""
        self._calls.clear()
        self._reasoning.clear()
        self._text.clear()
        self._logprobs.clear()
        self._tokens = 0
        return text

    def _push(self, text: str) -> None:
        if self._splitter is not None:
            reasoning, text = self._splitter.feed(text)
            self._reason(reasoning)
        self._say(text)

    def _finish(self) -> None:
        """Nothing more comes: nothing is held back."""
        if self._splitter is not None:
            reasoning, text = self._splitter.finish()
            self._reason(reasoning)
            self._say(text)
        if self._parser is not None:
            self._add(*self._parser.finish())

    def _reason(self, text: str) -> None:
        if text:
            self._reasoning.append(text)

    def _say(self, text: str) -> None:
        if self._parser is None:
            self._add(text, ())
        else:
            self._add(*self._parser.feed(text))

    def _add(self, text: str, calls: Iterable[CallPiece]) -> None:
        if text:
            self._text.append(text)
        self._calls += calls


class LocalRun:
    """The sequences of one request in the engine. Fed from the event loop, read by one reader.

    Text that waits for a slow reader is merged into one chunk per choice, so at most the answer itself is held. Tokens
    that show no text yet are counted with the text that follows, or else only in the usage at the end.
    """

    def __init__(
        self,
        submits: tuple[Submit, ...],
        label: Label,
        echoes: Sequence[str],
        on_cancel: Callable[[LocalRun], None],
        *,
        reading: Reading | None = None,
    ) -> None:
        """`submits` has each prompt's choices, together and in order; `echoes` what is put before those of each."""
        self.submits = submits
        self.model = submits[0].model
        self.sequences = tuple(submit.sequence for submit in submits)
        self.submitted_ns: int | None = None  # when the engine was given it
        self._label = label
        self._on_cancel = on_cancel
        each = len(submits) // len(echoes)
        self._choices = {
            submit.sequence: _Choice(index, echoes[index // each], reading or Reading())
            for index, submit in enumerate(submits)
        }
        choices = list(self._choices.values())
        # Each prompt's length, and its choices.
        self._prompts = [(len(submits[at].tokens), choices[at : at + each]) for at in range(0, len(submits), each)]
        self._output_tokens = 0
        self._error: MillicentError | None = None
        self._unsent = submits
        self._end: End | None = None
        self._over = False
        self._news = asyncio.Event()

    async def __aiter__(self) -> AsyncIterator[Chunk]:
        while not self._over:
            await self._news.wait()
            self._news.clear()
            for choice in self._choices.values():
                if choice.has_news:
                    yield choice.news(self._cached_tokens)
            if self._end is not None and not any(choice.has_news for choice in self._choices.values()):
                self._over = True
                yield self._end

    def cancel(self) -> None:
        if self._end is None:
            self._on_cancel(self)

    @property
    def ended(self) -> bool:
        return self._end is not None

    @property
    def unfinished(self) -> tuple[int, ...]:
        """The sequences that the engine has and hasn't ended."""
        if self.ended:
            return ()
        return tuple(sequence for sequence, choice in self._choices.items() if choice.reason is None)

    def next_frames(self) -> Sequence[Submit]:
        """What the engine should be given now."""
        frames, self._unsent = self._unsent, ()
        return frames

    def prefilled(self, sequence: int, rows: int) -> None:
        """A step has computed this many more rows of the prompt."""
        self._choices[sequence].prefilled_tokens += rows

    def take(self, output: Output) -> None:
        """The run ends with the last of its sequences; as failed if one of them did."""
        choice = self._choices[output.sequence]
        if choice.reason is not None:
            return
        choice.take(output, self._label)
        self._output_tokens += output.tokens
        if output.finish:
            ended = choice.end(FinishReason(output.finish))
            if ended is FinishReason.ERROR and self._error is None:
                self._error = (InvalidRequest if output.refused else MillicentError)(output.error)
            reasons = [each.reason for each in self._choices.values() if each.reason is not None]
            if len(reasons) == len(self._choices):
                self.end(_overall(reasons), self._error)
        if choice.has_news:
            self._news.set()

    def end(self, reason: FinishReason, error: MillicentError | None = None) -> None:
        """Nothing more comes. Usage is what was measured: each prompt once, for all its choices; of one that was cut
        off in prefill, the part computed."""
        if self._end is not None:
            return
        cached = fresh = 0
        for tokens, choices in self._prompts:
            found = min(_found(choices) or 0, tokens)
            cached += found
            fresh += min(max(choice.prefilled_tokens for choice in choices), tokens - found)
        reasoning = sum(choice.reasoning_tokens for choice in self._choices.values())
        usage = Usage.of(
            Provenance.MEASURED,
            input_fresh=fresh,
            input_cache_read=cached,
            output_text=self._output_tokens - reasoning,
            **({"output_reasoning": reasoning} if reasoning else {}),
        )
        reasons = tuple(choice.reason or reason for choice in self._choices.values())
        self._end = End(reason, usage, error, reasons if len(reasons) > 1 else ())
        self._news.set()

    @property
    def _cached_tokens(self) -> int | None:
        known = [found for _, choices in self._prompts if (found := _found(choices)) is not None]
        return sum(known) if known else None


def _found(choices: Iterable[_Choice]) -> int | None:
    """How much of their prompt was in the cache: what the first of them to begin found. The others find what that one
    has computed."""
    return min((choice.cached_tokens for choice in choices if choice.cached_tokens is not None), default=None)


def _overall(reasons: list[FinishReason]) -> FinishReason:
    for reason in (FinishReason.ERROR, FinishReason.CANCELLED, FinishReason.LENGTH, FinishReason.TOOL_CALLS):
        if reason in reasons:
            return reason
    return FinishReason.STOP


def _shown(scored: ScoredToken, label: Label) -> TokenLogprob:
    top = tuple(Candidate(label(token), logprob) for token, logprob in scored.top)
    return TokenLogprob(label(scored.token), scored.logprob, top)


class LocalCall:
    """A checked and counted request: `core.protocols.Call`. `submits` has each prompt's first choice; `sequences` the
    numbers of all choices, each prompt's together."""

    def __init__(
        self,
        submits: Sequence[Submit],
        sequences: tuple[int, ...],
        *,
        placement: str,
        begin: Callable[[tuple[Submit, ...]], LocalRun],
    ) -> None:
        self.served_model = submits[0].model
        self.placement = placement
        self.sequences = sequences
        self.input_tokens: int | None = sum(len(submit.tokens) for submit in submits)
        each = len(sequences) // len(submits)
        self.max_output_tokens: int | None = each * sum(submit.limits.max_tokens or 0 for submit in submits)
        # A prompt's choices are drawn as they would be if it were the only one.
        self._submits = tuple(_choice(submits[i // each], i % each, sequence) for i, sequence in enumerate(sequences))
        self._begin = begin
        self._started = False

    def start(self) -> LocalRun:
        assert not self._started, "a call is started once; prepare another to run it again"
        self._started = True
        return self._begin(self._submits)


def _choice(submit: Submit, index: int, sequence: int) -> Submit:
    sampling = msgspec.structs.replace(submit.sampling, seed=choice_seed(submit.sampling.seed, index))
    return msgspec.structs.replace(submit, sequence=sequence, sampling=sampling)
