"""Writes the vectors that sentence-transformers gives a dozen texts (base64 of float32), to hold ours against.

`pip install sentence-transformers`, then `python tests/support/minilm_golden.py MODEL_DIRECTORY OUTPUT.json`.
"""

from __future__ import annotations

import base64
import json
import sys
from pathlib import Path
from typing import Any

TEXTS = (
    "What is the capital city of Japan?",
    "Tokyo is the capital of Japan.",
    "How do I bake sourdough bread?",
    "a",
    "HELLO, hello; Hello!",
    "Größe, naïve, Ünïcödé and déjà vu",
    "東京は日本の首都です。",
    "def add(a: int, b: int) -> int:\n    return a + b",
    "  spaces   and\ttabs\nand lines  ",
    "🦙 emoji 🚀 and unassigned \U000e0fff",
    "antidisestablishmentarianism supercalifragilisticexpialidocious",
    "The bill for running models in production grows with every answer. " * 12,
    "One text that is longer than the model reads, and is cut off after its first 256 word pieces. " * 20,
)


def main() -> None:
    sentence_transformers: Any = __import__("sentence_transformers")
    model = sentence_transformers.SentenceTransformer(sys.argv[1], device="cpu")
    vectors = model.encode(list(TEXTS))
    written = [base64.b64encode(vector.astype("<f4").tobytes()).decode() for vector in vectors]
    Path(sys.argv[2]).write_text(json.dumps(written, indent=0) + "\n")


if __name__ == "__main__":
    main()
