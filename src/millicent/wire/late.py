"""What is told after an answer, or beside a request: outside costs and feedback."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Annotated, Any

import msgspec

from millicent.core.clock import NS_PER_S, iso_utc, parse_time_ns
from millicent.core.errors import InvalidRequest
from millicent.core.money import Money
from millicent.core.receipts import Feedback, Meter, Role
from millicent.core.request import Message, OutsideCost
from millicent.wire.decoding import decode_body

LINES_HEADER = "x-millicent-lines"
_MOST_USD = Decimal(1_000_000)
_LEAST_QUANTITY, _MOST_QUANTITY = Decimal("1e-9"), Decimal(10) ** 15
_CLOCKS_DIFFER_NS = 300 * NS_PER_S
# As every dialect's codec makes them: the receipt, which choice, and which call of it.
_CALL_ID = re.compile(r"[a-z]+_([0-9a-z]{26})_[0-9]+_[0-9]+")

Name = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
Note = Annotated[str, msgspec.Meta(max_length=4096)]


class LineBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    role: Role
    meter: Meter
    amount_usd: Decimal
    quantity: Decimal = Decimal(1)
    unit: Name = "item"
    note: Note | None = None
    incurred_at: str | None = None
    id: Name | None = None


class FeedbackBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    receipt: Name
    score: Decimal | None = None
    label: Name | None = None
    comment: Note | None = None
    id: Name | None = None


_Lines = Annotated[list[LineBody], msgspec.Meta(min_length=1, max_length=1000)]
_Feedback = Annotated[list[FeedbackBody], msgspec.Meta(min_length=1, max_length=1000)]
_line_decoder = msgspec.json.Decoder(LineBody)
_lines_decoder = msgspec.json.Decoder(_Lines)
_feedback_decoder = msgspec.json.Decoder(FeedbackBody)
_feedbacks_decoder = msgspec.json.Decoder(_Feedback)


def decode_lines(body: bytes, now_ns: int) -> tuple[OutsideCost, ...]:
    """One line, or a list of them. Raises InvalidRequest naming the field."""
    several = body.lstrip()[:1] == b"["
    if several:
        given = decode_body(body, _lines_decoder, LineBody.__struct_fields__)
    else:
        given = [decode_body(body, _line_decoder, LineBody.__struct_fields__)]
    return tuple(_cost(line, f"[{i}]." if several else "", now_ns) for i, line in enumerate(given))


def read_lines(headers: Mapping[str, str], now_ns: int) -> tuple[OutsideCost, ...]:
    """`X-Millicent-Lines`: costs known when the request is sent, as JSON, like the body of `/lines`."""
    header = headers.get(LINES_HEADER)
    if header is None:
        return ()
    try:
        return decode_lines(header.encode("latin-1"), now_ns)
    except InvalidRequest as error:
        raise InvalidRequest(f"Header `{LINES_HEADER}`: {error.message}", param=LINES_HEADER) from None


def decode_feedback(body: bytes, now_ns: int) -> tuple[tuple[Feedback, ...], bool]:
    """What was given, not yet judged, and whether it was a list. Raises InvalidRequest naming the field."""
    several = body.lstrip()[:1] == b"["
    if several:
        given = decode_body(body, _feedbacks_decoder, FeedbackBody.__struct_fields__)
    else:
        given = [decode_body(body, _feedback_decoder, FeedbackBody.__struct_fields__)]
    return tuple(_feedback(each, f"[{i}]." if several else "", now_ns) for i, each in enumerate(given)), several


def tool_answers(messages: Sequence[Message]) -> dict[str, list[Message]]:
    """What tools answered since the assistant's last turn, by the receipt of the answer that called them: the
    identifiers that we give to calls name it."""
    found: dict[str, list[Message]] = {}
    for message in reversed(messages):
        if message.role == "assistant":
            break
        called = _CALL_ID.fullmatch(message.tool_call_id or "")
        if message.role == "tool" and called is not None:
            found.setdefault(f"rcpt_{called[1]}", []).append(message)
    return found


def feedback_body(feedback: Feedback) -> dict[str, Any]:
    return {
        "object": "feedback",
        "receipt": feedback.receipt,
        "posted_at": iso_utc(feedback.posted_at_ns),
        "score": feedback.score,
        "label": feedback.label,
        "comment": feedback.comment,
        "useful": feedback.useful,
        "id": feedback.id,
    }


def _cost(line: LineBody, where: str, now_ns: int) -> OutsideCost:
    amount, quantity = line.amount_usd, line.quantity
    if not amount.is_finite() or abs(amount) > _MOST_USD:
        raise InvalidRequest(
            f"Invalid `{where}amount_usd`: {_short(amount)}; send dollars up to {_MOST_USD}.",
            param=f"{where}amount_usd",
        )
    if amount < 0 and line.role is not Role.ADJUSTMENT:
        raise InvalidRequest(
            f"Invalid `{where}amount_usd`: {_short(amount)}; only a line of role `adjustment` may be negative.",
            param=f"{where}amount_usd",
        )
    if not quantity.is_finite() or (quantity and not _LEAST_QUANTITY <= quantity <= _MOST_QUANTITY):
        raise InvalidRequest(
            f"Invalid `{where}quantity`: {_short(quantity)}; send 0, or {_LEAST_QUANTITY} to {_MOST_QUANTITY:.0e}.",
            param=f"{where}quantity",
        )
    return OutsideCost(
        role=line.role,
        meter=line.meter,
        quantity=quantity,
        unit=_printable(line.unit, f"{where}unit") or "",
        amount=Money.from_usd(amount),
        note=line.note,
        incurred_at_ns=None if line.incurred_at is None else _time(line.incurred_at, f"{where}incurred_at", now_ns),
        id=_printable(line.id, f"{where}id"),
    )


def _feedback(given: FeedbackBody, where: str, now_ns: int) -> Feedback:
    if given.score is None and given.label is None and given.comment is None:
        raise InvalidRequest(
            f"Feedback on `{given.receipt[:100]}` says nothing: send a score, a label or a comment.",
            param=f"{where}score",
            code="missing_required_parameter",
        )
    if given.score is not None and not (given.score.is_finite() and 0 <= given.score <= 1):
        raise InvalidRequest(
            f"Invalid `{where}score`: {_short(given.score)}; send a number from 0 to 1.", param=f"{where}score"
        )
    score = None if given.score is None else round(given.score, 9).normalize()
    label, own_id = _printable(given.label, f"{where}label"), _printable(given.id, f"{where}id")
    return Feedback(given.receipt, now_ns, score, label, given.comment, None, own_id)


def _time(text: str, where: str, now_ns: int) -> int:
    try:
        at_ns = parse_time_ns(text)
    except ValueError:
        raise InvalidRequest(
            f"Invalid `{where}`: `{text[:40]}`; send a time such as 2026-01-31T12:00:00Z.", param=where
        ) from None
    if not 0 <= at_ns <= now_ns + _CLOCKS_DIFFER_NS:
        raise InvalidRequest(f"Invalid `{where}`: `{text[:40]}` is not in the past; send when it arose.", param=where)
    return at_ns


def _printable(text: str | None, where: str) -> str | None:
    if text is not None and not text.isprintable():
        raise InvalidRequest(f"`{where}` holds control characters: remove them.", param=where)
    return text


def _short(number: Decimal) -> str:
    return str(number)[:40]
