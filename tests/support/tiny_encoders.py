"""A random BERT so small that a test can afford it, with a WordPiece tokenizer; the same for a seed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
WORDS = ("the", "sun", "moon", "rises", "sets", "and", "a", "b", "c", "##s", "##ing", "##t", "?", ".", ",", "!")
HIDDEN, LAYERS, HEADS, INTERMEDIATE, POSITIONS = 32, 2, 4, 48, 64


def write_tiny_encoder(
    directory: Path, *, context_tokens: int = 40, pooling: str = "mean_tokens", normalize: bool = True, seed: int = 0
) -> Path:
    """Write the checkpoint, as sentence-transformers would, into `directory` (made if missing) and return it."""
    directory.mkdir(parents=True, exist_ok=True)
    vocabulary = _write_tokenizer(directory)
    _write_json(
        directory / "config.json",
        {
            "architectures": ["BertModel"],
            "model_type": "bert",
            "hidden_act": "gelu",
            "hidden_size": HIDDEN,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "intermediate_size": INTERMEDIATE,
            "vocab_size": vocabulary,
            "max_position_embeddings": POSITIONS,
            "type_vocab_size": 2,
            "layer_norm_eps": 1e-12,
        },
    )
    modules = [{"path": "", "type": "sentence_transformers.models.Transformer"}]
    modules.append({"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"})
    if normalize:
        modules.append({"path": "2_Normalize", "type": "sentence_transformers.models.Normalize"})
    _write_json(directory / "modules.json", modules)
    _write_json(directory / "sentence_bert_config.json", {"max_seq_length": context_tokens})
    (directory / "1_Pooling").mkdir(exist_ok=True)
    _write_json(directory / "1_Pooling" / "config.json", {f"pooling_mode_{pooling}": True})
    _write_weights(directory / "model.safetensors", vocabulary, seed)
    return directory


def _write_tokenizer(directory: Path) -> int:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    vocabulary = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *WORDS))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.enable_truncation(8)  # as files have it; whoever asks decides what is cut off
    tokenizer.save(str(directory / "tokenizer.json"))
    return len(vocabulary)


def _write_weights(file: Path, vocabulary: int, seed: int) -> None:
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator) * 0.3

    tensors = {
        "embeddings.word_embeddings.weight": random(vocabulary, HIDDEN),
        "embeddings.position_embeddings.weight": random(POSITIONS, HIDDEN),
        "embeddings.token_type_embeddings.weight": random(2, HIDDEN),
    }
    linears = {
        "attention.self.query": (HIDDEN, HIDDEN),
        "attention.self.key": (HIDDEN, HIDDEN),
        "attention.self.value": (HIDDEN, HIDDEN),
        "attention.output.dense": (HIDDEN, HIDDEN),
        "intermediate.dense": (INTERMEDIATE, HIDDEN),
        "output.dense": (HIDDEN, INTERMEDIATE),
    }
    norms = ["embeddings.LayerNorm"]
    for index in range(LAYERS):
        prefix = f"encoder.layer.{index}"
        norms += [f"{prefix}.attention.output.LayerNorm", f"{prefix}.output.LayerNorm"]
        for name, size in linears.items():
            tensors[f"{prefix}.{name}.weight"] = random(*size)
            tensors[f"{prefix}.{name}.bias"] = random(size[0])
    for norm in norms:
        tensors[f"{norm}.weight"] = 1 + random(HIDDEN)
        tensors[f"{norm}.bias"] = random(HIDDEN)
    save_file(tensors, str(file), metadata={"format": "pt"})


def _write_json(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content, indent=1))
