"""`POST /v1/quote`: a chat request, optionally with `models`, to what it would be on each."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from millicent.core.errors import InvalidRequest
from millicent.core.request import Request
from millicent.wire import openai_chat
from millicent.wire.decoding import decode_at

_MOST_MODELS = 32
_body_decoder = msgspec.json.Decoder(dict[str, msgspec.Raw])
_models_decoder = msgspec.json.Decoder(list[str])


def decode(body: bytes, headers: Mapping[str, str], receipt_id: str) -> tuple[Request, tuple[str, ...]]:
    """The request, and the models to quote it on: those in `models`, else its own. Raises InvalidRequest."""
    try:
        fields = _body_decoder.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        # Not even an object: the chat decoder says what is wrong with it.
        return openai_chat.decode(body, headers, receipt_id)[0], ()
    raw = fields.pop("models", None)
    if raw is None:
        request, _ = openai_chat.decode(body, headers, receipt_id)
        return request, (request.model,)
    named = decode_at(raw, _models_decoder, "models")
    models = tuple(dict.fromkeys(named))
    if not 1 <= len(models) <= _MOST_MODELS:
        raise InvalidRequest(f"`models` names {len(models)}: send 1 to {_MOST_MODELS}.", param="models")
    fields.setdefault("model", msgspec.Raw(msgspec.json.encode(models[0])))
    request, _ = openai_chat.decode(msgspec.json.encode(fields), headers, receipt_id)
    return request, models
