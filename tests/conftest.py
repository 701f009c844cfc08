"""Fixtures that every room may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from millicent.core.errors import ModelError
from millicent.hub import pull

# No test may fail because the machine is slow. Where nobody looks for new examples, the same ones are tried each time.
settings.register_profile(
    "millicent", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize="CI" in os.environ
)
settings.load_profile("millicent")

# What tests start is on this machine, and behind no proxy that may be between it and the world.
for _name in ("no_proxy", "NO_PROXY"):
    os.environ[_name] = ",".join(filter(None, [os.environ.get(_name), "127.0.0.1", "localhost"]))


@pytest.fixture(scope="session")
def model_cache() -> Path:
    """Where real models lie: MILLICENT_CACHE or its default, so that they are fetched once and not once per run."""
    return Path(os.environ.get("MILLICENT_CACHE") or "~/.cache/millicent").expanduser()


@pytest.fixture(scope="session")
def smollm2_path(model_cache: Path) -> Path:
    """The default model's GGUF file. Tests that use it are marked `model`."""
    try:
        return pull("smollm2:135m", model_cache).path
    except ModelError as error:
        pytest.skip(f"the default model cannot be fetched: {error}")


@pytest.fixture(scope="session")
def minilm_path(model_cache: Path) -> Path:
    """The embedding model's directory. Tests that use it are marked `model`."""
    try:
        return pull("minilm", model_cache).path
    except ModelError as error:
        pytest.skip(f"the embedding model cannot be fetched: {error}")
