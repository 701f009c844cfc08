"""A decoder on the device (`engine.batch.Model`): passes that are launched now and read later."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from millicent.engine.batch import Piece
from millicent.engine.config import EngineConfig
from millicent.engine.cuda.ahead import Changes, Flight, Landed
from millicent.engine.cuda.device import Device, Mark
from millicent.engine.cuda.kernels.attention import (
    DecodeRows,
    PrefillTiles,
    attend_decode,
    attend_prefill,
    tile_rows,
)
from millicent.engine.cuda.kernels.matmul import SMALL_ROWS
from millicent.engine.cuda.kernels.rows import Turning, add_rms_norm, embed, rotate_and_cache, silu_mul
from millicent.engine.cuda.kernels.sampling import Draws, draw
from millicent.engine.cuda.passes import (
    FLOATS,
    TILE_PARTS,
    Layout,
    PassWriter,
    Shape,
    Shapes,
    draw_columns,
    prepared_shapes,
)
from millicent.engine.cuda.weights import DecoderWeights
from millicent.engine.sampler import Draw

_STAGES = 3  # one pass is being written while two are under way
_SPLITS_AT_MOST = 32
_DETERMINISTIC_ROWS = 64
_SCORED_ROWS = 256  # how many rows' logits are computed at a time where all are wanted: they are wide


@dataclass(frozen=True, slots=True)
class _Stage:
    """Memory of the host for one pass: what goes to the device, and the tokens that come back."""

    inputs: torch.Tensor
    tokens: torch.Tensor


class DeviceDecoder:
    def __init__(
        self, name: str, weights: DecoderWeights, device: Device, config: EngineConfig, *, eos_tokens: frozenset[int]
    ) -> None:
        spec = weights.spec
        self.name = name
        self.context_tokens = spec.context_tokens
        self.vocabulary_size = spec.vocabulary
        self.eos_tokens = eos_tokens
        self.weight_bytes = weights.nbytes
        self.kv_bytes_per_token = 2 * spec.layers * spec.kv_heads * spec.head_dim * weights.dtype.itemsize
        self._weights = weights
        self._spec = spec
        self._device = device
        self._deterministic = config.deterministic
        self._tile_rows = tile_rows(spec.heads, spec.kv_heads, weights.dtype)
        self._max_sequences = 1 if config.deterministic else config.max_sequences
        self._step_tokens = _DETERMINISTIC_ROWS if config.deterministic else config.step_tokens
        self._prepare_buffers(config)
        self.working_bytes = self._profile(config.block_tokens)

    @property
    def step_tokens(self) -> int:
        """How many rows of a prompt a pass takes at most."""
        return self._step_tokens

    def _prepare_buffers(self, config: EngineConfig) -> None:
        if self._deterministic:
            tiles = -(-self._step_tokens // self._tile_rows)
            shapes = [Shape(self._step_tokens, 0, tiles, 1)]
        else:
            shapes = prepared_shapes(self._max_sequences, self._step_tokens, self._tile_rows)
        self._shapes = Shapes(shapes)
        rows = max(shape.rows for shape in shapes)
        tables = -(-self._spec.context_tokens // config.block_tokens)
        self._layout = Layout(
            rows,
            self._max_sequences,
            -(-rows // self._tile_rows) + self._max_sequences,
            max(self._max_sequences, *(shape.samples for shape in shapes), 1),
            self._max_sequences * tables,
        )
        self._stages = [
            _Stage(
                self._device.on_host(self._layout.size, torch.int32),
                self._device.on_host(len(self._span("sampled")), torch.int32),
            )
            for _ in range(_STAGES)
        ]
        place = self._device.torch_device
        self._inputs = torch.zeros(self._layout.size, dtype=torch.int32, device=place)
        self._drawn = torch.zeros(len(self._span("sampled")), dtype=torch.int32, device=place)
        self._arrivals = torch.zeros(self._max_sequences * self._spec.kv_heads, dtype=torch.int32, device=place)
        self._logits = torch.zeros(
            len(self._span("sampled")), self.vocabulary_size, dtype=self._weights.dtype, device=place
        )
        self._launches = 0

    def _profile(self, block_tokens: int) -> int:
        """What passes need beside weights and cache: the largest one, in a cache of one block, and the buffers."""
        largest = max(self._shapes)
        spec = self._spec
        self._allocate(1, block_tokens)
        buffers = self._inputs.nbytes + self._drawn.nbytes + self._logits.nbytes
        with torch.inference_mode():
            self._part("slots").fill_(-1)  # nothing is written or read: only sizes matter
            working = self._device.peak_bytes(lambda: self._run(largest))
        del self._caches
        # Recorded passes have memory of their own, and a layer's part of the cache is rounded up to 2 MB, twice.
        return buffers + 2 * working + spec.layers * 2 * (2 << 20)

    def allocate(self, blocks: int, block_tokens: int) -> None:
        """Also records every prepared pass, so that none is slow when it first comes."""
        self._allocate(blocks, block_tokens)
        writer = PassWriter(
            self._layout,
            self._shapes,
            block_tokens=block_tokens,
            tile_rows=self._tile_rows,
            tiled=self._deterministic,
        )
        self._writer = writer
        with torch.inference_mode():
            self._inputs.zero_()
            self._part("slots").fill_(-1)
            # The largest first: what the others need then fits into what it has taken.
            shapes = sorted(self._shapes, reverse=True)
            recorded = self._device.record([functools.partial(self._run, shape) for shape in shapes])
            self._recorded = dict(zip(shapes, recorded, strict=True))
            nothing = np.empty(0, dtype=np.int64)  # drawing anew isn't recorded, but compiled now too
            self.redraw([0], [Draw(0.0, 1.0, 0, 0, 0)], Changes(nothing, nothing, nothing, nothing, nothing, {}))

    def _allocate(self, blocks: int, block_tokens: int) -> None:
        spec = self._spec
        shape = (blocks, spec.kv_heads, block_tokens, spec.head_dim)
        place, dtype = self._device.torch_device, self._weights.dtype
        zeros = functools.partial(torch.zeros, shape, dtype=dtype, device=place)
        self._caches = [(zeros(), zeros()) for _ in range(spec.layers)]  # keys and values

    # A pass.

    def launch(self, pieces: Sequence[Piece], draws: Sequence[Draw]) -> DeviceFlight:
        """Give the device a pass. Tokens written `-1 - i` are those that the launch before drew in its row i."""
        with torch.inference_mode():
            start = self._device.mark()
            stage = self._stages[self._launches % _STAGES]
            self._launches += 1
            written = self._writer.write(pieces, draws, stage.inputs.numpy())
            self._inputs[: written.used].copy_(stage.inputs[: written.used], non_blocking=True)
            recorded = self._recorded.get(written.shape)
            if recorded is None:
                self._run(written.shape)
            else:
                recorded()
            return DeviceFlight(self, stage, start, written.samples)

    def forward(self, pieces: Sequence[Piece]) -> torch.Tensor:
        """Logits on the host, and the wait for them: for calibration, tests, and prompts whose every row is scored."""
        with torch.inference_mode():
            stage = self._stages[0]
            greedy = [Draw(0.0, 1.0, 0, 0, 0)] * sum(piece.sample for piece in pieces)
            self._device.mark().wait()  # nobody reads the stage any more
            written = self._writer.write(pieces, greedy, stage.inputs.numpy())
            self._inputs[: written.used].copy_(stage.inputs[: written.used])
            hidden = self._layers(written.shape)
            wanted = [
                last - back
                for piece, last in zip(pieces, written.last_rows, strict=True)
                for back in range(piece.logit_rows - 1, -1, -1)
            ]
            found = [torch.empty(0, self.vocabulary_size)]
            for start in range(0, len(wanted), _SCORED_ROWS):
                rows = self._device.send(np.array(wanted[start : start + _SCORED_ROWS], dtype=np.int32))
                logits = torch.empty(
                    len(rows), self.vocabulary_size, dtype=self._weights.dtype, device=self._device.torch_device
                )
                self._output(hidden, rows, logits)
                found.append(logits.float().cpu())
            return torch.cat(found)

    def is_lost(self, error: Exception) -> bool:
        return self._device.is_lost(error)

    def _run(self, shape: Shape) -> None:
        """Everything between the inputs and the tokens drawn, none of which the host needs to see."""
        hidden = self._layers(shape)
        count = shape.samples
        if count:
            logits = self._logits[:count]
            self._output(hidden, self._part("sampled")[:count], logits)
            draw(logits, Draws(*(self._part(name)[:count] for name in _DRAW_PARTS)), self._drawn[:count])

    def _layers(self, shape: Shape) -> tuple[torch.Tensor | None, torch.Tensor]:
        """What the last layer adds, if that isn't done yet, and what it is to be added to."""
        residual = embed(self._part("tokens")[: shape.rows], self._drawn, self._weights.embedding)
        delta: torch.Tensor | None = None
        for layer, cache in zip(self._weights.layers, self._caches, strict=True):
            if shape.rows <= SMALL_ROWS:
                qkv = layer.qkv.few(residual, norm=layer.attention_norm)
                layer.output.few(self._attend(qkv, layer.turning, cache, shape), onto=residual)
                layer.down.few(layer.gate_up.few(residual, norm=layer.mlp_norm, gated=True), onto=residual)
            else:
                qkv = layer.qkv(add_rms_norm(delta, residual, layer.attention_norm))
                delta = layer.output(self._attend(qkv, layer.turning, cache, shape))
                rows = add_rms_norm(delta, residual, layer.mlp_norm)
                delta = layer.down(silu_mul(layer.gate_up(rows)))
        return delta, residual

    def _attend(
        self, qkv: torch.Tensor, turning: Turning, cache: tuple[torch.Tensor, torch.Tensor], shape: Shape
    ) -> torch.Tensor:
        spec = self._spec
        out = torch.empty(len(qkv), spec.heads * spec.head_dim, dtype=qkv.dtype, device=qkv.device)
        if shape.decodes:
            rows = DecodeRows(
                self._part("starts")[: shape.decodes],
                self._part("lengths")[: shape.decodes],
                self._part("tables"),
                self._arrivals,
                splits_for(shape.decodes * spec.kv_heads, self._device.processors),
            )
            attend_decode(qkv, turning, *cache, rows, out)
        if shape.tiles:
            rest = slice(shape.decodes, shape.rows)
            positions, slots = self._part("positions")[rest], self._part("slots")[rest]
            rotate_and_cache(qkv[rest], turning, positions, slots, *cache)
            tiles = PrefillTiles(self._part("tables"), *(self._part(name)[: shape.tiles] for name in TILE_PARTS))
            attend_prefill(qkv, *cache, tiles, out)
        return out

    def _output(
        self, hidden: tuple[torch.Tensor | None, torch.Tensor], rows: torch.Tensor, logits: torch.Tensor
    ) -> None:
        delta, residual = hidden
        weights = self._weights
        if delta is None and len(rows) <= SMALL_ROWS:
            weights.output.few_into(residual, weights.norm, rows, logits)
        else:
            weights.output.into(add_rms_norm(delta, residual, weights.norm, picked=rows), logits)

    def _part(self, name: str) -> torch.Tensor:
        part = self._inputs[self._layout.spans[name]]
        return part.view(torch.float32) if name in FLOATS else part

    def _span(self, name: str) -> range:
        span = self._layout.spans[name]
        return range(span.start, span.stop)

    # What a flight asks for.

    def redraw(self, rows: Sequence[int], draws: Sequence[Draw], changes: Changes) -> None:
        """Draw these rows of the last launch anew, from logits changed like that."""
        with torch.inference_mode():
            index = self._device.send(np.array(rows, dtype=np.int64))
            scores = self._logits[index].float()
            apply_changes(scores, changes, self._device.send)
            found = torch.empty_like(self._drawn[: len(rows)])
            columns = draw_columns(draws)
            draw(scores, Draws(*(self._device.send(columns[name]) for name in _DRAW_PARTS)), found)
            self._drawn[index] = found

    def bring(self, stage: _Stage, samples: int, scored: Sequence[int]) -> tuple[Mark, Mapping[int, torch.Tensor]]:
        """Start copying what was drawn, and some rows' logits, to the host."""
        with torch.inference_mode():
            stage.tokens[:samples].copy_(self._drawn[:samples], non_blocking=True)
            logits: dict[int, torch.Tensor] = {}
            for row in scored:
                logits[row] = self._device.on_host(self.vocabulary_size, torch.float32)
                logits[row].copy_(self._logits[row].float(), non_blocking=True)
            return self._device.mark(), logits


_DRAW_PARTS = ("temperature", "top_k", "top_p", "min_p", "number")  # in the order of `Draws`


def splits_for(programs: int, processors: int) -> int:
    """Into how many parts a long context is split, a power of 2: six programs for each multiprocessor, since contexts
    differ and it is the last program that counts."""
    splits = 1
    while programs * splits < 6 * processors and splits < _SPLITS_AT_MOST:
        splits *= 2
    return splits


def apply_changes(scores: torch.Tensor, changes: Changes, send: Callable[[np.ndarray[Any, Any]], torch.Tensor]) -> None:
    """Penalties, biases and bans, then what grammars forbid; on rows of float32, in place. `send` copies to them."""
    if len(changes.rows):
        rows, tokens = send(changes.rows), send(changes.tokens)
        factors, found = send(changes.factors), scores[rows, tokens]
        penalized = torch.where(found < 0, found * factors, found / factors)
        scores[rows, tokens] = penalized - send(changes.minus) + send(changes.plus)
    places = torch.arange(8, dtype=torch.uint8, device=scores.device)
    for row, allowed in changes.allowed.items():
        bits = send(np.frombuffer(allowed, dtype=np.uint8).copy())
        mask = ((bits[:, None] >> places) & 1).view(-1)[: scores.shape[1]]
        scores[row].masked_fill_(mask == 0, float("-inf"))


class DeviceFlight:
    """A pass on its way."""

    def __init__(self, decoder: DeviceDecoder, stage: _Stage, start: Mark, samples: int) -> None:
        self._decoder = decoder
        self._stage = stage
        self._start = start
        self._samples = samples
        self.end: Mark | None = None
        self._logits: Mapping[int, torch.Tensor] = {}

    def redraw(self, rows: Sequence[int], draws: Sequence[Draw], changes: Changes) -> None:
        self._decoder.redraw(rows, draws, changes)

    def bring(self, scored: Sequence[int]) -> None:
        self.end, self._logits = self._decoder.bring(self._stage, self._samples, scored)

    def reached(self) -> bool:
        assert self.end is not None, "bring comes first"
        return self.end.reached()

    def land(self, before: Flight | None) -> Landed:
        """Wait for it. Its time runs from the end of the pass before, if that was under way when it was launched."""
        assert self.end is not None, "bring comes first"
        self.end.wait()
        since = before.end if isinstance(before, DeviceFlight) and before.end is not None else self._start
        tokens = [token if token >= 0 else None for token in self._stage.tokens[: self._samples].tolist()]
        logits = {row: values.numpy() for row, values in self._logits.items()}
        return Landed(tokens, logits, self.end.since(since))
