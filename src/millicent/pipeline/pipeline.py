"""Admit, prepare, make durable, run, settle: every request goes this way, and nothing goes around it."""

from __future__ import annotations

import asyncio
import difflib
import itertools
import logging
from collections.abc import Mapping, Sequence

import msgspec

from millicent.control.limits import RateLimiter, Ticket
from millicent.core.accounts import Reading
from millicent.core.chunks import End, FinishReason, Text, Vector
from millicent.core.clock import Clock
from millicent.core.errors import (
    EngineCrashed,
    InvalidRequest,
    LedgerUnavailable,
    MillicentError,
    ModelNotFound,
    PaymentRequired,
    RateLimited,
    Unavailable,
)
from millicent.core.idempotency import Claim
from millicent.core.money import ZERO, Money
from millicent.core.protocols import Backend, Call, Ledger
from millicent.core.quotes import Quote
from millicent.core.receipts import Attempt, HourShare, Receipt, Role, Status, Timing, outside_line, reported_line
from millicent.core.request import Request
from millicent.core.usage import Leaf, Provenance, Usage
from millicent.meter.attribution import StepTimeShares
from millicent.meter.meter import Meter
from millicent.meter.placements import Placement
from millicent.meter.prices import PriceBook
from millicent.meter.pricing import price
from millicent.meter.quotes import Asked, Quoter
from millicent.pipeline.answer import Answer
from millicent.pipeline.config import LimitsConfig
from millicent.pipeline.estimates import Estimates, Plan
from millicent.pipeline.features import Features
from millicent.pipeline.holds import HoldOf, Purse, quoted_hold
from millicent.pipeline.latency import Beside, LatencyTargets, told

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
        fits: StepTimeShares | None = None,
        features: Features | None = None,
        estimates: Estimates | None = None,
        limiter: RateLimiter | None = None,
        hold: HoldOf = quoted_hold,
        latency: LatencyTargets | None = None,
    ) -> None:
        self._backends = backends
        self._ledger = ledger
        self._meter = meter
        self._placements = placements
        self._clock = clock
        self._limits = limits
        self._fits = fits
        self._features = features or Features({})
        self._estimates = estimates or Estimates(Quoter(lambda _: None), PriceBook({}))
        self._limiter = limiter or RateLimiter(clock, lambda _: limits)
        self._hold = hold
        self._latency = latency
        self._admitted = 0
        self._answers: dict[str, Answer] = {}
        self._unsettled: dict[str, tuple[Receipt, tuple[HourShare, ...], str | None]] = {}
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
        await self._save_fits()
        await self._close_unsettled()
        checkpoint = self._meter.checkpoint()
        await self._ledger.checkpoint(checkpoint)
        self._meter.written(checkpoint)

    async def admit(self, request: Request, claim: Claim | None = None) -> Answer:
        """Start answering. Returns once the open receipt, its hold and its claim are durable and the work is under way.

        Raises what a client should be told: RateLimited, PaymentRequired, ModelNotFound, InvalidRequest, Conflict,
        Unavailable, LedgerUnavailable. Nothing was spent then, and there is no receipt.
        """
        if self._draining:
            raise Unavailable("The server is shutting down: retry against another, or in a moment.", retry_after_s=2)
        if self._admitted >= self._limits.max_concurrent:
            raise RateLimited(
                f"{self._admitted} requests are running, the limit ([limits] max_concurrent): retry in a moment.",
                retry_after_s=1,
            )
        ticket = self._limiter.enter(request.attribution.key)
        self._admitted += 1
        try:
            request = self._aimed(request)
            backend = self._route(request.model)
            call = await backend.prepare(request)
            plan = await self._estimates.within(request, backend, call, self._asked(request, call))
            self._check_target(request, plan)
            call = plan.call
            receipt = self._opening(request, backend, plan)
            ticket.reserve((call.input_tokens or 0) + (call.max_output_tokens or 0), receipt.hold)
            bounded = await self._open(receipt, claim, plan)
        except BaseException:
            self._admitted -= 1
            ticket.withdraw()
            raise
        judged = self._features.judges_output(receipt.attribution.feature)
        answer = Answer(receipt, _beside(plan), keep=judged or claim is not None)
        self._answers[receipt.id] = answer
        self._meter.open(receipt.id, _ATTEMPT, call.sequences)
        purse = self._purse(answer, plan, bounded=bounded)
        task = asyncio.create_task(self._drive(answer, plan, ticket, purse))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return answer

    async def quotes(self, request: Request, models: Sequence[str]) -> list[Quote]:
        """What the request would be on each of these models, wherever one is placed. Nothing is spent, though a model
        may have to be loaded for its tokenizer. Raises as `admit` does."""
        prepared: list[Asked] = []
        for model in models:
            wanted = msgspec.structs.replace(request, model=model)
            serving = [backend for backend in self._backends if model in backend.models()]
            prepared += [self._asked(wanted, await backend.prepare(wanted)) for backend in serving]
            elsewhere = [place for place in self._placements.values() if model in place.models]
            if not serving and not elsewhere:
                self._route(model)
        asked: list[Asked] = []
        for model in models:
            wanted = msgspec.structs.replace(request, model=model)
            asked += [each for each in prepared if each.model == model]
            for place in self._placements.values():
                if model in place.models and all(
                    each.placement.name != place.name for each in asked if each.model == model
                ):
                    asked.append(self._estimates.asked_elsewhere(wanted, place, prepared, self._clock.now_ns()))
        return [self._estimates.quote(each) for each in asked]

    async def count(self, request: Request) -> int:
        """The request's input in tokens. Nothing is spent. Raises as `admit` does."""
        call = await self._route(request.model).prepare(request)
        if call.input_tokens is None:
            raise InvalidRequest(
                f"Nobody here can count tokens for model `{request.model}`: ask its provider.",
                param="model",
                code="unsupported_parameter",
            )
        return call.input_tokens

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

    def _asked(self, request: Request, call: Call) -> Asked:
        beside = sum(answer.opened.model == request.model for answer in self._answers.values())
        now_ns = self._clock.now_ns()
        return self._estimates.asked(request, call, self._placements[call.placement].at(now_ns), beside + 1, now_ns)

    def _aimed(self, request: Request) -> Request:
        """With its feature's latency target, where it has none of its own."""
        if request.latency_target_ms is not None:
            return request
        target_ms = self._features.latency_target_ms(request.attribution.feature)
        return request if target_ms is None else msgspec.structs.replace(request, latency_target_ms=target_ms)

    def _check_target(self, request: Request, plan: Plan) -> None:
        """Raises RateLimited where the target cannot be met. Without a fit nobody can tell."""
        fit = None if self._fits is None else self._fits.coefficients(request.model)
        if request.latency_target_ms is None or fit is None or self._latency is None:
            return
        others = [
            msgspec.structs.replace(
                answer.beside, made_tokens=answer.progress.tokens, begun=answer.progress.first_token_at_ns is not None
            )
            for answer in self._answers.values()
            if answer.opened.model == request.model
        ]
        mine = _beside(plan)
        self._latency.check(request.latency_target_ms, request.model, fit, mine, others, streamed=request.stream)

    async def _open(self, receipt: Receipt, claim: Claim | None, plan: Plan) -> bool:
        """As `Ledger.open`; who is refused for want of budget is shown what it would have cost."""
        try:
            return await self._ledger.open(receipt, claim)
        except PaymentRequired as error:
            error.quote = plan.quote
            raise

    def _opening(self, request: Request, backend: Backend, plan: Plan) -> Receipt:
        now_ns = self._clock.now_ns()
        call = plan.call
        placement = self._placements[call.placement].at(now_ns)
        hold = self._hold(plan)
        lines = tuple(outside_line(cost, now_ns) for cost in request.outside_costs)
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
            lines=lines,
            hold=None if hold is None else Money.total((hold, *(line.amount or ZERO for line in lines))),
            prices=placement.prices,
            basis=placement.basis,
            policy=None if request.latency_target_ms is None else {"latency_target_ms": str(request.latency_target_ms)},
        )

    async def _drive(self, answer: Answer, plan: Plan, ticket: Ticket, purse: Purse) -> None:
        try:
            end = await self._consume(answer, plan.call, purse)
        except MillicentError as error:  # the backend went away between prepare and start
            end = End(FinishReason.ERROR, Usage(), error)
        except Exception:
            log.exception("receipt %s: the backend failed in a way it should not", answer.receipt_id)
            bug = MillicentError("The server failed while answering: retry, and report this if it happens again.")
            end = End(FinishReason.ERROR, self._meter.reading(answer.receipt_id).usage, bug)
        try:
            await purse.settle()
            await self._settle(answer, end)
            self._estimates.learn(answer.settled, plan)
            if self._latency is not None and answer.settled is not None:
                self._latency.learn(answer.settled)
        finally:
            del self._answers[answer.receipt_id]
            self._admitted -= 1
            used = answer.closing or answer.opened
            ticket.leave(_tokens(used.usage), used.total)

    async def _consume(self, answer: Answer, call: Call, purse: Purse) -> End:
        run = call.start()
        answer.attach(run)
        async for chunk in run:
            if isinstance(chunk, End):
                stopped = answer.stopped_at_limit and chunk.reason is FinishReason.CANCELLED
                return _cut_short(call, chunk) if stopped else chunk
            self._note(answer, call, chunk)
            answer.push(Text(chunk.line, 0) if isinstance(chunk, Vector) else chunk)
            if purse.watches_pieces and not answer.stopped_at_limit:
                await purse.spent(self.running(answer).total)
        message = "The backend stopped without saying how the answer ended: retry."
        raise MillicentError(message, code="backend_protocol")

    def _purse(self, answer: Answer, plan: Plan, *, bounded: bool) -> Purse:
        placement = self._placements[plan.call.placement].at(answer.opened.created_at_ns)
        rate = placement.receipt_usd_per_hour
        return Purse(
            answer, self._ledger, self._meter, bounded=bounded, maximum=plan.maximum, usd_per_hour=rate
        )  # fmt: skip

    def _note(self, answer: Answer, call: Call, chunk: Text | Vector) -> None:
        if isinstance(chunk, Vector):
            answer.progress.vector_tokens += chunk.input_tokens
            usage = Usage.of(Provenance.MEASURED, input_fresh=answer.progress.vector_tokens)
            self._meter.note_usage(answer.receipt_id, usage)
            return
        answer.progress.note(chunk.tokens, self._clock.now_ns())
        leaves = {Leaf.OUTPUT_TEXT.value: answer.progress.tokens}
        if call.input_tokens is not None:
            leaves[Leaf.INPUT_FRESH.value] = call.input_tokens - (chunk.cached_tokens or 0)
        if chunk.cached_tokens is not None:
            leaves[Leaf.INPUT_CACHE_READ.value] = chunk.cached_tokens
        # Who shows no steps shows no tokens either, only text; what it reports comes at the end.
        known = Provenance.MEASURED if call.sequences else Provenance.ESTIMATED
        self._meter.note_usage(answer.receipt_id, Usage.of(known, **leaves))

    async def _settle(self, answer: Answer, end: End) -> None:
        self._meter.note_usage(answer.receipt_id, end.usage)
        reading = self._meter.close(answer.receipt_id)
        receipt = answer.closing = self._closing(answer, end, reading)
        try:
            await self._save_fits()
            await self._ledger.close(receipt, reading.shares, answer.kept(end))
        except LedgerUnavailable as error:
            self._unsettled[receipt.id] = (receipt, reading.shares, answer.kept(end))
            answer.fail(error)
            return
        answer.finish(receipt, end)

    def _closing(self, answer: Answer, end: End, reading: Reading) -> Receipt:
        status = _status(end)
        message = end.error.message if end.error else None
        opened = self._priced(answer.opened, reading)
        now_ns = self._clock.now_ns()  # after pricing: lines posted later than this are late ones
        attempt = msgspec.structs.replace(opened.attempts[0], ended_at_ns=now_ns, status=status, error=message)
        lines = (
            () if end.reported_cost is None else (reported_line(attempt, end.reported_cost, now_ns, end.upstream_id),)
        )
        closed = msgspec.structs.replace(
            opened,
            served_model=end.served_model or opened.served_model,
            settled_at_ns=now_ns,
            status=status,
            finish_reason=end.reason.value,
            lines=(*opened.lines, *lines),
            timing=self._timing(answer, reading, now_ns),
            attempts=(attempt,),
            error=message,
            useful=self._verdict(answer, status),
        )
        return msgspec.structs.replace(closed, policy=told(closed))

    def _verdict(self, answer: Answer, status: Status) -> bool | None:
        """The feature's rule on the output; of several choices, one that is useful will do. A failed answer is of no
        use; of a cancelled one nobody knows."""
        feature = answer.opened.attribution.feature
        if status is Status.CANCELLED or not self._features.judges_output(feature):
            return None
        if status is not Status.SUCCEEDED:
            return False
        return any(self._features.output(feature, text) for text in answer.outputs())

    def _priced(self, receipt: Receipt, reading: Reading) -> Receipt:
        placement = self._placements[receipt.placement or ""].at(receipt.created_at_ns)
        prices = self._estimates.prices(receipt.attempts[-1].model, placement, receipt.created_at_ns)
        priced = price(reading, receipt.attempts, placement, self._clock.now_ns(), prices)
        return msgspec.structs.replace(
            receipt,
            usage=reading.usage,
            accelerator=reading.accelerator,
            energy=reading.energy,
            lines=(*receipt.lines, *priced.lines),
            list_price=priced.list_price,
            saved=priced.saved,
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

    async def _save_fits(self) -> None:
        """Before the receipts that refer to them."""
        if self._fits is not None and (unsaved := self._fits.unsaved()):
            await self._ledger.save_fits(unsaved)
            self._fits.saved(unsaved)

    async def _close_unsettled(self) -> None:
        for receipt_id, closing in list(self._unsettled.items()):
            await self._ledger.close(*closing)
            del self._unsettled[receipt_id]


def _beside(plan: Plan) -> Beside:
    sequences = max(1, len(plan.call.sequences))
    return Beside(plan.asked.input_tokens, plan.quote.output_tokens.expected, 0, begun=False, sequences=sequences)


def _tokens(usage: Usage) -> int | None:
    read, written = usage.input_tokens, usage.output_tokens
    return None if read is None or written is None else read + written


def _cut_short(call: Call, end: End) -> End:
    """The money ran out: of a text there is the beginning; some of the vectors are no answer."""
    if call.max_output_tokens != 0:
        cut = {FinishReason.CANCELLED: FinishReason.LENGTH}
        choices = tuple(cut.get(reason, reason) for reason in end.choices)
        return msgspec.structs.replace(end, reason=FinishReason.LENGTH, choices=choices)
    message = "The budget or the maximum cost was reached before all inputs were read: send fewer, or allow more."
    return End(FinishReason.ERROR, end.usage, PaymentRequired(message))


def _status(end: End) -> Status:
    if end.reason is FinishReason.CANCELLED:
        return Status.CANCELLED
    if end.reason is not FinishReason.ERROR:
        return Status.SUCCEEDED
    return Status.INTERRUPTED if isinstance(end.error, EngineCrashed) else Status.FAILED
