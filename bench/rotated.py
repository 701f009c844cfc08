"""The same model in another basis of its residual stream: exact in real numbers, and no weight is on a grid any more.

For measuring quantizers on a model that is only to be had quantized: its own grid would flatter them. Norms are folded
into the matrices behind them, so that a random rotation Q commutes with what is left of them; matrices that read the
stream become W diag(norm) Q, those that write it Q^T W, and the output layer no longer is the embedding.

    python bench/rotated.py MODEL.gguf ROTATED.gguf
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from millicent.engine.quantization import dequantize
from millicent.text.gguf import read_gguf_head

_READ_STREAM = {
    "attn_q": "attn_norm",
    "attn_k": "attn_norm",
    "attn_v": "attn_norm",
    "ffn_gate": "ffn_norm",
    "ffn_up": "ffn_norm",
}
_WRITE_STREAM = {"attn_output", "ffn_down"}


def write_rotated(source: Path, target: Path, seed: int = 0) -> None:
    """`source` without biases and with a tied output layer; `target` in float32."""
    from gguf import GGUFReader, GGUFWriter

    from millicent.engine.quantized_file import copy_metadata

    head = read_gguf_head(source)
    data = GGUFReader(source)
    raw = {tensor.name: tensor for tensor in data.tensors}

    def tensor(name: str) -> torch.Tensor:
        info = head.tensors[name]
        return dequantize(raw[name].data.reshape(-1).view("uint8").copy(), info.quantization, info.shape, torch.float64)

    embedding = tensor("token_embd.weight")
    generator = torch.Generator().manual_seed(seed)
    hidden = embedding.shape[1]
    rotation = torch.linalg.qr(torch.randn(hidden, hidden, generator=generator, dtype=torch.float64)).Q
    writer = GGUFWriter(target, head.metadata["general.architecture"])
    copy_metadata(data, writer, {"general.file_type": 0})
    rotated = {"token_embd.weight": embedding @ rotation}
    rotated["output.weight"] = (embedding * tensor("output_norm.weight")) @ rotation
    for name in head.tensors:
        *prefix, kind, _ = name.split(".")
        if kind in _READ_STREAM:
            norm = tensor(".".join([*prefix, _READ_STREAM[kind], "weight"]))
            rotated[name] = (tensor(name) * norm) @ rotation
        elif kind in _WRITE_STREAM:
            rotated[name] = rotation.T @ tensor(name)
        elif kind.endswith("norm"):
            rotated[name] = torch.ones(hidden)
    for name, values in rotated.items():
        writer.add_tensor(name, values.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    write_rotated(Path(sys.argv[1]), Path(sys.argv[2]))
