"""A difficulty score: how likely it is that a prompt needs the strong model.

Logistic regression over hashed words and pairs of words, and a few of the prompt's shape; trained by AdaGrad (Duchi,
Hazan, Singer 2011) on pairs of grades. Plain Python: ten
seconds for 14,000 prompts, and a tenth of a millisecond to score one.
"""

from __future__ import annotations

import itertools
import math
import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from random import Random

import msgspec

from millicent.core.errors import ConfigError
from millicent.core.files import whole_file

_BITS = 18
_FORMAT = 1
# A longer prompt is read at both ends, where instructions stand.
_READ_CHARACTERS = 2000
_TOKEN = re.compile(r"[^\W\d_]+|\d+|[^\w\s]")
_EPOCHS = 4
_RATE = 0.15
# Towards zero, for each visit of a weight: what is seen once says little.
_SHRINK = 2e-4


class Pair(msgspec.Struct, frozen=True):
    """A prompt, and how good (0 to 1) the weak and the strong model's answers to it were."""

    prompt: str
    weak: float
    strong: float


class Scorer(msgspec.Struct, frozen=True):
    """What was learned; `weights` by hashed feature, those that are zero left out. Deterministic."""

    format: int
    pairs: int
    bias: float
    weights: dict[int, float]

    def score(self, prompt: str) -> float:
        """From 0, easy, to 1."""
        features = features_of(prompt)
        known = self.weights
        return _sigmoid(self.bias + sum(known.get(each, 0.0) for each in features) / math.sqrt(len(features)))

    def save(self, path: Path) -> None:
        with whole_file(path) as file:
            file.write_bytes(msgspec.json.encode(self))

    @classmethod
    def load(cls, path: Path) -> Scorer:
        """Raises ConfigError."""
        try:
            found = msgspec.json.decode(path.read_bytes(), type=cls)
        except (OSError, msgspec.DecodeError) as error:
            raise ConfigError(
                f"{path}: no scores can be read ({error}): make them with `millicent router train`"
            ) from error
        if found.format != _FORMAT:
            raise ConfigError(f"{path}: its format {found.format} isn't known here: train it again")
        return found


def features_of(prompt: str) -> list[int]:
    """Hashes of its words, of neighbours, and of how long it is and what it is made of. Never empty."""
    if len(prompt) > 2 * _READ_CHARACTERS:
        read = f"{prompt[:_READ_CHARACTERS]}\n{prompt[-_READ_CHARACTERS:]}"
    else:
        read = prompt
    tokens = _TOKEN.findall(read.lower())
    digits = sum(token.isdigit() for token in tokens)
    shape = [
        f"#length {len(prompt).bit_length()}",
        f"#tokens {len(tokens) // 16}",
        f"#digits {8 * digits // max(1, len(tokens))}",
        f"#lines {min(16, prompt.count(chr(10)))}",
    ]
    neighbours = map(" ".join, itertools.pairwise(tokens))
    mask = (1 << _BITS) - 1
    return sorted({zlib.crc32(each.encode("utf-8", "replace")) & mask for each in (*shape, *tokens, *neighbours)})


def train(pairs: Sequence[Pair], *, seed: int = 0) -> Scorer:
    """The target is whether the strong model's answer was better. Raises ConfigError where that never, or always, was.

    The same pairs and seed give the same scores.
    """
    return fit([features_of(pair.prompt) for pair in pairs], [pair.strong > pair.weak for pair in pairs], seed=seed)


def fit(rows: Sequence[list[int]], labels: Sequence[bool], *, seed: int = 0) -> Scorer:
    """As `train`, of features that were computed before."""
    better = sum(labels)
    if not 0 < better < len(labels):
        raise ConfigError("in these pairs the strong model is never, or always, better: there is nothing to learn")
    weights = [0.0] * (1 << _BITS)
    squares = [1.0] * (1 << _BITS)
    bias = math.log(better / (len(labels) - better))
    order = list(range(len(rows)))
    random = Random(seed)  # noqa: S311 - an order, no secret
    read = weights.__getitem__
    for _ in range(_EPOCHS):
        random.shuffle(order)
        for number in order:
            row = rows[number]
            norm = 1 / math.sqrt(len(row))
            slope = (_sigmoid(bias + sum(map(read, row)) * norm) - labels[number]) * norm
            square = slope * slope
            for each in row:
                squares[each] += square * len(row)
                weights[each] -= _RATE * (slope / math.sqrt(squares[each]) + _SHRINK * weights[each])
    kept = {each: weight for each, weight in enumerate(weights) if weight}
    return Scorer(_FORMAT, len(rows), bias, kept)


def _sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-max(-40.0, min(40.0, value))))
