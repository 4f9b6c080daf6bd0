"""Which tokenizer lies in a folder or at a path: a SentencePiece model, or a tokenizer.json, with its settings."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama.errors import TokenizerError
from llama.gguf import find_gguf
from llama.paths import expanded, read
from llama.text.gguf_tokenizer import tokenizer_files
from llama.text.json_tokenizer import JSONTokenizer, text_of
from llama.tokenizer import BaseTokenizer, Tokenizer, file_bytes

NAMES = ("tokenizer.model", "tokenizer.json")  # the first that is there counts
_MOST_BYTES = 1 << 24  # of the settings; a template may be among them


def open_tokenizer(tokenizer_path: str) -> BaseTokenizer:
    """The tokenizer at a path, which may be the folder that it lies in. Raises TokenizerError."""
    path = Path(expanded(tokenizer_path, "tokenizer_path"))
    if path.is_dir() and (inside := tokenizer_in(path)):
        path = inside
    settings = read_settings(path)
    if path.suffix == ".gguf":
        made = tokenizer_files(path)
        if "tokenizer.json" in made:
            return JSONTokenizer(path, made["tokenizer.json"], settings)
        tokenizer = Tokenizer.of_proto(path, made["tokenizer.model"])
    elif path.suffix == ".json" and (data := file_bytes(path)).lstrip()[:1] == b"{":
        return JSONTokenizer(path, data, settings)
    else:
        tokenizer = Tokenizer(str(path), _added(path.parent, settings))
    if isinstance(told := settings.get("add_bos_token"), bool):
        tokenizer.adds_bos = told
    end = text_of(settings.get("eos_token"))
    if end is not None and end in tokenizer.specials:
        tokenizer.eos_id = tokenizer.specials[end]
    return tokenizer


def tokenizer_in(folder: Path) -> Path | None:
    """The tokenizer of a checkpoint, in its folder or in its GGUF file."""
    return next((path for name in NAMES if (path := folder / name).is_file()), None) or find_gguf(folder)


def read_settings(path: Path) -> dict[str, Any]:
    """tokenizer_config.json, which Meta's folders do not have: beside a file, in a folder, or what a GGUF file says."""
    if gguf := find_gguf(path):
        settings: dict[str, Any] = json.loads(tokenizer_files(gguf)["tokenizer_config.json"])
        return settings
    return _read_object((path if path.is_dir() else path.parent) / "tokenizer_config.json")


def _read_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(read(path, _MOST_BYTES).decode("utf-8-sig"))
    except OSError as error:
        raise TokenizerError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise TokenizerError(f"{path} is not JSON: download it again") from None
    if not isinstance(found, dict):
        raise TokenizerError(f"{path} holds no JSON object: download it again")
    return found


def _added(folder: Path, settings: Mapping[str, Any]) -> dict[int, tuple[str, bool]]:
    """The tokens that a folder adds to a SentencePiece model: token → (text, whether it is a control token)."""
    added = {token: (text, True) for text, token in _read_object(folder / "added_tokens.json").items()}
    listed = settings.get("added_tokens_decoder")
    for key, entry in listed.items() if isinstance(listed, dict) else ():
        if isinstance(entry, dict) and isinstance(entry.get("content"), str) and key.isdecimal() and len(key) < 9:
            added[int(key)] = (entry["content"], entry.get("special") is True)
    for token in added:
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < 1 << 24:
            raise TokenizerError(f"{folder} adds a token {token!r:.40}, which is no number of one: download it again")
    return added
