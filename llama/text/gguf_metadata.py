"""A checkpoint's tokenizer → what a GGUF file says of it: the way back of gguf_tokenizer.py."""

import json
from pathlib import Path
from typing import Any

from llama.errors import TokenizerError
from llama.gguf import find_gguf, read_header
from llama.text.chat_files import template_of
from llama.text.gguf_tokenizer import PATTERNS
from llama.text.tokenizer_files import open_tokenizer, tokenizer_in
from llama.tokenizer import BaseTokenizer, Tokenizer

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)


def tokenizer_metadata(path: Path, vocab_size: int) -> dict[str, Any]:
    """Of the tokenizer in a folder, beside it or in a GGUF file; tokens that only the weights have are unused ones."""
    if gguf := find_gguf(path):
        return {key: value for key, value in read_header(gguf).metadata.items() if key.startswith("tokenizer.")}
    beside = path.absolute().parent / "tokenizer.model"
    found = tokenizer_in(path) or (beside if beside.is_file() else None)
    if found is None:
        raise TokenizerError(f"{path} has no tokenizer, which a GGUF file holds: put it there")
    tokenizer = open_tokenizer(str(found))
    own = _pieces(tokenizer) if isinstance(tokenizer, Tokenizer) else _byte_level(found, tokenizer)
    for token in range(len(own["tokens"]), vocab_size):
        own["tokens"].append(f"[unused {token}]")
        own["token_type"].append(_UNUSED)
        if "scores" in own:
            own["scores"].append(-1e4)
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        if (token := getattr(tokenizer, f"{name}_id")) >= 0:
            own[f"{key}_token_id"] = token
    own["add_bos_token"] = tokenizer.adds_bos
    metadata = {f"tokenizer.ggml.{key}": value for key, value in own.items()}
    template = template_of(path)
    return metadata if template is None else {**metadata, "tokenizer.chat_template": template}


def _pieces(tokenizer: Tokenizer) -> dict[str, Any]:
    model, tokens = tokenizer.sp_model, list(range(tokenizer.sp_model.vocab_size()))
    asked = zip(model.is_unknown(tokens), model.is_control(tokens), model.is_byte(tokens), strict=True)
    types = [_UNKNOWN if u else _CONTROL if c else _BYTE if b else _NORMAL for u, c, b in asked]
    pieces, scores = model.id_to_piece(tokens), [float(score) for score in model.get_score(tokens)]
    for token in range(len(tokens), tokenizer.n_words):
        name = tokenizer.piece(token)
        pieces.append(name)
        scores.append(0.0)
        types.append(_CONTROL if name in tokenizer.specials else _USER_DEFINED)
    return {"model": "llama", "pre": "default", "tokens": pieces, "scores": scores, "token_type": types,
            "unknown_token_id": model.unk_id(), "add_space_prefix": tokenizer.strips_first_space}  # fmt: skip


def _byte_level(path: Path, tokenizer: BaseTokenizer) -> dict[str, Any]:
    described = json.loads(path.read_text(encoding="utf-8"))
    model, decoder = described["model"], described.get("decoder") or {}
    pre = _pre_of(described.get("pre_tokenizer"))
    if model.get("type") != "BPE" or decoder.get("type") != "ByteLevel" or pre is None:
        raise TokenizerError(f"{path} cuts texts in a way that GGUF has no name for here: choose meta or hf")
    added = {token["id"]: token for token in described.get("added_tokens", [])}
    names = {token: piece for piece, token in model["vocab"].items()} | {t: one["content"] for t, one in added.items()}
    tokens = range(tokenizer.n_words)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    types = [
        _UNUSED if token not in names else _NORMAL if token not in added
        else _CONTROL if names[token] in tokenizer.specials else _USER_DEFINED
        for token in tokens
    ]  # fmt: skip
    pieces = [names.get(token, f"[unused {token}]") for token in tokens]
    return {"model": "gpt2", "pre": pre, "tokens": pieces, "token_type": types, "merges": merges}


def _pre_of(cutter: Any) -> str | None:
    """The name of the rules by which texts are cut."""
    parts = cutter.get("pretokenizers", [cutter]) if isinstance(cutter, dict) else []
    found = tuple(part.get("pattern", {}).get("Regex") for part in parts if part.get("type") == "Split")
    if not found and [part.get("type") for part in parts] == ["Digits", "ByteLevel"]:
        return "smollm" if parts[0].get("individual_digits") else None
    return next((name for name, patterns in PATTERNS.items() if patterns == found), None)
