"""Drawing tokens: a batch's rows in one call, each on one thread."""

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
        assert scores.dtype == np.float32
        assert scores.flags.c_contiguous
        _DRAW.pack_into(packed, index * _DRAW.size, scores.__array_interface__["data"][0], *rest)
    tokens = array("q", bytes(8 * len(rows)))
    draws = (ctypes.c_char * len(packed)).from_buffer(packed)
    library().mk_sample(ctypes.addressof(draws), len(rows), len(rows[0][0]), tokens.buffer_info()[0])
    return tokens.tolist()
