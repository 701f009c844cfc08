"""Decoders on the device beside the plain one in float64, for checks that run in an interpreter and on a GPU alike."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from millicent.engine.batch import Model, Piece
from millicent.engine.config import Dtype, EngineConfig
from millicent.engine.cuda.decoder import DeviceDecoder
from millicent.engine.cuda.device import Device, open_device
from millicent.engine.cuda.opening import open_decoder
from millicent.engine.models import FAMILIES
from millicent.engine.models.decoder import Decoder, Loader
from millicent.engine.weights import Checkpoint

BLOCKS = 24
CONFIG = EngineConfig(device="cuda:0", max_sequences=4, step_tokens=16, block_tokens=4)


def on_device(
    checkpoint: Checkpoint,
    config: EngineConfig = CONFIG,
    *,
    dtype: Dtype = "fp32",
    fp8: bool = False,
    blocks: int = BLOCKS,
    device: Device | None = None,
    allocate: bool = True,
) -> DeviceDecoder:
    """Without `allocate` whoever takes it does that."""
    with torch.inference_mode():
        model = open_decoder(
            checkpoint,
            device or open_device(config.device),
            config,
            name="random",
            dtype=dtype,
            fp8=fp8,
            eos_tokens=frozenset(),
        )
        if allocate:
            model.allocate(blocks, config.block_tokens)
    return model


def in_float64(checkpoint: Checkpoint) -> Decoder:
    """Without its cache."""
    load = Loader(checkpoint, torch.float64)
    return Decoder("reference", load, FAMILIES[checkpoint.family], eos_tokens=frozenset(), deterministic=False)


def mixed_passes(vocabulary: int) -> list[list[Piece]]:
    """Prompts in chunks, decoding beside prefill, a row that isn't sampled, blocks in no order."""
    generator = torch.Generator().manual_seed(3)

    def tokens(count: int) -> list[int]:
        return torch.randint(vocabulary, (count,), generator=generator).tolist()

    one, two, three = list(range(9, -1, -1)), [12, 10, 15, 11], [20, 17]
    return [
        [Piece(1, tokens(13), 0, one, sample=False), Piece(2, tokens(5), 0, two, sample=True)],
        [
            Piece(2, tokens(1), 5, two, sample=True),
            Piece(1, tokens(6), 13, one, sample=True),
            Piece(3, tokens(2), 0, three, sample=True),
        ],
        [Piece(number, tokens(1), at, table, sample=True) for number, at, table in ((3, 2, three), (1, 19, one))],
        [Piece(1, tokens(1), 20, one, sample=True)],
        [Piece(1, tokens(4), 21, one, sample=True, every_row=True), Piece(2, tokens(1), 6, two, sample=True)],
    ]


def errors(
    model: Model, checkpoint: Checkpoint, passes: Sequence[Sequence[Piece]], config: EngineConfig = CONFIG
) -> list[float]:
    """Of each pass, how far its logits are off those of float64, relative to their norm."""
    reference = in_float64(checkpoint)
    reference.allocate(BLOCKS, config.block_tokens)
    found = []
    for pieces in passes:
        ours, theirs = model.forward(pieces).double(), reference.forward(pieces).double()
        assert ours.shape == theirs.shape
        found.append(float((ours - theirs).norm() / theirs.norm()))
    return found
