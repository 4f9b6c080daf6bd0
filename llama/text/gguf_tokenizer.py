"""The tokenizer that a GGUF file carries → the files that the libraries read, made in memory.

"llama" is a SentencePiece model (a protobuf message, https://github.com/google/sentencepiece), "gpt2" a byte-level one
(tokenizer.json), whose text is cut by the rules that its "pre" names.
"""

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama.errors import TokenizerError
from llama.gguf import read_header

_CONTROL, _USER_DEFINED, _MOST_TYPE = 3, 4, 6
# How texts are cut before their bytes are joined to tokens.
_ENDINGS = "'s|'t|'re|'ve|'m|'ll|'d"
_GPT2 = _ENDINGS + r"| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_LINES = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PATTERNS = {
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
    "llama-bpe": (rf"(?i:{_ENDINGS})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_LINES}",),
    "qwen2": (rf"(?i:{_ENDINGS})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_LINES}",),
    "smollm": (r"\p{N}", _GPT2 + r"|\s+"),
}


def tokenizer_files(path: Path) -> dict[str, bytes]:
    """File name → bytes: tokenizer.model or tokenizer.json, and tokenizer_config.json. Raises TokenizerError."""
    own = {
        key.removeprefix("tokenizer.ggml."): value
        for key, value in read_header(path).metadata.items()
        if key.startswith("tokenizer.")
    }
    kind, pieces = own.get("model"), own.get("tokens")
    if not isinstance(pieces, list) or not pieces or not all(isinstance(piece, str) for piece in pieces):
        raise TokenizerError(f"{path} has no tokens: name a tokenizer with tokenizer_path")
    types = own.get("token_type") or [1] * len(pieces)
    if len(types) != len(pieces) or not all(isinstance(t, int) and 0 < t <= _MOST_TYPE for t in types):
        raise TokenizerError(f"{path} says no type for each token: download it again")
    settings = json.dumps(_settings(own, pieces, kind == "llama")).encode()
    if kind == "llama":
        return {"tokenizer.model": _sentencepiece(path, own, pieces, types), "tokenizer_config.json": settings}
    if kind != "gpt2":
        raise TokenizerError(f"{path} has a tokenizer of kind {kind!r:.40}: llama and gpt2 are known here")
    return {"tokenizer.json": _byte_level(path, own, pieces, types), "tokenizer_config.json": settings}


def _settings(own: Mapping[str, Any], pieces: list[str], adds_bos: bool) -> dict[str, Any]:
    """What tokenizer_config.json would say."""
    settings: dict[str, Any] = {"add_bos_token": own.get("add_bos_token", adds_bos)}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        token = own.get(f"{key}_token_id")
        if isinstance(token, int) and 0 <= token < len(pieces):
            settings[f"{name}_token"] = pieces[token]
    template = own.get("tokenizer.chat_template")
    return {**settings, "chat_template": template} if isinstance(template, str) else settings


# ------------------------------------------------------------------------------------------------------- SentencePiece


def _varint(value: int) -> bytes:
    data = bytearray()
    while value > 127:
        data.append(value & 127 | 128)
        value >>= 7
    return bytes([*data, value])


def _field(number: int, value: int | float | bytes) -> bytes:
    """A field of a protobuf message: a whole number, a float, or bytes (a text, or another message)."""
    if isinstance(value, bytes):
        return _varint(number << 3 | 2) + _varint(len(value)) + value
    if isinstance(value, float):
        return _varint(number << 3 | 5) + struct.pack("<f", value)
    return _varint(number << 3) + _varint(value & (1 << 64) - 1)


def _sentencepiece(path: Path, own: Mapping[str, Any], pieces: list[str], types: list[int]) -> bytes:
    scores = own.get("scores") or [0.0] * len(pieces)
    if len(scores) != len(pieces) or not all(isinstance(score, float) and abs(score) < 3e38 for score in scores):
        raise TokenizerError(f"{path} says no score for each token: download it again")
    special = {name: own.get(f"{key}_token_id", default) for name, key, default in (
        ("unk", "unknown", 0), ("bos", "bos", 1), ("eos", "eos", 2), ("pad", "padding", -1),
    )}  # fmt: skip
    if not all(isinstance(token, int) and -1 <= token < len(pieces) for token in special.values()):
        raise TokenizerError(f"{path} names a special token that it does not have: download it again")
    message = b"".join(
        _field(1, _field(1, piece.encode()) + _field(2, score) + _field(3, kind))
        for piece, score, kind in zip(pieces, scores, types, strict=True)
    )
    trainer = _field(3, 2) + _field(35, 1)  # byte pairs, and bytes for what has no token
    for number, name in ((40, "unk"), (41, "bos"), (42, "eos"), (43, "pad")):
        trainer += _field(number, special[name])
    spaces = int(own.get("add_space_prefix", True))
    normalizer = _field(1, b"identity") + _field(3, spaces) + _field(4, 0) + _field(5, 1)
    return message + _field(2, trainer) + _field(3, normalizer)


# ---------------------------------------------------------------------------------------------------------- byte-level


def _byte_level(path: Path, own: Mapping[str, Any], pieces: list[str], types: list[int]) -> bytes:
    pre, merges = own.get("pre", "default"), own.get("merges")
    if pre not in PATTERNS:
        raise TokenizerError(f"{path} cuts texts by {pre!r:.40}: {', '.join(PATTERNS)} are known here")
    if not isinstance(merges, list) or not all(isinstance(m, str) and m.count(" ") == 1 for m in merges):
        raise TokenizerError(f"{path} has no list of merges: download it again")
    cuts = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in PATTERNS[pre]
    ]
    spelled = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    added = [
        {"id": token, "content": pieces[token], "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": kind == _CONTROL}
        for token, kind in enumerate(types) if kind in (_CONTROL, _USER_DEFINED)
    ]  # fmt: skip
    model = {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": pre == "llama-bpe",
        "vocab": {piece: token for token, piece in enumerate(pieces)}, "merges": [m.split(" ") for m in merges],
    }  # fmt: skip
    described = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
        "normalizer": {"type": "NFC"} if pre == "qwen2" else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*cuts, spelled]}, "post_processor": None,
        "decoder": {**spelled, "use_regex": True}, "model": model,
    }  # fmt: skip
    return json.dumps(described).encode()
