"""A tokenizer from the metadata of a GGUF file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from millicent.core.errors import ModelError
from millicent.text.gguf import GgufHead

if TYPE_CHECKING:
    import tokenizers

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4

# How text is cut into words before merging, by llama.cpp's names for it (tokenizer.ggml.pre). Each is the pattern that
# the models of that name were trained with; the byte-level alphabet is applied after all of them.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


@dataclass(frozen=True, slots=True)
class _Cut:
    """`whole_words` takes a word that is a token as it is, without merging; `add_bos` is the default of its models."""

    pattern: str
    single_digits: bool = False
    whole_words: bool = False
    add_bos: bool = False
    compose: bool = False


_CUTS = {
    **dict.fromkeys(("gpt-2", "phi-2", "jais", "olmo", "mpt"), _Cut(_GPT2)),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell"), _Cut(_GPT2, single_digits=True)),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), _Cut(_LLAMA3, whole_words=True, add_bos=True)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), _Cut(_QWEN2, compose=True)),
}

# Control tokens that end a turn, by the names that models give them.
_TURN_ENDS = frozenset(
    {"<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<|endoftext|>", "<|end_of_text|>", "</s>"}
)


@dataclass(frozen=True, slots=True)
class TokenizerParts:
    """`tokens` are the texts of bos_token and the like, for the template."""

    backend: tokenizers.Tokenizer
    template: str | None
    tokens: dict[str, str]
    eos_tokens: frozenset[int]
    context_tokens: int | None


def tokenizer_parts(head: GgufHead) -> TokenizerParts:
    metadata, name = head.metadata, head.path.name
    texts = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(texts, list) or not texts:
        raise ModelError(f"{name}: holds no tokenizer (tokenizer.ggml.tokens); use a GGUF file with its vocabulary")
    kinds = metadata.get("tokenizer.ggml.token_type") or [_NORMAL] * len(texts)
    if len(kinds) != len(texts):
        raise ModelError(f"{name}: {len(kinds)} token types for {len(texts)} tokens; fetch the model again")
    kind = metadata.get("tokenizer.ggml.model")
    if kind not in _BUILDERS:
        known = ", ".join(_BUILDERS)
        raise ModelError(f"{name}: tokenizer {kind!r} is not supported (supported: {known}); use another model")
    try:
        backend, add_bos = _BUILDERS[kind](name, metadata, texts)
    except ModelError:
        raise
    except Exception as error:  # noqa: BLE001 - the library raises bare Exception for a vocabulary it cannot take
        raise ModelError(f"{name}: its vocabulary is damaged ({error}); fetch the model again") from None
    ids = {
        role: token
        for role in ("bos", "eos", "eot", "eom", "unknown", "padding")
        if isinstance(token := metadata.get(f"tokenizer.ggml.{role}_token_id"), int) and 0 <= token < len(texts)
    }
    _add_tokens(backend, texts, kinds, ids)
    if kind != "bert":  # whose builder knows them
        _add_ends(backend, texts, ids, metadata, add_bos=add_bos)
    named = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ends = {token for token, text in enumerate(texts) if kinds[token] == _CONTROL and text in _TURN_ENDS}
    return TokenizerParts(
        backend=backend,
        template=metadata.get("tokenizer.chat_template"),
        tokens={key: texts[ids[role]] for key, role in named.items() if role in ids},
        eos_tokens=frozenset(ends | {ids[role] for role in ("eos", "eot", "eom") if role in ids}),
        context_tokens=metadata.get(f"{metadata.get('general.architecture')}.context_length"),
    )


def _byte_pairs(name: str, metadata: dict[str, Any], texts: list[str]) -> tuple[tokenizers.Tokenizer, bool]:
    """`gpt2`: merges over bytes, after cutting text into words."""
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers

    pre = metadata.get("tokenizer.ggml.pre")
    cut = _CUTS.get(pre) if pre is not None else None
    if cut is None:
        known = ", ".join(_CUTS)
        raise ModelError(f"{name}: pre-tokenizer {pre!r} is not supported (supported: {known}); use another model")
    merges = [tuple(merge.split(" ", 1)) for merge in metadata.get("tokenizer.ggml.merges", ())]
    vocabulary = {text: token for token, text in enumerate(texts)}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges, ignore_merges=cut.whole_words))
    split = pre_tokenizers.Split(tokenizers.Regex(cut.pattern), "isolated")
    steps = [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    if cut.single_digits:
        steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    if cut.compose:
        backend.normalizer = normalizers.NFC()
    return backend, cut.add_bos


def _sentence_pieces(name: str, metadata: dict[str, Any], texts: list[str]) -> tuple[tokenizers.Tokenizer, bool]:
    """`llama`: pairs merge by the score of what they make, best first; unknown characters become bytes."""
    import tokenizers
    from tokenizers import decoders, models, normalizers

    scores = metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(texts):
        raise ModelError(f"{name}: tokenizer.ggml.scores doesn't fit its {len(texts)} tokens; fetch the model again")
    vocabulary = {text: token for token, text in enumerate(texts)}
    found = [
        (-scores[token], vocabulary[text[:cut]], vocabulary[text[cut:]], text[:cut], text[cut:])
        for text, token in vocabulary.items()
        for cut in range(1, len(text))
        if text[:cut] in vocabulary and text[cut:] in vocabulary
    ]
    merges = [(left, right) for _, _, _, left, right in sorted(found)]
    unknown = metadata.get("tokenizer.ggml.unknown_token_id", 0)
    backend = tokenizers.Tokenizer(
        models.BPE(vocabulary, merges, unk_token=texts[unknown], fuse_unk=True, byte_fallback=True)
    )
    spaces = normalizers.Replace(" ", "\u2581")
    prefixed = metadata.get("tokenizer.ggml.add_space_prefix", True)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), spaces]) if prefixed else spaces
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    return backend, True


def _word_pieces(name: str, metadata: dict[str, Any], texts: list[str]) -> tuple[tokenizers.Tokenizer, bool]:
    """`bert`: the longest piece of each word that is a token. Files mark where words begin, BERT where they go on."""
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

    kinds = metadata.get("tokenizer.ggml.token_type") or [_NORMAL] * len(texts)
    for token, text in enumerate(texts):
        if kinds[token] != _CONTROL:
            texts[token] = text.removeprefix("\u2581") if text.startswith("\u2581") else f"##{text}"
    vocabulary = {text: token for token, text in enumerate(texts)}
    ends = [_first_token(metadata, roles) for roles in (("cls", "bos"), ("seperator", "eos"))]  # the format's spelling
    unknown = metadata.get("tokenizer.ggml.unknown_token_id")
    if unknown is None or None in ends:
        raise ModelError(f"{name}: doesn't say its first, last and unknown tokens; use another build")
    backend = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token=texts[unknown]))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    first, last = (texts[end] for end in ends)
    backend.post_processor = processors.TemplateProcessing(
        single=[first, "$A", last], special_tokens=[(texts[end], end) for end in ends]
    )
    return backend, False


def _first_token(metadata: dict[str, Any], roles: tuple[str, ...]) -> Any:
    found = (metadata.get(f"tokenizer.ggml.{role}_token_id") for role in roles)
    return next((token for token in found if token is not None), None)


_BUILDERS = {"gpt2": _byte_pairs, "llama": _sentence_pieces, "bert": _word_pieces}


def _add_tokens(backend: tokenizers.Tokenizer, texts: list[str], kinds: list[int], ids: dict[str, int]) -> None:
    """Control tokens are special; user-defined ones are taken from any text, as their makers meant them."""
    from tokenizers import AddedToken

    special = set(ids.values()) | {token for token, kind in enumerate(kinds) if kind in {_CONTROL, _UNKNOWN}}
    backend.add_special_tokens([AddedToken(texts[token], special=True, normalized=False) for token in sorted(special)])
    backend.add_tokens(
        [
            AddedToken(texts[token], special=False, normalized=False)
            for token, kind in enumerate(kinds)
            if kind == _USER_DEFINED and token not in special
        ]
    )


def _add_ends(
    backend: tokenizers.Tokenizer, texts: list[str], ids: dict[str, int], metadata: dict[str, Any], *, add_bos: bool
) -> None:
    """Put the first and last token around a text, where the file asks for them."""
    from tokenizers import processors

    first = "bos" in ids and metadata.get("tokenizer.ggml.add_bos_token", add_bos)
    last = "eos" in ids and metadata.get("tokenizer.ggml.add_eos_token", False)
    around = [role for role, wanted in (("bos", first), ("eos", last)) if wanted]
    if around:
        template = ([texts[ids["bos"]]] if first else []) + ["$A"] + ([texts[ids["eos"]]] if last else [])
        backend.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[(texts[ids[role]], ids[role]) for role in around]
        )
