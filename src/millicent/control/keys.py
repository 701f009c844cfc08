"""API keys. A token is `mk_`, the key's public identifier, and 256 random bits that only its holder has.

The ledger keeps the SHA-256 of the random part: a fast hash is right here, because nobody can guess 256 random bits,
however fast; slow hashes are for passwords that people choose.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import sqlite3
from enum import StrEnum

import msgspec

from millicent.control.config import Rates
from millicent.core.clock import Clock
from millicent.core.errors import Forbidden, NotFound
from millicent.core.identifiers import Ids
from millicent.core.request import Attribution, name_of

PINNABLE = ("user", "team", "feature", "tier")

_SECRET_BYTES = 32
_NO_SECRET = bytes(32)


class Scope(StrEnum):
    """`admin` may do everything; `viewer` reads everything and runs nothing; `client` runs models and reads its own
    receipts."""

    ADMIN = "admin"
    VIEWER = "viewer"
    CLIENT = "client"


class ApiKey(msgspec.Struct, frozen=True, kw_only=True):
    """Times are UTC nanoseconds. Until `old_until_ns` the secret before the last rotation is good too.

    What is pinned (user, team, feature, tier) is on every request of the key, whatever its headers say. `models` None
    allows all.
    """

    id: str
    name: str | None = None
    scope: Scope = Scope.CLIENT
    secret_sha256: bytes
    old_secret_sha256: bytes | None = None
    old_until_ns: int | None = None
    created_at_ns: int
    expires_at_ns: int | None = None
    revoked_at_ns: int | None = None
    team: str | None = None
    user: str | None = None
    feature: str | None = None
    tier: str | None = None
    models: tuple[str, ...] | None = None
    rates: Rates = Rates()

    def state(self, now_ns: int) -> str:
        """active, expired or revoked."""
        if self.revoked_at_ns is not None and self.revoked_at_ns <= now_ns:
            return "revoked"
        return "expired" if self.expires_at_ns is not None and self.expires_at_ns <= now_ns else "active"

    def accepts(self, secret: str, now_ns: int) -> bool:
        """In constant time for secrets of any content."""
        given = _hash(secret)
        good = hmac.compare_digest(given, self.secret_sha256)
        old_is_good = self.old_until_ns is not None and now_ns < self.old_until_ns
        return good | (hmac.compare_digest(given, self.old_secret_sha256 or _NO_SECRET) and old_is_good)

    def attribute(self, given: Attribution) -> Attribution:
        """The request's attribution with this key's on top. Raises Forbidden for a value that goes against a pin."""
        pins = {field: getattr(self, field) for field in PINNABLE if getattr(self, field) is not None}
        for field, pinned in pins.items():
            value = getattr(given, field)
            if value is not None and value != pinned:
                raise Forbidden(
                    f"This key is pinned to {field} `{pinned}`, and the request says `{value}`: leave out "
                    f"`X-Millicent-{field.capitalize()}` (and `{field}` in the body), or use another key.",
                    param=f"x-millicent-{field}",
                    code="pinned_attribution",
                )
        return msgspec.structs.replace(given, key=self.id, **pins)

    def check_model(self, model: str) -> None:
        if self.models is not None and model not in self.models:
            raise Forbidden(
                f"This key may not use model `{model[:100]}`: it may use {', '.join(self.models) or 'none'}.",
                param="model",
                code="model_not_allowed",
            )


def new_secret() -> tuple[str, bytes]:
    """A secret, to be shown once, and what is kept of it."""
    secret = secrets.token_urlsafe(_SECRET_BYTES)
    return secret, _hash(secret)


def new_key(ids: Ids, clock: Clock, **fields: object) -> tuple[ApiKey, str]:
    """A key that isn't stored yet, and its token. An empty name or pin is none. Raises InvalidRequest."""
    for field in ("name", *PINNABLE):
        given = fields.get(field)
        fields[field] = name_of(given, field) or None if isinstance(given, str) else None
    secret, secret_sha256 = new_secret()
    made = ApiKey(id=ids.new("mk"), secret_sha256=secret_sha256, created_at_ns=clock.now_ns(), **fields)  # type: ignore[arg-type]
    return made, token_of(made.id, secret)


def token_of(key_id: str, secret: str) -> str:
    return f"{key_id}_{secret}"


def split_token(token: str) -> tuple[str, str] | None:
    """The key's identifier and the secret; None where this is no token of ours."""
    prefix, _, rest = token.partition("_")
    identifier, _, secret = rest.partition("_")
    return (f"mk_{identifier}", secret) if prefix == "mk" and identifier and secret else None


def insert_key(connection: sqlite3.Connection, key: ApiKey) -> None:
    row = msgspec.structs.asdict(key)
    row["models"] = None if key.models is None else msgspec.json.encode(key.models).decode()
    row["rates"] = msgspec.json.encode(key.rates).decode()
    names = ", ".join(row)
    connection.execute(f"INSERT INTO api_keys ({names}) VALUES ({', '.join(f':{name}' for name in row)})", row)  # noqa: S608 - our own names


def read_keys(connection: sqlite3.Connection) -> list[ApiKey]:
    """Oldest first."""
    cursor = connection.cursor()
    cursor.row_factory = sqlite3.Row
    keys = []
    for row in cursor.execute("SELECT * FROM api_keys ORDER BY created_at_ns, id"):
        fields = dict(row)
        fields["scope"] = Scope(fields["scope"])
        fields["models"] = None if fields["models"] is None else tuple(msgspec.json.decode(fields["models"]))
        fields["rates"] = msgspec.json.decode(fields["rates"], type=Rates)
        keys.append(ApiKey(**fields))
    return keys


def read_version(connection: sqlite3.Connection) -> int:
    """Changes whenever a key does."""
    (number,) = connection.execute("SELECT number FROM api_keys_version").fetchone()
    return int(number)


def rotate_key(connection: sqlite3.Connection, key_id: str, now_ns: int, overlap_ns: int) -> str:
    """A new secret for the same key; the old one is good for `overlap_ns` more. Returns the new token."""
    secret, secret_sha256 = new_secret()
    changed = connection.execute(
        "UPDATE api_keys SET old_secret_sha256 = secret_sha256, old_until_ns = ?, secret_sha256 = ?"
        " WHERE id = ? AND revoked_at_ns IS NULL",
        (now_ns + overlap_ns, secret_sha256, key_id),
    )
    if changed.rowcount == 0:
        raise _absent(key_id)
    return token_of(key_id, secret)


def revoke_key(connection: sqlite3.Connection, key_id: str, now_ns: int) -> None:
    """From now on it is refused. A key that is revoked already stays so."""
    changed = connection.execute(
        "UPDATE api_keys SET revoked_at_ns = coalesce(revoked_at_ns, ?) WHERE id = ?", (now_ns, key_id)
    )
    if changed.rowcount == 0:
        raise _absent(key_id)


def _absent(key_id: str) -> NotFound:
    return NotFound(f"There is no key `{key_id[:60]}` in use: `millicent keys list` shows those there are.")


def _hash(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()
