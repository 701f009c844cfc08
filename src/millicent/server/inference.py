"""The routes that run models: one ASGI endpoint, parametrised by dialect."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from millicent.control.access import Caller
from millicent.control.idempotency import RACE, Claimed, Idempotency, claim_of
from millicent.control.limits import RateLimiter
from millicent.core.chunks import FinishReason, Text, merge_texts
from millicent.core.clock import Clock
from millicent.core.errors import Conflict, MillicentError
from millicent.core.idempotency import Claim
from millicent.core.identifiers import Ids
from millicent.core.receipts import RESPONSE_CACHE, Receipt
from millicent.core.request import OutsideCost, Request
from millicent.ledger.queries import LedgerQueries
from millicent.pipeline.answer import Answer, KeptAnswer
from millicent.pipeline.pipeline import Pipeline
from millicent.server.authentication import caller_of
from millicent.server.bodies import read_body
from millicent.server.config import ServerConfig
from millicent.server.headers import headers_of
from millicent.server.late import LateEntries, check_costs
from millicent.server.leaving import leaving_of
from millicent.server.responses import send_error, send_json
from millicent.wire import (
    anthropic_answers,
    anthropic_common,
    anthropic_messages,
    ollama_answers,
    ollama_common,
    ollama_requests,
    openai_chat,
    openai_common,
    openai_completions,
    openai_embeddings,
    openai_response_answers,
    openai_responses,
)
from millicent.wire.attribution import read_latency_target, read_max_cost
from millicent.wire.family import Family
from millicent.wire.late import LINES_HEADER, read_lines
from millicent.wire.receipts import encode

_STREAM_HEADERS = [(b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]


class StreamWriter(Protocol):
    """`wants_usage`: whether the next receipt should have what is known so far."""

    @property
    def wants_usage(self) -> bool: ...
    def start(self, receipt: Receipt) -> bytes: ...
    def text(self, receipt: Receipt, text: Text) -> bytes: ...
    def end(self, receipt: Receipt, reasons: Sequence[FinishReason]) -> bytes: ...


@dataclass(frozen=True)
class Dialect:
    """One dialect's both ways. `decode` also says, in a shape of its own, what else decides the answer's bytes.

    `failed` ends a stream in which something went wrong, where that is more than the family's error.
    `answer_body` gets one text for each choice, or with `in_order` as many as it takes to keep the order.
    """

    decode: Callable[[bytes, Mapping[str, str], str], tuple[Request, Any]]
    answer_body: Callable[[Receipt, Sequence[Text], Sequence[FinishReason], Any], dict[str, Any]]
    stream: Callable[[Any], StreamWriter] | None = None  # None: its requests never stream
    family: Family = openai_common.FAMILY
    named: Callable[[str, Sequence[str]], str] | None = None  # which model a name means; None: the one so called
    failed: Callable[[Any, Receipt, MillicentError], bytes] | None = None
    in_order: bool = False


CHAT = Dialect(
    openai_chat.decode,
    lambda receipt, texts, reasons, _: openai_chat.answer_body(receipt, texts, reasons),
    openai_chat.Stream,
)
COMPLETIONS = Dialect(
    openai_completions.decode,
    lambda receipt, texts, reasons, _: openai_completions.answer_body(receipt, texts, reasons),
    openai_completions.Stream,
)
EMBEDDINGS = Dialect(
    openai_embeddings.decode,
    lambda receipt, texts, _, shape: openai_embeddings.answer_body(receipt, texts[0].text, shape),
)
RESPONSES = Dialect(
    openai_responses.decode,
    lambda receipt, texts, reasons, shape: openai_response_answers.answer_body(receipt, texts, reasons[0], shape),
    openai_response_answers.Stream,
    openai_responses.FAMILY,
    in_order=True,
    failed=openai_response_answers.Stream.failed,
)
MESSAGES = Dialect(
    anthropic_messages.decode,
    lambda receipt, texts, reasons, _: anthropic_answers.answer_body(receipt, texts, reasons[0]),
    anthropic_answers.Stream,
    anthropic_common.FAMILY,
    in_order=True,
)
OLLAMA_CHAT, OLLAMA_GENERATE = (
    Dialect(
        decode,
        lambda receipt, texts, reasons, kind: ollama_answers.answer_body(receipt, texts[0], reasons[0], kind),
        ollama_answers.Stream,
        ollama_common.FAMILY,
        ollama_common.served_name,
    )
    for decode in (ollama_requests.decode_chat, ollama_requests.decode_generate)
)
OLLAMA_EMBED = Dialect(
    ollama_requests.decode_embed,
    lambda receipt, texts, _, __: ollama_answers.embed_body(receipt, texts[0].text),
    family=ollama_common.FAMILY,
    named=ollama_common.served_name,
)
DIALECTS = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": COMPLETIONS,
    "/v1/embeddings": EMBEDDINGS,
    "/v1/responses": RESPONSES,
    "/v1/messages": MESSAGES,
    "/api/chat": OLLAMA_CHAT,
    "/api/generate": OLLAMA_GENERATE,
    "/api/embed": OLLAMA_EMBED,
}


class Replay:
    """The same text under the same receipt again, as that stood when it closed. `finished` gives it: at once for an
    answer that was given before, in the end for one that still runs."""

    def __init__(self, receipt: Receipt, finished: Callable[[], Awaitable[tuple[Receipt, KeptAnswer]]]) -> None:
        self.receipt_id = receipt.id
        self.opened = receipt
        self.settled: Receipt | None = None
        self.reasons: tuple[FinishReason, ...] = ()
        self._finished = finished

    async def take(self) -> tuple[Text, ...] | None:
        """As an answer's: cancelling a wait loses nothing."""
        if self.settled is not None:
            return None
        receipt, kept = await self._finished()
        lines = tuple(line for line in receipt.lines if line.posted_at_ns <= (receipt.settled_at_ns or 0))
        self.opened = self.settled = msgspec.structs.replace(receipt, lines=lines)
        self.reasons = kept.reasons
        return kept.texts or None

    async def rest(self) -> list[Text]:
        return [*(await self.take() or ())]

    def cancel(self) -> None:
        """What runs is another's."""


class InferenceEndpoint:
    """Reads, decodes, admits, and writes the answer whole or as a stream. A client that goes stops the work."""

    def __init__(
        self,
        dialect: Dialect,
        pipeline: Pipeline,
        limiter: RateLimiter,
        idempotency: Idempotency,
        queries: LedgerQueries,
        late: LateEntries,
        ids: Ids,
        clock: Clock,
        config: ServerConfig,
    ) -> None:
        self._late = late
        self._dialect = dialect
        self._pipeline = pipeline
        self._limiter = limiter
        self._idempotency = idempotency
        self._queries = queries
        self._ids = ids
        self._clock = clock
        self._config = config

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        caller = caller_of(scope)
        try:
            body = await read_body(
                scope, receive, max_mb=self._config.max_body_mb, timeout_s=self._config.body_timeout_s
            )
            headers = headers_of(scope)
            request, shape = await self._decode(body, headers, caller)
            if self._dialect.named is not None:
                model = self._dialect.named(request.model, self._pipeline.models())
                request = msgspec.structs.replace(request, model=model)
            caller.check_model(request.model)
            request = self._with_headers(request, headers, caller)
            key = headers.get("idempotency-key")
            claim = None if key is None else claim_of(key, caller.id, request, shape)
            await self._late.hear_tools(request.messages or (), caller)
            answer = await self._begin(request, claim, headers.get("cache-control"))
        except ClientDisconnect:
            return
        except MillicentError as error:
            await send_error(send, self._dialect.family, error, headers=self._rate_headers(caller))
            return
        told = self._rate_headers(caller) | self._receipt_headers(answer)
        respond = self._stream(send, answer, shape, told) if request.stream else self._whole(send, answer, shape, told)
        if claim is not None:
            # Whoever sends a key means to come back for the answer: it is finished even when nobody reads it now.
            await respond
            return
        leaving = leaving_of(scope)
        leaving.watch(answer.cancel)
        try:
            await respond
        finally:
            leaving.unwatch(answer.cancel)
            answer.cancel()

    async def _decode(self, body: bytes, headers: Mapping[str, str], caller: Caller) -> tuple[Request, Any]:  # noqa: ARG002
        return self._dialect.decode(body, headers, self._ids.new("rcpt"))

    async def _answered(self, receipt: Receipt, shape: Any, said: dict[str, Any] | StreamWriter) -> None:
        """Before the end of a new answer is sent: its body, or what has written it."""

    def _with_headers(self, request: Request, headers: Mapping[str, str], caller: Caller) -> Request:
        """What our headers say, the same in every dialect. Raises InvalidRequest and Forbidden naming the header."""
        caller.check_priority(request.priority, self._limiter.best_priority)
        costs: tuple[OutsideCost, ...] = ()
        if LINES_HEADER in headers:
            costs = read_lines(headers, self._clock.now_ns())
            check_costs(caller, costs)
        return msgspec.structs.replace(
            request,
            attribution=caller.attribute(request.attribution),
            max_cost=read_max_cost(headers),
            latency_target_ms=read_latency_target(headers),
            outside_costs=costs,
        )

    async def _begin(self, request: Request, claim: Claim | None, cache_control: str | None) -> Answer | Replay:
        """The answer that this claim got before, or a new one. Only a stream doesn't wait for one that still runs: it
        begins, and its heartbeats tell that somebody is at work."""
        while True:
            if claim is not None and (earlier := await self._earlier(claim, wait=not request.stream)) is not None:
                receipt = await asyncio.to_thread(self._queries.receipt, earlier.receipt)
                assert receipt is not None
                return Replay(receipt, lambda: self._finished(claim))
            try:
                return await self._pipeline.admit(request, claim, cache_control=cache_control)
            except Conflict as error:
                if error.code != RACE:
                    raise

    async def _earlier(self, claim: Claim, *, wait: bool) -> Claimed | None:
        return await (self._idempotency.earlier(claim) if wait else self._idempotency.find(claim))

    async def _finished(self, claim: Claim) -> tuple[Receipt, KeptAnswer]:
        """Raises Conflict where the first request ended without an answer that is kept."""
        earlier = await self._idempotency.earlier(claim)
        if earlier is None:
            raise Conflict(
                "The first request with this `Idempotency-Key` ended without an answer: send this one again.",
                param="idempotency-key",
                code="idempotency_failed",
            )
        receipt = await asyncio.to_thread(self._queries.receipt, earlier.receipt)
        assert receipt is not None
        return receipt, KeptAnswer.read(earlier.answer or "")

    def _rate_headers(self, caller: Caller) -> dict[str, str]:
        allowances = self._limiter.allowances(caller.id)
        return self._dialect.family.rate_headers(allowances, self._clock.now_ns()) if allowances else {}

    def _receipt_headers(self, answer: Answer | Replay) -> dict[str, str]:
        theirs = self._dialect.family.receipt_header
        ours = {"x-millicent-receipt": answer.receipt_id} | _cache_header(answer)
        return ours | ({theirs: answer.receipt_id} if theirs else {})

    async def _whole(self, send: Send, answer: Answer | Replay, shape: object, headers: dict[str, str]) -> None:
        try:
            pieces = await answer.rest()
        except MillicentError as error:
            told = headers | _end_headers(answer)
            await send_error(send, self._dialect.family, error, headers=told, receipt_id=answer.receipt_id)
            return
        receipt = answer.settled
        assert receipt is not None
        said = {piece.choice for piece in pieces}
        silent = [Text("", 0, choice) for choice in range(len(answer.reasons)) if choice not in said]
        texts = merge_texts([*pieces, *silent], in_order=self._dialect.in_order)
        body = self._dialect.answer_body(receipt, texts, answer.reasons, shape)
        if not isinstance(answer, Replay):
            await self._answered(receipt, shape, body)
        await send_json(send, encode(body), headers=headers | _end_headers(answer))

    async def _stream(self, send: Send, answer: Answer | Replay, shape: object, headers: dict[str, str]) -> None:
        assert self._dialect.stream is not None, "its requests don't stream"
        writer = self._dialect.stream(shape)
        family = self._dialect.family
        ours = [(name.encode(), value.encode()) for name, value in headers.items()]
        told = [(b"content-type", family.stream_type), *_STREAM_HEADERS, *ours]
        await send({"type": "http.response.start", "status": 200, "headers": told})

        def so_far() -> Receipt:
            if writer.wants_usage and isinstance(answer, Answer):
                return self._pipeline.running(answer)
            return answer.opened

        heart = _Heart(send, family.heartbeat, self._config.heartbeat_s)
        try:
            if start := writer.start(so_far()):
                await heart.send(start)
            while (texts := await answer.take()) is not None:
                receipt = so_far()
                if part := b"".join([writer.text(receipt, text) for text in texts]):
                    await heart.send(part)
            assert answer.settled is not None
            last = writer.end(answer.settled, answer.reasons)
            if not isinstance(answer, Replay):
                await self._answered(answer.settled, shape, writer)
        except MillicentError as error:
            last = self._failed(writer, answer, error)
        finally:
            heart.stop()
        await send({"type": "http.response.body", "body": last})

    def _failed(self, writer: StreamWriter, answer: Answer | Replay, error: MillicentError) -> bytes:
        if self._dialect.failed is not None:
            return self._dialect.failed(writer, answer.settled or answer.opened, error)
        return self._dialect.family.error_event(error, answer.receipt_id)


def _end_headers(answer: Answer | Replay) -> dict[str, str]:
    """What is known once the answer is whole."""
    total = answer.settled.total if answer.settled is not None else None
    return _cache_header(answer) | ({} if total is None else {"x-millicent-cost-usd": str(total)})


def _cache_header(answer: Answer | Replay) -> dict[str, str]:
    """As the receipt says now: a stream that waits for another's answer doesn't know yet."""
    outcome = ((answer.settled or answer.opened).policy or {}).get(RESPONSE_CACHE)
    return {} if outcome is None else {"x-millicent-cache": outcome}


class _Heart:
    """Sends the parts of a stream, and a heartbeat after each `interval_s` in which it had nothing to send. One timer
    looks now and then, rather than each part setting its own."""

    def __init__(self, send: Send, beat: bytes, interval_s: float) -> None:
        self._send = send
        self._loop = asyncio.get_running_loop()
        self._sent_at = self._loop.time()
        self._beating = asyncio.create_task(self._keep_beating(beat, interval_s))

    async def send(self, body: bytes) -> None:
        self._sent_at = self._loop.time()
        await self._send({"type": "http.response.body", "body": body, "more_body": True})

    def stop(self) -> None:
        self._beating.cancel()

    async def _keep_beating(self, beat: bytes, interval_s: float) -> None:
        while True:
            left_s = self._sent_at + interval_s - self._loop.time()
            if left_s > 0:
                await asyncio.sleep(left_s)
            else:
                await self.send(beat)
