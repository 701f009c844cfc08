"""The default model answers two questions that it knows, in both precisions."""

from __future__ import annotations

from pathlib import Path

import pytest

from millicent.core.request import Message
from millicent.engine.batch import Piece
from millicent.engine.config import Dtype
from millicent.engine.models import load_model
from millicent.text import load_tokenizer


@pytest.mark.model
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_smollm2_knows_the_capital_of_japan_and_that_two_and_two_are_four(smollm2_path: Path, dtype: Dtype) -> None:
    tokenizer = load_tokenizer(smollm2_path)
    model = load_model(smollm2_path, dtype=dtype, name="smollm2:135m")
    model.allocate(8, 16)

    def answer(question: str) -> str:
        tokens = tokenizer.encode_chat([Message("user", question)])
        done, prompt_tokens = 0, len(tokens)
        while len(tokens) < prompt_tokens + 14:
            logits = model.forward([Piece(0, tokens[done:], done, range(8), True)])
            done = len(tokens)
            tokens.append(int(logits[0].argmax()))
            if tokens[-1] in model.eos_tokens:
                break
        return tokenizer.decode(tokens[prompt_tokens:])

    assert "Tokyo" in answer("What is the capital city of Japan?")
    assert "4" in answer("What is 2 + 2?")
