"""Admit, prepare, make durable, run, settle: every request goes this way, and nothing goes around it."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from random import Random, SystemRandom

import msgspec

from millicent.caching.cache import Lookup, ResponseCache
from millicent.caching.prompt_caching import Marks
from millicent.caching.store import CachedAnswer
from millicent.control.limits import RateLimiter, Ticket
from millicent.core.chunks import End, FinishReason, Text, Vector
from millicent.core.clock import Clock
from millicent.core.errors import (
    LedgerUnavailable,
    MillicentError,
    PaymentRequired,
    RateLimited,
    Unavailable,
)
from millicent.core.idempotency import Claim
from millicent.core.protocols import Backend, Call, Ledger
from millicent.core.quotes import Quote
from millicent.core.receipts import HourShare, Receipt, Role
from millicent.core.request import Request
from millicent.core.usage import Provenance, Usage
from millicent.meter.attribution import StepTimeShares
from millicent.meter.estimated import EstimatedDevice
from millicent.meter.meter import Meter
from millicent.meter.placements import Placement
from millicent.meter.prices import PriceBook, Prices
from millicent.meter.quotes import Asked, Quoter
from millicent.meter.waits import Beside, Waits
from millicent.pipeline.answer import Answer, Progress
from millicent.pipeline.attempts import Journey, Leg, Watchdog
from millicent.pipeline.cached import CachedAnswers, told
from millicent.pipeline.cascade import Cascade
from millicent.pipeline.config import LimitsConfig, ModelPolicy
from millicent.pipeline.deployments import Deployment, DeploymentReport, Deployments, Place
from millicent.pipeline.estimates import Estimates, Plan
from millicent.pipeline.features import Features
from millicent.pipeline.holdout import Holdout, HoldoutConfig
from millicent.pipeline.holds import HoldOf, Purse, quoted_hold
from millicent.pipeline.latency import Trials, check_target
from millicent.pipeline.prompts import Prompts
from millicent.pipeline.quoting import Quotes
from millicent.pipeline.reckoning import as_told, beside_others, cost_so_far, explained, most_tokens, tokens_of
from millicent.pipeline.routes import Routes
from millicent.pipeline.settlement import Bookkeeper, cut_short
from millicent.routing.policies import Decision, Policies, learnable

log = logging.getLogger(__name__)

CHECKPOINT_INTERVAL_S = 1.0
# What other gateways left open when they died is settled at every tenth checkpoint.
CHECKPOINTS_PER_MAINTENANCE = 10


class Pipeline:
    """Owns what runs. `start` and `close` bracket its life; `admit` is the only way in.

    `places` says where the models that have deployments run, `policies` what to do when those fail; `estimated` has the
    devices of placements that are paid for by time and show no steps. `prompts` hashes
    prompts, and marks them. `holdout` draws who goes without a lever. `settled` is told of every receipt, once, when it
    is durable.
    """

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
        waits: Waits | None = None,
        estimated: Mapping[str, EstimatedDevice] | None = None,
        places: Mapping[str, Sequence[Place]] | None = None,
        policies: Mapping[str, ModelPolicy] | None = None,
        random: Random | None = None,
        routing: Policies | None = None,
        cache: ResponseCache | None = None,
        prompts: Prompts | None = None,
        holdout: Holdout | None = None,
        settled: Callable[[Receipt], None] = lambda _: None,
    ) -> None:
        self._random = random or SystemRandom()
        self._deployments = Deployments(backends, clock, self._random, places, policies)
        self._ledger = ledger
        self._meter = meter
        self._placements = placements
        self._clock = clock
        self._limits = limits
        self._fits = fits
        self._features = features or Features({})
        self._estimates = estimates or Estimates(Quoter(lambda *_: None), PriceBook({}))
        self._limiter = limiter or RateLimiter(clock, lambda _: limits)
        self._routes = Routes(routing or Policies({}, Path()), self._deployments, self._look, self._estimates)
        self._books = Bookkeeper(placements, self._estimates, self._features, hold, clock)
        self._quotes = Quotes(self._routes.policies, self._deployments, placements, self._features, self._estimates,
                              self._look, clock)  # fmt: skip
        self._cached = CachedAnswers(cache, self._features, clock)
        self._waits = waits
        self._trials = Trials()
        self._estimated = estimated or {}
        self._told = settled
        self._prompts = prompts or Prompts(None, clock)
        self._holdout = holdout or Holdout(HoldoutConfig())
        self._admitted = 0
        self._answers: dict[str, Answer] = {}
        self._waiting: set[Answer] = set()  # for the answer of another request, that asks the same
        self._unsettled: dict[str, tuple[Receipt, tuple[HourShare, ...], str | None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._checkpoints: asyncio.Task[None] | None = None
        self._draining = False

    def models(self) -> tuple[str, ...]:
        """Those that can be asked for, and the policies that choose among them."""
        return (*self.deployed(), *self._routes.policies.names())

    def deployed(self) -> tuple[str, ...]:
        """The models alone."""
        return self._deployments.models()

    def offer(self, model: str, place: Place) -> None:
        """One more model can be asked for from now on."""
        self._deployments.offer(model, place)

    def deployments(self) -> list[DeploymentReport]:
        """Where each model runs, and how that goes."""
        return self._deployments.reports()

    def load(self) -> list[tuple[str, bool]]:
        """The model of each request under way, and whether its answer has begun."""
        return [(answer.opened.model, answer.progress.first_token_ns is not None) for answer in self._answers.values()]

    def remember(self, receipts: Sequence[Receipt]) -> None:
        """What was asked lately, oldest first, before the start: prompts go on from it."""
        self._prompts.remember(receipts)
        self._deployments.remember(receipts)

    async def start(self) -> None:
        """The first checkpoint tells the ledger of the devices, so that even a crash at once is accounted for."""
        await self.checkpoint()
        self._checkpoints = asyncio.create_task(self._keep_checkpointing())

    async def drain(self, grace_s: float) -> None:
        """Take nothing new, let what runs finish for `grace_s`, then cancel and settle the rest."""
        self._draining = True
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=grace_s)
        for answer in [*self._answers.values(), *self._waiting]:
            answer.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def close(self) -> None:
        """End the watch over the devices, whose backends must be closed by now."""
        if self._checkpoints is not None:
            self._checkpoints.cancel()
            await asyncio.gather(self._checkpoints, return_exceptions=True)
        await self._cached.close()
        await self._close_unsettled()
        await self._ledger.checkpoint(self._meter.stop())

    async def checkpoint(self) -> None:
        """Write down where everything stands: after this, accounts in the ledger are current."""
        await self._save_fits()
        await self._close_unsettled()
        checkpoint = self._meter.checkpoint()
        await self._ledger.checkpoint(checkpoint)
        self._meter.written(checkpoint)

    async def admit(self, request: Request, claim: Claim | None = None, *, cache_control: str | None = None) -> Answer:
        """Start answering. Returns once the open receipt, its hold and its claim are durable and the work is under way,
        or with an answer from the response cache, which `cache_control` may forbid.

        Raises what a client should be told: RateLimited, PaymentRequired, Forbidden, ModelNotFound, InvalidRequest,
        Conflict, Unavailable, LedgerUnavailable. Nothing was spent then, and there is no receipt.
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
        lookup = None
        try:
            request = self._prompts.hashed(self._aimed(request))
            lookup = self._cached.look(request, cache_control, self._holdout.arm("response_cache", request))
            if lookup is not None and (lookup.answer is not None or lookup.follows is not None):
                return await self._await_same(lookup, claim, ticket)
            return await self._run(request, claim, lookup, ticket)
        except BaseException:
            self._cached.withdraw(lookup)
            self._admitted -= 1
            ticket.withdraw()
            raise

    async def _run(self, request: Request, claim: Claim | None, lookup: Lookup | None, ticket: Ticket) -> Answer:
        journey, decision = await self._journey(request)
        leg = await journey.first()
        try:
            begun_ns = self._clock.monotonic_ns()
            receipt = self._books.opened(request, leg, explained(decision) | told(lookup))
            ticket.reserve(most_tokens(leg.plan), receipt.hold)
            bounded = await self._open(receipt, claim, leg.plan)
        except BaseException:
            leg.lease.give_back()
            raise
        judged = self._features.judges_output(receipt.attribution.feature)
        kept = lookup is not None and lookup.writes
        answer = Answer(receipt, beside_others(leg.plan), begun_ns, keep=judged or kept, claimed=claim is not None)
        answer.decision, answer.lookup = decision, lookup
        self._begin(answer, journey, leg)
        self._spawn(self._drive(answer, journey, leg, ticket, bounded=bounded))
        return answer

    async def _await_same(self, lookup: Lookup, claim: Claim | None, ticket: Ticket) -> Answer:
        """The answer that the cache has, or will have: of a request that runs and asks the same. Where nothing has to
        be held, claimed or waited for, the receipt is written whole when it closes."""
        begun_ns = self._clock.monotonic_ns()
        receipt, bounded = self._cached.opened(lookup), False
        written = lookup.answer is None or claim is not None or bool(lookup.request.outside_costs)
        if written:
            bounded = await self._ledger.open(receipt, claim)
        answer = Answer(receipt, Beside(0, 0), begun_ns, keep=lookup.answer is None, claimed=claim is not None)
        answer.lookup = lookup
        if lookup.answer is not None:
            await self._give(answer, lookup.answer, written=written)
            self._admitted -= 1
            ticket.leave(0, receipt.total)
        else:
            self._waiting.add(answer)
            self._spawn(self._wait(answer, lookup, ticket, bounded=bounded))
        return answer

    async def _give(self, answer: Answer, found: CachedAnswer, *, written: bool = True) -> None:
        for text in found.texts:
            answer.push(text)
        await self._finish(answer, *self._cached.hit(answer, found), written=written)

    async def _wait(self, answer: Answer, lookup: Lookup, ticket: Ticket, *, bounded: bool) -> None:
        """For the answer of the request that asks the same; where it has none, this one runs after all."""
        joined: tuple[Journey, Leg] | None = None
        try:
            await self._cached.wait(answer, self._deployments.policy(lookup.request.model).timeout_s)
            if lookup.answer is not None:
                await self._give(answer, lookup.answer)
            elif answer.ending:
                await self._finish(answer, *self._cached.refused(answer, None))
            else:
                joined = await self._join(answer, lookup, ticket)
        except Exception as error:
            if not isinstance(error, MillicentError):
                log.exception("receipt %s: what waited could not be run", answer.receipt_id)
            await self._finish(answer, *self._cached.refused(answer, as_told(error)))
        finally:
            self._waiting.discard(answer)
            if joined is None:
                self._cached.land(answer)
                self._admitted -= 1
                ticket.leave(0, answer.opened.total)
        if joined is not None:
            await self._drive(answer, *joined, ticket, bounded=bounded)

    async def _join(self, answer: Answer, lookup: Lookup, ticket: Ticket) -> tuple[Journey, Leg]:
        """Begin what has waited in vain. Raises as `admit`."""
        journey, decision = await self._journey(lookup.request)
        journey.began_earlier(self._clock.monotonic_ns() - answer.begun_ns)
        leg = await journey.first()
        try:
            receipt = self._books.joined(answer.opened, leg, explained(decision) | told(lookup))
            ticket.reserve(most_tokens(leg.plan), receipt.hold)
            begun = await self._ledger.begin(receipt)
        except BaseException:
            leg.lease.give_back()
            raise
        if not begun:
            leg.lease.give_back()
            raise PaymentRequired("A budget lacks the money for this request: raise it.", quote=leg.plan.quote)
        answer.opened, answer.decision = receipt, decision
        self._begin(answer, journey, leg)
        return journey, leg

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def quotes(self, request: Request, models: Sequence[str]) -> list[Quote]:
        """As `Quotes.quotes`."""
        return await self._quotes.quotes(self._prompts.hashed(request), models)

    async def count(self, request: Request) -> int:
        """As `Quotes.count`."""
        return await self._quotes.count(request)

    def running(self, answer: Answer) -> Receipt:
        """The receipt as it stands, priced so far."""
        if answer.closing is not None or not answer.opened.attempts:
            return answer.closing or answer.opened
        return self._books.running(answer, self._meter.reading(answer.receipt_id))

    async def _journey(self, request: Request) -> tuple[Journey, Decision | None]:
        """The way to the model that is asked for, or that a policy of this name decides on."""
        allowed = self._features.placements(request.attribution.feature)
        seams = (self._deployments, self._plan, self._clock, self._random, allowed)
        policy = self._routes.policies.find(request.model)
        if policy is None:
            return Journey(request, *seams), None
        decision = await self._routes.decide(policy, request, allowed, self._holdout.arm("routing", request))
        request = msgspec.structs.replace(request, model=decision.stages[0])
        if policy.checks is None or len(decision.stages) == 1:
            return Journey(request, *seams), decision
        return Cascade(request, decision.stages, policy.checks, *seams), decision

    async def _look(self, request: Request, deployment: Deployment) -> Asked:
        request, call, marks = await self._prompts.prepare(request, deployment.backend, self._prices_of, None)
        return self._asked(request, call, marks)

    async def _plan(self, request: Request, deployment: Deployment) -> Plan:
        arm = self._holdout.arm("prompt_caching", request)
        request, call, marks = await self._prompts.prepare(request, deployment.backend, self._prices_of, arm)
        plan = await self._estimates.within(request, deployment.backend, call, self._asked(request, call, marks))
        self._check_target(request, plan)
        return msgspec.structs.replace(plan, marks=marks)

    def _prices_of(self, call: Call) -> Prices | None:
        now_ns = self._clock.now_ns()
        return self._estimates.prices(call.served_model, self._placements[call.placement].at(now_ns), now_ns)

    def _asked(self, request: Request, call: Call, marks: Marks | None) -> Asked:
        beside = [answer.model for answer in self._answers.values()].count(request.model)
        now_ns = self._clock.now_ns()
        placement = self._placements[call.placement].at(now_ns)
        timed = call.placement in self._estimated
        cached = self._prompts.cached(request, call, marks)
        return self._estimates.asked(request, call, placement, beside + 1, now_ns, timed=timed, cached=cached)

    def _aimed(self, request: Request) -> Request:
        """With its feature's latency target, else its policy's, where it has none of its own."""
        if request.latency_target_ms is None:
            target_ms = self._features.latency_target_ms(request.attribution.feature)
            request = msgspec.structs.replace(request, latency_target_ms=target_ms)
        policy = self._routes.policies.find(request.model)
        return request if policy is None else policy.aimed(request)

    def _check_target(self, request: Request, plan: Plan) -> None:
        """Raises RateLimited where the target cannot be met. While nobody knows what steps take, nobody can tell."""
        if request.latency_target_ms is None or self._waits is None:
            return
        others = [
            msgspec.structs.replace(
                answer.beside, made_tokens=answer.progress.tokens, begun=answer.progress.first_token_ns is not None
            )
            for answer in self._answers.values()
            if answer.model == request.model
        ]
        wait = self._waits.forecast(request.model, beside_others(plan), others, streamed=request.stream)
        if wait is None:
            return
        try:
            check_target(request.latency_target_ms, wait, len(others))
        except RateLimited:
            if others or not self._trials.due(request.model, self._clock.monotonic_ns()):
                raise

    async def _open(self, receipt: Receipt, claim: Claim | None, plan: Plan) -> bool:
        """As `Ledger.open`; who is refused for want of budget is shown what it would have cost."""
        try:
            return await self._ledger.open(receipt, claim)
        except PaymentRequired as error:
            error.quote = plan.quote
            raise

    def _begin(self, answer: Answer, journey: Journey, leg: Leg) -> None:
        """The attempt is durable: count for it from now on."""
        call, opened = leg.plan.call, answer.opened
        self._answers[opened.id] = answer
        attempt = opened.attempts[-1]
        device = None if call.sequences else self._estimated.get(attempt.placement)
        sequences = call.sequences
        answer.flight = None
        if device is not None:
            prompts = 1 + len(leg.request.further_prompts)
            answer.flight = device.enter(
                call.served_model, leg.plan.asked.input_tokens, leg.request.choices * prompts, prompts
            )
            sequences = (answer.flight.number,)
            answer.shown.append(Provenance.ESTIMATED)
        elif call.sequences:
            answer.shown.append(Provenance.MEASURED)
        else:
            paid_by_time = self._books.placement(attempt.placement, attempt.started_at_ns).kind != "api"
            answer.shown.append(Provenance.UNKNOWN if paid_by_time else None)
        # Who shows no steps shows no tokens either, only text; what it reports comes at the end.
        known = Provenance.MEASURED if call.sequences else Provenance.ESTIMATED
        answer.progress = Progress(known, leg.plan.asked.input_tokens)
        answer.model, answer.beside = leg.request.model, beside_others(leg.plan)
        if leg.role is not Role.VERIFICATION:
            answer.answered_by = leg.request.model
        journey.begun(answer, leg)
        self._prompts.begun(opened.id, leg.plan.marks)
        estimated_on = None if device is None else device.name
        self._meter.open(opened.id, attempt.ordinal, sequences, estimated_on=estimated_on)
        self._meter.follow_usage(opened.id, answer.progress.usage)

    async def _drive(self, answer: Answer, journey: Journey, leg: Leg, ticket: Ticket, *, bounded: bool) -> None:
        try:
            end = await self._attempt(answer, journey, leg, bounded=bounded)
            while (following := await self._following(answer, journey, leg, end, ticket)) is not None:
                leg = following
                self._begin(answer, journey, leg)
                end = await self._attempt(answer, journey, leg, bounded=bounded)
            await self._settle(answer, journey, end)
            if [each.role for each in answer.opened.attempts] == [Role.INFERENCE]:  # else it tells of other models too
                self._learn(answer, leg.plan)
        except Exception as error:
            log.exception("receipt %s: it could not be closed; recovery will", answer.receipt_id)
            answer.fail(as_told(error))
        finally:
            self._cached.land(answer)
            leg.lease.give_back()
            self._prompts.settled(answer.receipt_id, answer.closing if answer.standing is None else None)
            del self._answers[answer.receipt_id]
            self._admitted -= 1
            used = answer.closing or answer.opened
            tokens = tokens_of(used.usage)
            ticket.leave(None if tokens is None else answer.tokens_before + tokens, used.total)

    async def _attempt(self, answer: Answer, journey: Journey, leg: Leg, *, bounded: bool) -> End:
        purse = self._purse(answer, leg.plan, bounded=bounded)
        try:
            end = await self._consume(answer, journey, leg.plan.call, purse)
        except MillicentError as error:  # the backend went away between prepare and start
            end = End(FinishReason.ERROR, Usage(), error)
        except Exception as error:
            log.exception("receipt %s: the backend failed in a way it should not", answer.receipt_id)
            end = End(FinishReason.ERROR, Usage(), as_told(error))
        if answer.flight is not None:
            answer.flight.leave(answered=end.error is None)
        await purse.settle()
        if end.reason is FinishReason.CANCELLED and not answer.begun:
            leg.lease.give_back()
        else:
            leg.lease.end(end.error)
            if end.error is None:
                self._deployments.held(leg.request, leg.lease.deployment)
        if end.usage.leaves or end.reason not in {FinishReason.CANCELLED, FinishReason.ERROR}:
            self._meter.note_usage(answer.receipt_id, end.usage)
        return end

    async def _following(self, answer: Answer, journey: Journey, leg: Leg, end: End, ticket: Ticket) -> Leg | None:
        """The attempt that comes after one that failed; None where there is none."""
        if end.error is None and not isinstance(journey, Cascade):
            return None
        try:
            return await self._next(answer, journey, leg, end, ticket)
        except Exception:
            log.exception("receipt %s: no other attempt could be made", answer.receipt_id)
            return None

    async def _next(self, answer: Answer, journey: Journey, leg: Leg, end: End, ticket: Ticket) -> Leg | None:
        """Found, within the caller's maximum and rates, held for, and durable."""
        reading = self._meter.end_attempt(answer.receipt_id)
        left = journey.maximum
        if left is not None:
            spent = self._books.spent(answer, end, reading)
            if spent is None:
                return None
            left -= spent
        following = await journey.following(answer, leg, end, left)
        if following is None:
            return None
        try:
            receipt, reserved = self._books.followed(answer, following, end, reading)
            standing = self._books.ended(answer, end, reading) if end.error is None else answer.standing
            used = tokens_of(reading.usage)
            before = answer.tokens_before + (most_tokens(leg.plan) if used is None else used)
            ticket.reserve(before + most_tokens(following.plan), receipt.hold)
            begun = await self._ledger.begin(receipt)
        except (RateLimited, LedgerUnavailable):
            begun = False
        except BaseException:
            following.lease.give_back()
            raise
        if not begun:
            following.lease.give_back()
            return None
        answer.opened, answer.reserved, answer.tokens_before = receipt, reserved, before
        answer.standing = standing
        return following

    async def _consume(self, answer: Answer, journey: Journey, call: Call, purse: Purse) -> End:
        run = call.start()
        answer.attach(run)
        watchdog = Watchdog(run, journey.policy, journey.left_s)
        try:
            async for chunk in run:
                if isinstance(chunk, End):
                    stopped = answer.stopped_at_limit and chunk.reason is FinishReason.CANCELLED
                    return cut_short(call, chunk) if stopped else watchdog.verdict(chunk)
                watchdog.heard()
                if answer.flight is not None and isinstance(chunk, Text):
                    answer.flight.heard(chunk.tokens)
                answer.progress.note(chunk, self._clock.monotonic_ns())
                answer.push(Text(chunk.line, 0) if isinstance(chunk, Vector) else chunk)
                if purse.watches_pieces and not answer.stopped_at_limit:
                    await purse.spent(cost_so_far(self.running(answer), answer))
        finally:
            watchdog.close()
        message = "The backend stopped without saying how the answer ended: retry."
        raise MillicentError(message, code="backend_protocol")

    def _purse(self, answer: Answer, plan: Plan, *, bounded: bool) -> Purse:
        rate = self._books.placement(plan.call.placement, answer.opened.created_at_ns).receipt_usd_per_hour
        return Purse(answer, self._ledger, self._meter, plan, bounded=bounded, usd_per_hour=rate)

    async def _settle(self, answer: Answer, journey: Journey, end: End) -> None:
        reading = self._meter.close(answer.receipt_id)
        # Who left while nothing ran, between attempts, has cancelled what came before too.
        left = end.error is not None and answer.cancelled and not answer.begun
        final = End(FinishReason.CANCELLED, end.usage) if left else journey.concluded(answer, end)
        receipt = self._books.closed(answer, end, final, reading, journey.notes())
        await self._finish(answer, self._routes.with_savings(receipt, answer), final, reading.shares)

    async def _finish(
        self, answer: Answer, receipt: Receipt, end: End, shares: tuple[HourShare, ...] = (), *, written: bool = True
    ) -> None:
        """Close it; the answer ends when that is durable. Where that fails it is tried again with every checkpoint,
        unless nothing of it was `written` before: then that raises LedgerUnavailable."""
        answer.closing = receipt
        try:
            await self._save_fits()
            await self._ledger.close(receipt, shares, answer.kept(end))
        except LedgerUnavailable as error:
            if not written:
                raise
            self._unsettled[receipt.id] = (receipt, shares, answer.kept(end))
            answer.fail(error)
            return
        answer.finish(receipt, end)
        self._told(receipt)

    def _learn(self, answer: Answer, plan: Plan) -> None:
        """From an answer that one attempt gave, as one of the model that gave it."""
        settled = None if answer.settled is None else learnable(answer.settled)
        self._estimates.learn(settled, plan)
        if self._waits is not None and settled is not None:
            self._waits.learn(settled)

    async def _keep_checkpointing(self) -> None:
        failing = False
        for number in itertools.count(1):
            await asyncio.sleep(CHECKPOINT_INTERVAL_S)
            try:
                await self.checkpoint()
                if number % CHECKPOINTS_PER_MAINTENANCE == 0:
                    await self._ledger.maintain()
                    await self._cached.maintain()
                failing = False
            except LedgerUnavailable as error:
                if not failing:
                    log.warning("the ledger can't be written: %s", error.message)
                failing = True
            except Exception:  # without checkpoints a crash would lose more than a second, and nobody would know
                if not failing:
                    log.exception("a checkpoint failed in a way it should not")
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
            self._told(closing[0])
