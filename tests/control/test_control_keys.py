"""Keys: what is kept of them, who is let in, and what they pin."""

from __future__ import annotations

import asyncio
import sqlite3
from typing import Any

import msgspec
import pytest

from millicent.control.access import Caller, KeyRing
from millicent.control.keys import ApiKey, Scope, insert_key, new_key, read_keys, revoke_key, rotate_key
from millicent.control.showing import key_body
from millicent.core.clock import NS_PER_S, ManualClock
from millicent.core.errors import Forbidden, NotFound, Unauthorized
from millicent.core.identifiers import SequentialIds
from millicent.core.request import Attribution
from millicent.ledger.memory import MemoryLedger
from millicent.server.sessions import COOKIE, LIFETIME_S, Sessions


class World:
    """A ledger with keys, and a ring that reads them."""

    def __init__(self, *, local: bool = True) -> None:
        self.clock = ManualClock()
        self.ids = SequentialIds()
        self.ledger = MemoryLedger()
        self.ring = KeyRing(self.ledger.queries, self.clock, open_without_keys=local)

    def make(self, **fields: Any) -> tuple[ApiKey, str]:
        key, token = new_key(self.ids, self.clock, **fields)
        self.write(lambda connection: insert_key(connection, key))
        return key, token

    def write(self, operation: Any) -> Any:
        found = asyncio.run(self.ledger.write(operation))
        self.clock.advance(NS_PER_S)  # longer than the ring trusts what it knows
        return found

    def identify(self, token: str | None) -> Caller:
        return asyncio.run(self.ring.identify(token))

    def refusal(self, token: str | None) -> str:
        with pytest.raises(Unauthorized) as caught:
            self.identify(token)
        assert "QQ" not in caught.value.message
        return caught.value.message


def test_without_keys_this_machine_is_anonymous_whatever_it_sends() -> None:
    world = World()
    for token in (None, "unused", "mk_a_b"):
        caller = world.identify(token)
        assert caller.key is None
        assert caller.reads_all
        assert caller.runs_models
        assert caller.administers


def test_without_keys_another_machine_is_refused() -> None:
    assert "needs an API key" in World(local=False).refusal(None)


def test_once_there_is_a_key_it_is_required_even_when_it_is_revoked() -> None:
    world = World()
    key, token = world.make()
    assert world.identify(token).id == key.id
    assert "needs an API key" in world.refusal(None)
    world.write(lambda connection: revoke_key(connection, key.id, world.clock.now_ns()))
    assert "is revoked" in world.refusal(token)
    assert "needs an API key" in world.refusal(None)


@pytest.mark.parametrize(
    "damage",
    [
        lambda token: token[:-1],
        lambda token: token + "x",
        lambda token: "mk_" + token,
        lambda token: token.upper(),
        lambda token: token.replace("mk_", "sk_"),
        lambda _: "mk__",
        lambda _: "",
        lambda _: "\u00e9",
    ],
)
def test_a_token_that_is_not_exactly_right_is_refused(damage: Any) -> None:
    world = World()
    _, token = world.make()
    world.refusal(damage(token))


def test_a_key_ends_when_it_expires() -> None:
    world = World()
    _, token = world.make(expires_at_ns=world.clock.now_ns() + 10 * NS_PER_S)
    world.identify(token)
    world.clock.advance(10 * NS_PER_S)
    assert "is expired" in world.refusal(token)


def test_rotation_keeps_the_key_and_lets_the_old_secret_overlap() -> None:
    world = World()
    key, old = world.make(team="search")
    new = world.write(lambda connection: rotate_key(connection, key.id, world.clock.now_ns(), 60 * NS_PER_S))
    assert world.identify(old).id == world.identify(new).id == key.id
    world.clock.advance(60 * NS_PER_S)
    world.refusal(old)
    assert world.identify(new).attribute(Attribution()).team == "search"


def test_a_rotation_without_overlap_ends_the_old_secret_at_once() -> None:
    world = World()
    key, old = world.make()
    world.write(lambda connection: rotate_key(connection, key.id, world.clock.now_ns(), 0))
    world.refusal(old)


def test_only_keys_that_exist_can_be_rotated_or_revoked() -> None:
    world = World()
    key, _ = world.make()
    world.write(lambda connection: revoke_key(connection, key.id, 1))
    for operation in (
        lambda connection: rotate_key(connection, key.id, 1, 1),
        lambda connection: rotate_key(connection, "mk_none", 1, 1),
        lambda connection: revoke_key(connection, "mk_none", 1),
    ):
        with pytest.raises(NotFound):
            world.write(operation)


def test_a_key_cannot_be_deleted_from_the_ledger() -> None:
    world = World()
    world.make()
    with pytest.raises(sqlite3.IntegrityError, match="revoke"):
        world.write(lambda connection: connection.execute("DELETE FROM api_keys"))


def test_nothing_that_is_kept_or_shown_holds_the_secret() -> None:
    world = World()
    key, token = world.make(name="app", models=("tiny",))
    secret = token.removeprefix(f"{key.id}_")
    assert len(secret) >= 43  # 256 bits
    [kept] = world.write(read_keys)
    assert kept == key
    assert secret not in repr(kept)
    shown = key_body(kept, world.clock.now_ns())
    assert secret not in repr(shown)
    assert not any("sha256" in field for field in shown)


@pytest.mark.parametrize("field", ["user", "team", "feature", "tier"])
def test_what_is_pinned_cannot_be_overridden(field: str) -> None:
    key, _ = new_key(SequentialIds(), ManualClock(), **{field: "ours"})
    assert getattr(key.attribute(Attribution()), field) == "ours"
    assert getattr(key.attribute(msgspec.structs.replace(Attribution(), **{field: "ours"})), field) == "ours"
    with pytest.raises(Forbidden, match=f"pinned to {field} `ours`") as caught:
        key.attribute(msgspec.structs.replace(Attribution(), **{field: "theirs"}))
    assert caught.value.param == f"x-millicent-{field}"


def test_the_rest_of_the_attribution_is_the_requests_own() -> None:
    key, _ = new_key(SequentialIds(), ManualClock(), team="search")
    given = Attribution(key="forged", user="ada", run="r", tags={"a": "b"})
    assert key.attribute(given) == Attribution(key=key.id, team="search", user="ada", run="r", tags={"a": "b"})


@pytest.mark.parametrize(
    ("scope", "reads", "runs", "administers"),
    [(Scope.ADMIN, True, True, True), (Scope.VIEWER, True, False, False), (Scope.CLIENT, False, True, False)],
)
def test_scopes_say_what_a_key_may_do(scope: Scope, reads: bool, runs: bool, administers: bool) -> None:
    key, _ = new_key(SequentialIds(), ManualClock(), scope=scope)
    caller = Caller(key)
    assert (caller.reads_all, caller.runs_models, caller.administers) == (reads, runs, administers)
    if not administers:
        with pytest.raises(Forbidden, match=f"A {scope} key may not administer"):
            caller.demand(caller.administers, "administer this server")


def test_a_key_may_be_for_some_models_only() -> None:
    key, _ = new_key(SequentialIds(), ManualClock(), models=("small",))
    Caller(key).check_model("small")
    with pytest.raises(Forbidden, match="it may use small"):
        Caller(key).check_model("large")
    assert not Caller(key).may_use("large")


def test_a_session_is_its_keys_and_ends() -> None:
    clock = ManualClock()
    sessions = Sessions(clock)
    cookie = f"other=1; {COOKIE}={sessions.sign('mk_a')}"
    assert sessions.key_of(cookie) == "mk_a"
    assert sessions.key_of(cookie.replace("mk_a", "mk_b")) is None
    assert Sessions(clock).key_of(cookie) is None
    for bad in ("", COOKIE, f"{COOKIE}=", f"{COOKIE}=a", f"{COOKIE}=a.b.c", f"{COOKIE}=é.1.2", "=;=;"):
        assert sessions.key_of(bad) is None
    clock.advance(LIFETIME_S * NS_PER_S)
    assert sessions.key_of(cookie) is None


def test_a_session_does_not_outlive_its_key() -> None:
    world = World()
    key, _ = world.make(scope=Scope.VIEWER)
    assert asyncio.run(world.ring.resume(key.id)).id == key.id
    world.write(lambda connection: revoke_key(connection, key.id, world.clock.now_ns()))
    with pytest.raises(Unauthorized, match="revoked"):
        asyncio.run(world.ring.resume(key.id))
