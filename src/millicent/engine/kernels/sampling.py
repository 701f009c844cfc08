"""Drawing and scoring tokens: a batch's rows in one call, each on one thread."""

from __future__ import annotations

import ctypes
import struct
from array import array
from collections.abc import Sequence

import numpy as np

from millicent.engine.kernels.library import library

_DRAW = struct.Struct("=Q5dq")
Row = tuple[np.ndarray, float, float, float, float, float, int]
"""Scores (float32 [columns]), the number in [0, 1), temperature, top-p, min-p, typical-p and top-k."""


def choose(rows: Sequence[Row]) -> list[int]:
    """A token for each row, all of them equally long; -1 where its scores are no distribution."""
    packed = bytearray(_DRAW.size * len(rows))
    for index, (scores, *rest) in enumerate(rows):
        _DRAW.pack_into(packed, index * _DRAW.size, _address(scores), *rest)
    tokens = array("q", bytes(8 * len(rows)))
    draws = (ctypes.c_char * len(packed)).from_buffer(packed)
    library().mk_sample(ctypes.addressof(draws), len(rows), len(rows[0][0]), tokens.buffer_info()[0])
    return tokens.tolist()


def best_tokens(rows: Sequence[np.ndarray], top: int) -> list[tuple[float, list[int]]]:
    """For each row of scores (float32, all equally long): what is taken off to make them log probabilities, and the ids
    of the `top` greatest, best first and of equals the first. NaN where they are no distribution."""
    addresses = array("Q", [_address(row) for row in rows])
    log_sums = array("d", bytes(8 * len(rows)))
    top = min(top, len(rows[0]))
    best = array("q", bytes(8 * max(len(rows) * top, 1)))
    library().mk_score(
        addresses.buffer_info()[0], len(rows), len(rows[0]), top, best.buffer_info()[0], log_sums.buffer_info()[0]
    )
    ids = best.tolist()
    return [(log_sum, ids[row * top : (row + 1) * top]) for row, log_sum in enumerate(log_sums)]


def _address(scores: np.ndarray) -> int:
    assert scores.dtype == np.float32
    assert scores.flags.c_contiguous
    address: int = scores.__array_interface__["data"][0]
    return address
