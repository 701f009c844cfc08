"""Admit, prepare, make durable, run, settle: every request goes this way, and nothing goes around it."""

from __future__ import annotations

import asyncio
import difflib
import itertools
import logging
from collections.abc import Mapping, Sequence

import msgspec

from millicent.core.accounts import Reading
from millicent.core.chunks import End, FinishReason, Text
from millicent.core.clock import Clock
from millicent.core.errors import (
    EngineCrashed,
    LedgerUnavailable,
    MillicentError,
    ModelNotFound,
    RateLimited,
    Unavailable,
)
from millicent.core.protocols import Backend, Call, Ledger
from millicent.core.receipts import Attempt, HourShare, Receipt, Role, Status, Timing
from millicent.core.request import Request
from millicent.core.usage import Leaf, Provenance, Usage
from millicent.meter.meter import Meter
from millicent.meter.placements import Placement
from millicent.meter.pricing import price
from millicent.pipeline.answer import Answer
from millicent.pipeline.config import LimitsConfig

log = logging.getLogger(__name__)

CHECKPOINT_INTERVAL_S = 1.0
# What other gateways left open when they died is settled at every tenth checkpoint.
CHECKPOINTS_PER_MAINTENANCE = 10
_ATTEMPT = 1


class Pipeline:
    """Owns what runs. `start` and `stop` bracket its life; `admit` is the only way in."""

    def __init__(
        self,
        *,
        backends: Sequence[Backend],
        ledger: Ledger,
        meter: Meter,
        placements: Mapping[str, Placement],
        clock: Clock,
        limits: LimitsConfig,
    ) -> None:
        self._backends = backends
        self._ledger = ledger
        self._meter = meter
        self._placements = placements
        self._clock = clock
        self._limits = limits
        self._admitted = 0
        self._answers: dict[str, Answer] = {}
        self._unsettled: dict[str, tuple[Receipt, tuple[HourShare, ...]]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._checkpoints: asyncio.Task[None] | None = None
        self._draining = False

    def models(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(model for backend in self._backends for model in backend.models()))

    async def start(self) -> None:
        """The first checkpoint tells the ledger of the devices, so that even a crash at once is accounted for."""
        await self.checkpoint()
        self._checkpoints = asyncio.create_task(self._keep_checkpointing())

    async def drain(self, grace_s: float) -> None:
        """Take nothing new, let what runs finish for `grace_s`, then cancel and settle the rest."""
        self._draining = True
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=grace_s)
        for answer in list(self._answers.values()):
            answer.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def close(self) -> None:
        """End the watch over the devices, whose backends must be closed by now."""
        if self._checkpoints is not None:
            self._checkpoints.cancel()
            await asyncio.gather(self._checkpoints, return_exceptions=True)
        await self._close_unsettled()
        await self._ledger.checkpoint(self._meter.stop())

    async def checkpoint(self) -> None:
        """Write down where everything stands: after this, accounts in the ledger are current."""
        await self._close_unsettled()
        checkpoint = self._meter.checkpoint()
        await self._ledger.checkpoint(checkpoint)
        self._meter.written(checkpoint)

    async def admit(self, request: Request) -> Answer:
        """Start answering. Returns once the open receipt is durable and the work is under way.

        Raises what a client should be told: RateLimited, ModelNotFound, InvalidRequest, Unavailable,
        LedgerUnavailable. Nothing was spent then, and there is no receipt.
        """
        if self._draining:
            raise Unavailable("The server is shutting down: retry against another, or in a moment.", retry_after_s=2)
        if self._admitted >= self._limits.max_concurrent:
            raise RateLimited(
                f"{self._admitted} requests are running, the limit ([limits] max_concurrent): retry in a moment.",
                retry_after_s=1,
            )
        self._admitted += 1
        try:
            backend = self._route(request.model)
            call = await backend.prepare(request)
            receipt = self._opening(request, backend, call)
            await self._ledger.open(receipt)
        except BaseException:
            self._admitted -= 1
            raise
        answer = Answer(receipt)
        self._answers[receipt.id] = answer
        self._meter.open(receipt.id, _ATTEMPT, call.sequence)
        task = asyncio.create_task(self._drive(answer, call))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return answer

    def running(self, answer: Answer) -> Receipt:
        """The receipt as it stands, priced so far."""
        if answer.closing is not None:
            return answer.closing
        return self._priced(answer.opened, self._meter.reading(answer.receipt_id))

    def _route(self, model: str) -> Backend:
        for backend in self._backends:
            if model in backend.models():
                return backend
        known = self.models()
        close = difflib.get_close_matches(model, known, n=1)
        advice = f"did you mean `{close[0]}`?" if close else f"this server has {', '.join(known) or 'none'}."
        raise ModelNotFound(f"Model `{model[:100]}` is not served here: {advice}", param="model")

    def _opening(self, request: Request, backend: Backend, call: Call) -> Receipt:
        now_ns = self._clock.now_ns()
        placement = self._placements[call.placement]
        attempt = Attempt(_ATTEMPT, backend.name, call.placement, call.served_model, Role.INFERENCE, now_ns)
        return Receipt(
            id=request.id,
            created_at_ns=now_ns,
            model=request.model,
            served_model=call.served_model,
            placement=call.placement,
            backend=backend.name,
            dialect=request.dialect,
            stream=request.stream,
            attribution=request.attribution,
            attempts=(attempt,),
            prices=placement.prices,
            basis=placement.basis,
        )

    async def _drive(self, answer: Answer, call: Call) -> None:
        try:
            end = await self._consume(answer, call)
        except MillicentError as error:  # the backend went away between prepare and start
            end = End(FinishReason.ERROR, Usage(), error)
        except Exception:
            log.exception("receipt %s: the backend failed in a way it should not", answer.receipt_id)
            bug = MillicentError("The server failed while answering: retry, and report this if it happens again.")
            end = End(FinishReason.ERROR, self._meter.reading(answer.receipt_id).usage, bug)
        try:
            await self._settle(answer, end)
        finally:
            del self._answers[answer.receipt_id]
            self._admitted -= 1

    async def _consume(self, answer: Answer, call: Call) -> End:
        run = call.start()
        answer.attach(run)
        async for chunk in run:
            if isinstance(chunk, End):
                return chunk
            self._note(answer, call, chunk)
            answer.push(chunk.text)
        message = "The backend stopped without saying how the answer ended: retry."
        raise MillicentError(message, code="backend_protocol")

    def _note(self, answer: Answer, call: Call, chunk: Text) -> None:
        answer.progress.note(chunk.tokens, self._clock.now_ns())
        leaves = {Leaf.OUTPUT_TEXT.value: answer.progress.tokens}
        if call.input_tokens is not None:
            leaves[Leaf.INPUT_FRESH.value] = call.input_tokens
        self._meter.note_usage(answer.receipt_id, Usage.of(Provenance.MEASURED, **leaves))

    async def _settle(self, answer: Answer, end: End) -> None:
        self._meter.note_usage(answer.receipt_id, end.usage)
        reading = self._meter.close(answer.receipt_id)
        receipt = answer.closing = self._closing(answer, end, reading)
        try:
            await self._ledger.close(receipt, reading.shares)
        except LedgerUnavailable as error:
            self._unsettled[receipt.id] = (receipt, reading.shares)
            answer.fail(error)
            return
        answer.finish(receipt, end)

    def _closing(self, answer: Answer, end: End, reading: Reading) -> Receipt:
        now_ns = self._clock.now_ns()
        status = _status(end)
        message = end.error.message if end.error else None
        opened = self._priced(answer.opened, reading)
        attempt = msgspec.structs.replace(opened.attempts[0], ended_at_ns=now_ns, status=status, error=message)
        return msgspec.structs.replace(
            opened,
            settled_at_ns=now_ns,
            status=status,
            finish_reason=end.reason.value,
            timing=self._timing(answer, reading, now_ns),
            attempts=(attempt,),
            error=message,
        )

    def _priced(self, receipt: Receipt, reading: Reading) -> Receipt:
        placement = self._placements[receipt.placement or ""]
        priced = price(reading, receipt.attempts, placement, self._clock.now_ns())
        return msgspec.structs.replace(
            receipt,
            usage=reading.usage,
            accelerator=reading.accelerator,
            lines=priced.lines,
            list_price=priced.list_price,
            prices=priced.prices,
            basis=priced.basis,
        )

    def _timing(self, answer: Answer, reading: Reading, now_ns: int) -> Timing:
        created_ns = answer.opened.created_at_ns
        progress = answer.progress
        first_ns, last_ns = progress.first_token_at_ns, progress.last_token_at_ns
        tpot_ns = None
        if first_ns is not None and last_ns is not None and progress.tokens > 1:
            tpot_ns = (last_ns - first_ns) // (progress.tokens - 1)
        return Timing(
            queue_ns=None if reading.first_step_at_ns is None else max(0, reading.first_step_at_ns - created_ns),
            ttft_ns=None if first_ns is None else first_ns - created_ns,
            tpot_ns=tpot_ns,
            total_ns=now_ns - created_ns,
        )

    async def _keep_checkpointing(self) -> None:
        failing = False
        for number in itertools.count(1):
            await asyncio.sleep(CHECKPOINT_INTERVAL_S)
            try:
                await self.checkpoint()
                if number % CHECKPOINTS_PER_MAINTENANCE == 0:
                    await self._ledger.maintain()
                failing = False
            except LedgerUnavailable as error:
                if not failing:
                    log.warning("the ledger can't be written: %s", error.message)
                failing = True

    async def _close_unsettled(self) -> None:
        for receipt_id, (receipt, shares) in list(self._unsettled.items()):
            await self._ledger.close(receipt, shares)
            del self._unsettled[receipt_id]


def _status(end: End) -> Status:
    if end.reason is FinishReason.CANCELLED:
        return Status.CANCELLED
    if end.reason is not FinishReason.ERROR:
        return Status.SUCCEEDED
    return Status.INTERRUPTED if isinstance(end.error, EngineCrashed) else Status.FAILED
