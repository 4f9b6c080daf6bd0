"""`JSONTokenizer`: a tokenizer.json through the `tokenizers` library; which bytes a token stands for is read off it.

https://huggingface.co/docs/tokenizers. Two kinds are known: byte-level ones, whose tokens spell bytes as letters
(GPT-2's, Llama-3's, Qwen's), and those made of a SentencePiece model, whose tokens have U+2581 for a space.
"""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from llama.errors import TokenizerError
from llama.tokenizer import BaseTokenizer

_BYTE = re.compile("<0x([0-9A-F]{2})>")
AGAIN = "download it again"


def _letters() -> dict[str, int]:
    """How byte-level tokenizers spell bytes: printable ones by themselves, the others by letters from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


LETTERS = _letters()


class JSONTokenizer(BaseTokenizer):
    """A tokenizer.json, with what tokenizer_config.json beside it says (`settings`)."""

    def __init__(self, path: Path, data: bytes, settings: Mapping[str, Any]) -> None:
        """The `data` of the file at `path`. Raises TokenizerError that says what is wrong, or not known here."""
        super().__init__()
        described = _object(path, data)
        named = {name: text_of(settings.get(f"{name}_token")) for name in ("bos", "eos", "pad")}
        controls = _controls(described, set(named.values()))
        begin = _begin_of(described.pop("post_processor", None))
        self._use(path, described, json.dumps(described), controls)
        self.bos_id, self.eos_id, self.pad_id = (self._id(named[name]) for name in ("bos", "eos", "pad"))
        if named["bos"] is None:
            self.bos_id = self._id(begin)
        told = settings.get("add_bos_token")
        self.adds_bos = self.bos_id >= 0 and (told if isinstance(told, bool) else self._id(begin) == self.bos_id)

    def _use(self, path: Path, described: Mapping[str, Any], text: str, controls: set[str]) -> None:
        self.model_path, self._text = path, text
        self._library = _library(path, text)
        self._library.encode_special_tokens = True  # those that are spelled in a text are text
        vocabulary = self._library.get_vocab(True)
        self._names = {token: name for name, token in vocabulary.items()}
        self.n_words = max(self._names, default=-1) + 1
        self.specials = {name: vocabulary[name] for name in controls if name in vocabulary}
        self._controls = set(self.specials.values())
        self._bytes, self._fallback, self.strips_first_space = _decoding(described.get("decoder"), path)
        self.replaces_each_byte = not self._bytes

    def _id(self, name: str | None) -> int:
        """−1 where there is no such token."""
        return -1 if name is None else self.specials.get(name, -1)

    def _encode(self, text: str) -> list[int]:
        return _tokens(self._library, text, self.model_path)

    @cached_property
    def _recognising(self) -> Any:
        """The same, but special tokens that are spelled in a text are those tokens: for templates."""
        return _library(self.model_path, self._text)

    def encode_template(self, text: str, mark: str = "") -> list[int]:
        if mark and mark in text:
            return super().encode_template(text, mark)
        return _tokens(self._recognising, text, self.model_path)

    def _encode_part(self, text: str, first: bool) -> list[int]:
        if first or self._bytes or not self.specials or any(name in text for name in self.specials):
            return self._encode(text)
        name, token = next(iter(self.specials.items()))
        tokens = self.encode_template(name + text)  # behind a special token some add no space
        return tokens[1:] if tokens[:1] == [token] else self._encode(text)

    def id_of(self, piece: str) -> int | None:
        token: int | None = self._library.token_to_id(piece)
        return token

    def _name(self, token: int) -> str:
        name: str = self._names.get(token, f"<{token}>")
        return name

    def _surface(self, token: int) -> str | int | bytes:
        name: str | None = self._names.get(token)
        if name is None or token in self._controls:
            return b""  # bytes on both sides of it still make one character
        if self._bytes:
            spelled = [LETTERS.get(letter, -1) for letter in name]
            return name.encode() if -1 in spelled else bytes(spelled)
        if self._fallback and (byte := _BYTE.fullmatch(name)):
            return int(byte[1], 16)
        return name


def text_of(token: Any) -> str | None:
    """How tokenizer_config.json names a token: as a text, or as an object with its "content"."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) and content else None


def _object(path: Path, data: bytes) -> dict[str, Any]:
    try:
        described = json.loads(data)
    except (ValueError, RecursionError):
        raise TokenizerError(f"tokenizer {path} ({len(data)} bytes) is not JSON: {AGAIN}") from None
    if not isinstance(described, dict) or not isinstance(described.get("model"), dict):
        raise TokenizerError(f"tokenizer {path} has no model: it is not a tokenizer.json; {AGAIN}")
    return described


def _controls(described: dict[str, Any], named: set[str | None]) -> set[str]:
    """The special tokens' names; those that begin, end or pad texts are made special."""
    added = described.get("added_tokens") or []
    controls = set()
    for token in added if isinstance(added, list) else []:
        if isinstance(token, dict) and isinstance(token.get("content"), str):
            if token["content"] in named:
                token["special"] = True
            if token.get("special") is True:
                controls.add(token["content"])
    return controls


def _begin_of(processor: Any) -> str | None:
    """The special token that the file's own template puts before a text."""
    if not isinstance(processor, dict):
        return None
    if processor.get("type") == "Sequence" and isinstance(processor.get("processors"), list):
        return next(filter(None, map(_begin_of, processor["processors"])), None)
    single = processor.get("single")
    first = single[0] if isinstance(single, list) and single else None
    token = first.get("SpecialToken") if isinstance(first, dict) else None
    name = token.get("id") if isinstance(token, dict) else None
    return name if isinstance(name, str) else None


def _library(path: Path, text: str) -> Any:
    from tokenizers import Tokenizer as Library

    with _refused(path):
        return Library.from_str(text)


def _tokens(library: Any, text: str, path: Path) -> list[int]:
    with _refused(path):
        tokens: list[int] = library.encode(text, add_special_tokens=False).ids
        return tokens


@contextmanager
def _refused(path: Path) -> Iterator[None]:
    """Whatever the library raises becomes a TokenizerError: its panics are no `Exception`."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise TokenizerError(f"tokenizer {path} is not a tokenizer.json ({first:.200}): {AGAIN}") from None


def _decoding(decoder: Any, path: Path) -> tuple[bool, bool, bool]:
    """Whether tokens spell bytes; whether some stand for a byte; whether a text's first space is dropped."""
    parts = decoder.get("decoders") if isinstance(decoder, dict) and decoder.get("type") == "Sequence" else [decoder]
    parts = [part if isinstance(part, dict) else {} for part in parts] if isinstance(parts, list) else [{}]
    kinds = [part.get("type") for part in parts]
    if kinds == ["ByteLevel"]:
        return True, False, False
    spaces = any(part.get("type") == "Replace" and part.get("content") == " " for part in parts)
    known = {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}
    if not set(kinds) <= known or not (spaces or "Metaspace" in kinds):
        raise TokenizerError(f"tokenizer {path} decodes by {', '.join(map(str, kinds)):.100}, which is not known here")
    strips = any(part.get("type") == "Strip" and part.get("start") == 1 for part in parts)
    drops = any(part.get("type") == "Metaspace" and part.get("prepend_scheme", "always") != "never" for part in parts)
    return False, "ByteFallback" in kinds, strips or drops
