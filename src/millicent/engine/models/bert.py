"""BERT, and what is built like it: MiniLM, BGE, E5. Texts of any lengths share a pass without padding."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch.nn import functional

from millicent.engine.layers import LayerNorm, Linear, attend_both_ways
from millicent.engine.weights import Checkpoint, EncoderSpec


class Bert:
    """A loaded encoder (`engine.batch.Encoder`)."""

    def __init__(self, name: str, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> None:
        load = _Loader(checkpoint, dtype, device)
        self._device = device
        self._spec = spec = load.spec
        self.name = name
        self.context_tokens = spec.context_tokens
        self.vocabulary_size = spec.vocabulary
        self.dimensions = spec.hidden
        self._words = load.tensor("embeddings.word_embeddings.weight", spec.vocabulary, spec.hidden)
        positions = load.tensor("embeddings.position_embeddings.weight", spec.positions, spec.hidden)
        # A text is one sentence, and its tokens are all of the first type.
        self._positions = positions + load.first_row("embeddings.token_type_embeddings.weight", spec.hidden)
        self._norm = load.norm("embeddings.LayerNorm")
        self._layers = [_Layer(load, f"encoder.layer.{index}") for index in range(spec.layers)]
        self.weight_bytes = load.bytes

    def encode(self, texts: Sequence[Sequence[int]]) -> torch.Tensor:
        with torch.inference_mode():
            edges = list(accumulate((len(text) for text in texts), initial=0))
            tokens = torch.tensor([token for text in texts for token in text], device=self._device)
            positions = torch.cat([torch.arange(len(text)) for text in texts]).to(self._device)
            x = self._norm(functional.embedding(tokens, self._words) + self._positions[positions])
            for layer in self._layers:
                x = layer(x, edges)
            return self._vectors(x.float(), edges).cpu()

    def _vectors(self, rows: torch.Tensor, edges: Sequence[int]) -> torch.Tensor:
        if self._spec.pooling == "cls":
            vectors = rows[torch.tensor(edges[:-1], device=self._device)]
        else:
            vectors = torch.stack([rows[start:stop].mean(0) for start, stop in pairwise(edges)])
        return functional.normalize(vectors) if self._spec.normalize else vectors


class _Layer:
    """Attention, then two linears with a GELU between, each added to its input and normed after."""

    def __init__(self, load: _Loader, prefix: str) -> None:
        hidden, inner = load.spec.hidden, load.spec.intermediate
        projections = [f"{prefix}.attention.self.{part}" for part in ("query", "key", "value")]
        self._heads = load.spec.heads
        self._qkv = load.linear(projections, hidden, hidden)
        self._output = load.linear([f"{prefix}.attention.output.dense"], hidden, hidden)
        self._attention_norm = load.norm(f"{prefix}.attention.output.LayerNorm")
        self._up = load.linear([f"{prefix}.intermediate.dense"], inner, hidden)
        self._down = load.linear([f"{prefix}.output.dense"], hidden, inner)
        self._norm = load.norm(f"{prefix}.output.LayerNorm")

    def __call__(self, x: torch.Tensor, edges: Sequence[int]) -> torch.Tensor:
        query, key, value = self._qkv(x).view(len(x), 3, self._heads, -1).unbind(1)
        x = self._attention_norm(x + self._output(attend_both_ways(query, key, value, edges)))
        return self._norm(x + self._down(functional.gelu(self._up(x))))


class _Loader:
    """Reads a checkpoint's tensors as parts of an encoder, checking each one's presence and shape."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> None:
        self.spec: EncoderSpec = checkpoint.encoder_spec
        self.bytes = 0
        self._checkpoint = checkpoint
        self._dtype = dtype
        self._device = device
        # Some files hold the encoder alone, others a model around it.
        bare = "embeddings.word_embeddings.weight" in checkpoint.shapes
        self._prefix = "" if bare else f"{self.spec.family}."

    def tensor(self, name: str, *shape: int) -> torch.Tensor:
        found = self._checkpoint.tensor(self._prefix + name, shape, self._dtype).to(self._device)
        self.bytes += found.nbytes
        return found

    def first_row(self, name: str, size: int) -> torch.Tensor:
        """Of a table with as many rows as it happens to have."""
        shape = self._checkpoint.shapes.get(self._prefix + name, (1, size))
        return self._checkpoint.tensor(self._prefix + name, (shape[0], size), self._dtype)[0].to(self._device)

    def norm(self, name: str) -> LayerNorm:
        hidden = self.spec.hidden
        return LayerNorm(self.tensor(f"{name}.weight", hidden), self.tensor(f"{name}.bias", hidden), self.spec.norm_eps)

    def linear(self, parts: Sequence[str], out_size: int, in_size: int) -> Linear:
        """One linear out of several that read the same rows."""
        weights = [self.tensor(f"{part}.weight", out_size, in_size) for part in parts]
        biases = [self.tensor(f"{part}.bias", out_size) for part in parts]
        return Linear(torch.cat(weights), torch.cat(biases))
