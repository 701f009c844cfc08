"""What `[cache]` and `Cache-Control` say."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from millicent.caching.cache import open_cache
from millicent.caching.config import CacheConfig, FeatureCacheConfig
from millicent.caching.rules import Directives, why_not
from millicent.caching.secret import FILE_NAME as SECRET_NAME
from millicent.caching.store import FILE_NAME
from millicent.config import load
from millicent.core.clock import ManualClock
from millicent.core.errors import ConfigError
from millicent.core.request import Extra, Message, OtherPart, Request, Sampling

GREEDY = Request("rcpt_1", "openai.chat", "m", messages=(Message("user", "?"),), sampling=Sampling(temperature=0))


@pytest.mark.parametrize(
    ("said", "directives"),
    [
        (None, Directives()),
        ("", Directives()),
        ("no-store", Directives(reads=False, writes=False)),
        ("max-age=60, no-store", Directives(reads=False, writes=False)),
        ("NO-CACHE", Directives(reads=False)),
        ("max-age=0", Directives(reads=False, max_age_s=0)),
        ('private,  Max-Age="60"', Directives(max_age_s=60)),
        ("max-age=-1", Directives()),
        ("only-if-cached", Directives(only_kept=True)),
        ("Only-If-Cached, no-store", Directives(reads=False, writes=False, only_kept=True)),
        ("max-age=\u00b2", Directives()),
        ("max-age", Directives()),
        ("no-transform, stale-if-error=3", Directives()),
    ],
)
def test_directives_are_read_as_http_writes_them(said: str | None, directives: Directives) -> None:
    assert Directives.of(said) == directives


def test_what_only_an_upstream_understands_is_passed_by_unless_it_decides_the_answer_alone() -> None:
    def asked(**fields: object) -> str | None:
        return why_not(msgspec.structs.replace(GREEDY, **fields), sampled=False)

    assert asked() is None
    assert asked(extra={"verbosity": Extra('"low"', "no")}) is None
    assert asked(extra={"service_tier": Extra('"auto"', None)}) is None
    assert asked(extra={"web_search": Extra("true", "no")}) == "unknown_field"
    assert asked(messages=(Message("user", (OtherPart("file", "{}", "messages[0]"),)),)) == "unknown_part"
    assert asked(sampling=Sampling()) == "sampled"


def test_a_feature_says_only_what_is_other_for_it() -> None:
    config = CacheConfig(ttl_s=60, features={"faq": FeatureCacheConfig(enabled=True, scope="shared")})
    assert config.is_used
    assert (config.of("faq").enabled, config.of("faq").scope, config.of("faq").ttl_s) == (True, "shared", 60)
    assert config.of(None) == config.of("other") == config
    assert not CacheConfig(features={"faq": FeatureCacheConfig(ttl_s=1)}).is_used


def test_a_cache_that_nobody_uses_leaves_nothing_behind(tmp_path: Path) -> None:
    assert open_cache(CacheConfig(), tmp_path, ManualClock(), deployed=b"") is None
    assert list(tmp_path.iterdir()) == []
    in_memory = open_cache(CacheConfig(enabled=True, store="memory"), tmp_path, ManualClock(), deployed=b"")
    assert in_memory is not None
    assert [path.name for path in tmp_path.iterdir()] == [SECRET_NAME]


def test_a_file_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).mkdir()
    with pytest.raises(ConfigError, match=r"cache\.db: .*store = \"memory\""):
        open_cache(CacheConfig(enabled=True), tmp_path, ManualClock(), deployed=b"")


@pytest.mark.parametrize(
    ("written", "complaint"),
    [
        ("[cache]\nenabeld = true", "millicent.toml:2: [cache] has no setting `enabeld`: did you mean `enabled`?"),
        ("[cache]\nttl_s = 0", "millicent.toml:2: [cache] ttl_s: Expected `int` >= 1."),
        ('[cache.features.faq]\nscope = "all"', "[cache] features"),
    ],
)
def test_a_slip_in_the_configuration_is_told_with_its_line(tmp_path: Path, written: str, complaint: str) -> None:
    (tmp_path / "millicent.toml").write_text(written)
    with pytest.raises(ConfigError) as told:
        load(tmp_path / "millicent.toml")
    assert complaint in told.value.message
