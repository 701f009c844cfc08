"""Kernels run in Triton's interpreter unless there is a GPU. The choice falls when they are imported."""

from __future__ import annotations

import importlib.util
import os

import pytest


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


if importlib.util.find_spec("triton") is not None and not _has_gpu():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def device() -> str:
    return "cuda" if _has_gpu() else "cpu"
