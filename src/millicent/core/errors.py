"""Everything that can go wrong, in one tree. Each message says what was wrong, where, and what to do.

MillicentError
├── InvalidRequest        400  the request cannot be served as written; `param` names the field
├── Unauthorized          401
├── PaymentRequired       402  a budget or the caller's maximum cost stands in the way
├── Forbidden             403
├── ModelNotFound         404
├── NotFound              404
├── Conflict              409
├── TooLarge              413
├── RateLimited           429  `retry_after_s` is set
├── NotCached             504  only a kept answer was wanted, and there is none
├── UpstreamError         502  a backend elsewhere failed, refused us or made no sense
│   └── UpstreamTimeout   504  it took longer than allowed
├── Unavailable           503  not ready, or shutting down; retry
│   ├── EngineCrashed     503  the engine process ended while this ran; retry
│   └── LedgerUnavailable 503  receipts cannot be made durable, so nothing is started
├── ConfigError                the configuration file or the command line
└── ModelError                 a model's files: missing, truncated, corrupt, unsupported
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from millicent.core.quotes import Quote


_MOST_CHARACTERS = 1000
_MOST_IN_PARAM = 200
_MOST_QUOTED = 400


def one_line(text: str, most: int = _MOST_QUOTED) -> str:
    """At most so many characters, printable, without line ends."""
    if len(text) <= most and text.isprintable():
        return text
    shown = " ".join("".join(each if each.isprintable() else " " for each in text[: 4 * most]).split())
    return shown if len(shown) <= most else shown[: most - 4].rstrip() + " ..."


class MillicentError(Exception):
    """`message` is one line for a person; `status` the HTTP status; `code` a stable word for programs.

    `retryable`: the same request may succeed if it is sent again. What a message or `param` quotes of a request may be
    as long as a body and hold anything: both are cut to a line.
    """

    status = 500
    retryable = False
    kind = "server_error"
    code: str = "internal_error"

    def __init__(
        self, message: str, *, param: str | None = None, code: str | None = None, retry_after_s: int | None = None
    ) -> None:
        self.message = one_line(message, _MOST_CHARACTERS)
        super().__init__(self.message)
        self.param = param if param is None else one_line(param, _MOST_IN_PARAM)
        self.code = code or type(self).code
        self.retry_after_s = retry_after_s


class InvalidRequest(MillicentError):
    status = 400
    kind = "invalid_request_error"
    code = "invalid_value"


class Unauthorized(MillicentError):
    status = 401
    kind = "authentication_error"
    code = "invalid_api_key"


class PaymentRequired(MillicentError):
    """`quote` says what the request would have cost, where it could be told."""

    status = 402
    kind = "insufficient_quota"
    code = "budget_exceeded"

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
        quote: Quote | None = None,
    ) -> None:
        super().__init__(message, param=param, code=code, retry_after_s=retry_after_s)
        self.quote = quote


class Forbidden(MillicentError):
    status = 403
    kind = "permission_error"
    code = "forbidden"


class ModelNotFound(MillicentError):
    status = 404
    kind = "invalid_request_error"
    code = "model_not_found"


class NotFound(MillicentError):
    status = 404
    kind = "invalid_request_error"
    code = "not_found"


class Conflict(MillicentError):
    status = 409
    kind = "invalid_request_error"
    code = "idempotency_conflict"


class TooLarge(MillicentError):
    status = 413
    kind = "invalid_request_error"
    code = "request_too_large"


class RateLimited(MillicentError):
    status = 429
    retryable = True
    kind = "rate_limit_error"
    code = "rate_limit_exceeded"


class UpstreamError(MillicentError):
    """`retryable` is False where the upstream would say the same again: it doesn't know our key, or the model."""

    status = 502
    retryable = True
    kind = "upstream_error"
    code = "upstream_failed"

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
        retryable: bool = True,
    ) -> None:
        super().__init__(message, param=param, code=code, retry_after_s=retry_after_s)
        self.retryable = retryable


class UpstreamTimeout(UpstreamError):
    status = 504
    code = "upstream_timeout"


class NotCached(MillicentError):
    status = 504
    kind = "invalid_request_error"
    code = "not_cached"


class Unavailable(MillicentError):
    status = 503
    retryable = True
    kind = "service_unavailable"
    code = "not_ready"


class EngineCrashed(Unavailable):
    code = "engine_crashed"


class LedgerUnavailable(Unavailable):
    retryable = False
    code = "ledger_unavailable"


class ConfigError(MillicentError):
    code = "invalid_configuration"


class ModelError(MillicentError):
    code = "model_unusable"
