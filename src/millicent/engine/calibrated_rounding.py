"""Four-bit rounding that knows what the weights will be multiplied with.

The error of a linear on its inputs X is |X (W - Q)^T|^2, which needs only H = X^T X. Inputs are rounded one after
another, and what one loses the following ones make up for as far as they correlate with it (Frantar et al., "GPTQ",
2022, equations 2 and 3); scales and minima of a group are those of least squares when its turn comes, each input
weighted by what its error costs. Layers are rounded in order, each on what the rounded ones before it give.

The texts are the model's own: sampled at temperature 1 from a random first token, so that nothing has to be shipped or
chosen (Liu et al., "LLM-QAT", 2023).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence

import torch
from torch.nn import functional

from millicent.engine.batch import Model, Piece
from millicent.engine.kernels.weights import GROUP, Format, Quantized, fit_groups, round_values
from millicent.engine.kv_cache import KVCache, plan_batch
from millicent.engine.layers import Linear, Rotary
from millicent.engine.models.decoder import BuildLayer, Loader
from millicent.engine.weights import Checkpoint

_BLOCK_TOKENS = 16
_DAMPING = 0.01  # of H's mean diagonal: keeps what the texts never showed from being given away for nothing


def own_texts(model: Model, texts: int, tokens: int, seed: int = 0) -> list[list[int]]:
    """So many texts of so many tokens from the model, the same for a seed. Allocates the model's cache."""
    generator = torch.Generator().manual_seed(seed)
    tokens = min(tokens, model.context_tokens)
    blocks = -(-tokens // _BLOCK_TOKENS)
    model.allocate(texts * blocks, _BLOCK_TOKENS)
    tables = [range(text * blocks, (text + 1) * blocks) for text in range(texts)]
    found = [[token] for token in torch.randint(model.vocabulary_size, (texts,), generator=generator).tolist()]
    for position in range(tokens - 1):
        pieces = [Piece(text, found[text][-1:], position, tables[text], True) for text in range(texts)]
        drawn = torch.multinomial(model.forward(pieces).softmax(-1), 1, generator=generator)
        for text, token in zip(found, drawn[:, 0].tolist(), strict=True):
            text.append(token)
    return found


def round_layers(
    checkpoint: Checkpoint,
    build_layer: BuildLayer,
    texts: Sequence[Sequence[int]],
    format_: Format,
    rounded: Callable[[str, Quantized], None],
    kept: Collection[int] = (),
) -> None:
    """Every matrix of every layer but those `kept`, told to `rounded` by its Hugging Face name, in the order of the
    layers."""
    spec = checkpoint.spec
    load, exact = _RoundingLoader(checkpoint, format_, rounded), Loader(checkpoint, torch.float32)
    blocks = -(-max(map(len, texts)) // _BLOCK_TOKENS)
    pieces = [
        Piece(index, text, 0, range(index * blocks, (index + 1) * blocks), False) for index, text in enumerate(texts)
    ]
    plan = plan_batch(pieces, _BLOCK_TOKENS)
    with torch.inference_mode():
        cache = KVCache(1, len(texts) * blocks, _BLOCK_TOKENS, spec.kv_heads, spec.head_dim, torch.float32)
        embedding = load.tensor("model.embed_tokens.weight", spec.vocabulary, spec.hidden)
        x = functional.embedding(plan.tokens, embedding)
        angles = Rotary(spec).angles(plan.positions, torch.float32)
        for index in range(spec.layers):
            layer = build_layer(exact if index in kept else load, f"model.layers.{index}")
            x = x + layer.attention(layer.attention_norm(x), angles, cache.keys[0], cache.values[0], plan)
            x = x + layer.mlp(layer.mlp_norm(x))


def round_to_inputs(weight: torch.Tensor, products: torch.Tensor, format_: Format) -> Quantized:
    """`weight` [outputs, inputs], rounded for inputs X of which `products` is X^T X, both float32."""
    outputs, inputs = weight.shape
    left = weight.T.contiguous()  # an input's weights lie together: they are rounded together
    damped = products + torch.eye(inputs) * (_DAMPING * products.diagonal().mean() + 1e-8)
    # Row i of this is what the inputs from i on make up for when i is rounded, were all before it fixed.
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
    values = torch.empty(inputs, outputs, dtype=torch.uint8)
    scales = torch.empty(outputs, inputs // GROUP, dtype=torch.float16)
    mins = torch.zeros_like(scales)
    for group in range(inputs // GROUP):
        taken = slice(group * GROUP, (group + 1) * GROUP)
        block, corner = left[taken], inverse[taken, taken]
        _, scales[:, group : group + 1], mins[:, group : group + 1] = fit_groups(
            block.T.contiguous()[:, None], format_, corner.diagonal() ** -2
        )
        scale, least = scales[:, group].float(), mins[:, group].float()
        errors = torch.empty_like(block)
        for i in range(GROUP):
            kept, values[taken.start + i] = round_values(block[i], scale, least, format_)
            errors[i] = (block[i] - kept) / corner[i, i]
            block[i + 1 :] -= torch.outer(corner[i, i + 1 :], errors[i])
        left[taken.stop :] -= inverse[taken, taken.stop :].T @ errors
    return Quantized(format_, values.T.contiguous(), scales, mins if format_ is Format.Q4_MIN else None)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Rounding is many small operations: on busy cores, waiting for other threads made it eight times as slow."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class _RoundingLoader(Loader):
    """Gives linears that round themselves to the rows they first see."""

    def __init__(self, checkpoint: Checkpoint, format_: Format, rounded: Callable[[str, Quantized], None]) -> None:
        super().__init__(checkpoint, torch.float32)
        self._format = format_
        self._rounded = rounded

    def linear(self, parts: Sequence[tuple[str, int]], in_size: int, *, bias: bool = False) -> Linear:
        return _RoundingLinear(self, parts, in_size, bias=bias)

    def round(self, parts: Sequence[tuple[str, int]], in_size: int, rows: torch.Tensor) -> torch.Tensor:
        """The parts below each other, as they are from now on."""
        weight = torch.cat([self.tensor(f"{name}.weight", size, in_size) for name, size in parts])
        products = rows.T @ rows
        with _one_thread():
            quantized = round_to_inputs(weight, products, self._format)
        index = torch.arange(len(weight))
        for (name, _), part in zip(parts, torch.split(index, [size for _, size in parts]), strict=True):
            self._rounded(f"{name}.weight", quantized.rows(part))
        return quantized.dequantized()


class _RoundingLinear(Linear):
    def __init__(self, load: _RoundingLoader, parts: Sequence[tuple[str, int]], in_size: int, *, bias: bool) -> None:
        self._load = load
        self._parts = parts
        self._in_size = in_size
        self._biases = torch.cat([load.tensor(f"{name}.bias", size) for name, size in parts]) if bias else None

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        return functional.linear(rows, self._load.round(self._parts, self._in_size, rows), self._biases)
