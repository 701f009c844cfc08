"""Routes for what comes after an answer: lines that are posted later, and feedback."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from typing import Protocol

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from millicent.control.access import Caller
from millicent.core.clock import Clock
from millicent.core.errors import InvalidRequest, NotFound
from millicent.core.money import ZERO, Money
from millicent.core.receipts import Feedback, Line, Receipt, outside_line
from millicent.core.request import Message, OutsideCost
from millicent.ledger.queries import LedgerQueries
from millicent.pipeline.features import TOOL_FAILED, TOOL_SUCCEEDED, Features
from millicent.server.authentication import caller_of
from millicent.server.bodies import read_body
from millicent.server.config import ServerConfig
from millicent.wire import late as late_wire
from millicent.wire import receipts as receipts_wire

# Sums end at nine thousand million dollars: what a client's key can claim in a lifetime stays far below.
_MOST_BY_A_CLIENT = Money.from_usd(1000)


def check_costs(caller: Caller, costs: Sequence[OutsideCost]) -> None:
    """Raises Forbidden for what only an admin may tell of."""
    if any(cost.amount < ZERO for cost in costs):
        caller.demand(caller.administers, "post a credit")
    if Money.total(cost.amount for cost in costs) > _MOST_BY_A_CLIENT:
        caller.demand(caller.administers, f"post more than ${_MOST_BY_A_CLIENT} at once")


class LateWrites(Protocol):
    """The ledger, as far as it is needed here."""

    async def post_lines(self, receipt_id: str, lines: tuple[Line, ...]) -> None: ...

    async def add_feedback(self, feedback: tuple[Feedback, ...]) -> None: ...


class LateEntries:
    """A key may add to its own receipts, one that reads all to any. To others a receipt isn't there."""

    def __init__(
        self,
        *,
        ledger: LateWrites,
        queries: LedgerQueries,
        features: Features,
        clock: Clock,
        config: ServerConfig,
    ) -> None:
        self._ledger = ledger
        self._queries = queries
        self._features = features
        self._clock = clock
        self._config = config

    @property
    def routes(self) -> list[BaseRoute]:
        return [
            Route("/v1/receipts/{receipt_id}/lines", self._add_lines, methods=["POST"]),
            Route("/v1/feedback", self._add_feedback, methods=["POST"]),
        ]

    async def _add_lines(self, request: Request) -> Response:
        receipt_id = request.path_params["receipt_id"]
        now_ns = self._clock.now_ns()
        costs = late_wire.decode_lines(await self._body(request), now_ns)
        await self._writable(request, [receipt_id])
        check_costs(caller_of(request.scope), costs)
        await self._ledger.post_lines(receipt_id, tuple(outside_line(cost, now_ns) for cost in costs))
        [receipt] = await asyncio.to_thread(self._queries.receipts_of, [receipt_id])
        return _created(receipts_wire.receipt_body(receipt))

    async def _add_feedback(self, request: Request) -> Response:
        given, several = late_wire.decode_feedback(await self._body(request), self._clock.now_ns())
        found = await self._writable(request, {each.receipt for each in given})
        feature_of = {receipt.id: receipt.attribution.feature for receipt in found}
        judged = tuple(
            msgspec.structs.replace(
                each, useful=self._features.feedback(feature_of[each.receipt], each.score, each.label)
            )
            for each in given
        )
        await self._ledger.add_feedback(judged)
        bodies = [late_wire.feedback_body(each) for each in judged]
        return _created(receipts_wire.list_body(bodies, None) if several else bodies[0])

    async def hear_tools(self, messages: Sequence[Message], caller: Caller) -> None:
        """What a request tells of tools that earlier answers called, where a feature's rule goes by it. Told again, as
        conversations do, it changes nothing."""
        told = late_wire.tool_answers(messages) if self._features.judges_tools else {}
        if not told:
            return
        verdicts = []
        for receipt in await asyncio.to_thread(self._queries.receipts_of, list(told)):
            useful = self._features.tools(receipt.attribution.feature, told[receipt.id])
            if useful is None or receipt.status is None or not _may_write(caller, receipt):
                continue
            label = TOOL_SUCCEEDED if useful else TOOL_FAILED
            verdicts.append(Feedback(receipt.id, self._clock.now_ns(), label=label, useful=useful, id=label))
        if verdicts:
            await self._ledger.add_feedback(tuple(verdicts))

    async def _writable(self, request: Request, receipt_ids: Iterable[str]) -> list[Receipt]:
        wanted = list(receipt_ids)
        found = await asyncio.to_thread(self._queries.receipts_of, wanted)
        caller = caller_of(request.scope)
        allowed = [one for one in found if _may_write(caller, one)]
        if missing := set(wanted) - {receipt.id for receipt in allowed}:
            raise NotFound(
                f"There is no receipt `{min(missing)[:100]}`: check the `X-Millicent-Receipt` header.", param="receipt"
            )
        return allowed

    async def _body(self, request: Request) -> bytes:
        config = self._config
        try:
            return await read_body(
                request.scope, request.receive, max_mb=config.max_body_mb, timeout_s=config.body_timeout_s
            )
        except ClientDisconnect:
            raise InvalidRequest("The client left before its body was here: send it again.") from None


def _may_write(caller: Caller, receipt: Receipt) -> bool:
    return caller.reads_all or receipt.attribution.key == caller.id


def _created(body: object) -> Response:
    return Response(receipts_wire.encode(body), status_code=201, media_type="application/json")
