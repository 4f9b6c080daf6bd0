"""A GGUF file: what it says of itself, and where its tensors lie. Plain Python; nothing of a tensor is read here.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian.
"""

import mmap
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from llama.errors import CheckpointError
from llama.paths import opened

MAGIC = b"GGUF"
AGAIN = "download it again"
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MOST_DIMS, _MOST_NESTED = 4, 4


class BlockType(NamedTuple):
    """How a tensor's numbers are stored: so many in a block of so many bytes."""

    name: str
    numbers: int
    size: int


TYPES = {
    0: BlockType("F32", 1, 4), 1: BlockType("F16", 1, 2), 30: BlockType("BF16", 1, 2), 2: BlockType("Q4_0", 32, 18),
    3: BlockType("Q4_1", 32, 20), 6: BlockType("Q5_0", 32, 22), 7: BlockType("Q5_1", 32, 24),
    8: BlockType("Q8_0", 32, 34), 10: BlockType("Q2_K", 256, 84), 11: BlockType("Q3_K", 256, 110),
    12: BlockType("Q4_K", 256, 144), 13: BlockType("Q5_K", 256, 176), 14: BlockType("Q6_K", 256, 210),
    20: BlockType("IQ4_NL", 32, 18),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor: its shape, rows first; how it is stored; and the bytes of the file that it takes."""

    path: Path
    shape: tuple[int, ...]
    kind: BlockType
    begin: int
    size: int


@dataclass(frozen=True, slots=True)
class Header:
    metadata: Mapping[str, Any]
    tensors: Mapping[str, Entry]


def is_gguf(path: Path) -> bool:
    """Whether a path is that of a GGUF file, or of a folder that has one and nothing else of a checkpoint."""
    return find_gguf(path) is not None


def find_gguf(path: Path) -> Path | None:
    """The (first) GGUF file at a path."""
    if path.suffix == ".gguf" and path.is_file():
        return path
    if not path.is_dir() or (path / "config.json").is_file() or any(path.glob("consolidated.*.pth")):
        return None
    files = sorted(path.glob("*.gguf"))
    firsts = [
        file for file in files if not re.search(r"-\d{5}-of-\d{5}\.gguf$", file.name) or "-00001-of-" in file.name
    ]
    if len(firsts) > 1:
        raise CheckpointError(f"{path} holds {len(firsts)} GGUF files: name the one to run")
    return firsts[0] if firsts else None


def files_of(path: Path) -> list[Path]:
    """All files of which that one is the first. Raises CheckpointError that names one that is missing."""
    if not (split := re.fullmatch(r"(.*)-00001-of-(\d{5})\.gguf", path.name)):
        return [path]
    files = [path.with_name(f"{split[1]}-{n:05}-of-{split[2]}.gguf") for n in range(1, int(split[2]) + 1)]
    if missing := [file.name for file in files if not file.is_file()]:
        raise CheckpointError(f"{path.parent} lacks {missing[0]} of {len(files)} parts: download them")
    return files


@lru_cache(maxsize=8)
def _read_cached(path: Path, size: int, changed: int) -> Header:
    try:
        with opened(path) as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Reader(path, data).header()
    except (OSError, ValueError) as error:  # the latter: of an empty file, or of numbers that nothing can be
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{path} cannot be read as a GGUF file ({reason!s:.100}): {AGAIN}") from None


def read_header(path: Path) -> Header:
    """Raises CheckpointError where the file is not GGUF, or says what cannot be."""
    try:
        found = path.stat()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    return _read_cached(path, found.st_size, found.st_mtime_ns)


class _Reader:
    """What a file says, from its beginning on: nothing is taken that the file is too short for."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.at = path, data, 0

    def header(self) -> Header:
        if self.take(4) != MAGIC:
            raise CheckpointError(f"{self.path} is not a GGUF file: {AGAIN}")
        version = self.number("I")
        if version not in (2, 3):
            raise CheckpointError(f"{self.path} is GGUF of version {version}: 2 and 3 can be read")
        tensors, entries = self.number("Q"), self.number("Q")
        metadata: dict[str, Any] = {}
        for _ in range(self.count(entries, 13)):
            key = self.text()
            if key in metadata:
                raise self.wrong(f"{key!r:.60} stands in it twice")
            metadata[key] = self.value(self.number("I"), 0)
        infos = [self.info() for _ in range(self.count(tensors, 24))]
        return Header(metadata, self.placed(infos, metadata.get("general.alignment", 32)))

    def take(self, size: int) -> bytes:
        if size > len(self.data) - self.at:
            raise self.wrong("it ends too early")
        self.at += size
        return self.data[self.at - size : self.at]

    def number(self, kind: str) -> Any:
        return struct.unpack(f"<{kind}", self.take(struct.calcsize(f"<{kind}")))[0]

    def count(self, number: int, least: int) -> int:
        """A number of things of which each takes at least so many bytes."""
        if number * least > len(self.data) - self.at:
            raise self.wrong("it ends too early")
        return number

    def text(self) -> str:
        return self.take(self.number("Q")).decode(errors="replace")

    def value(self, kind: int, depth: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY and depth < _MOST_NESTED:
            inner, length = self.number("I"), self.number("Q")
            if inner in _SCALARS:
                form = f"<{self.count(length, struct.calcsize(_SCALARS[inner]))}{_SCALARS[inner]}"
                return list(struct.unpack(form, self.take(struct.calcsize(form))))
            return [self.value(inner, depth + 1) for _ in range(self.count(length, 8))]
        if kind not in _SCALARS:
            raise self.wrong(f"a value is of kind {kind}")
        return self.number(_SCALARS[kind])

    def info(self) -> tuple[str, tuple[int, ...], int, int]:
        """A tensor's name, shape, kind, and place among the tensors' bytes."""
        name, dims = self.text(), self.number("I")
        if not 0 < dims <= _MOST_DIMS:
            raise self.wrong(f"{name!r:.60} has {dims} dimensions")
        shape = tuple(reversed([self.number("Q") for _ in range(dims)]))  # the file has columns first
        return name, shape, self.number("I"), self.number("Q")

    def placed(self, infos: list[tuple[str, tuple[int, ...], int, int]], alignment: Any) -> dict[str, Entry]:
        if not isinstance(alignment, int) or not 0 < alignment <= 1 << 20 or alignment % 8:
            raise self.wrong(f"general.alignment is {alignment!r:.40}")
        base, found = -(-self.at // alignment) * alignment, {}
        for name, shape, kind, offset in infos:
            if kind not in TYPES:
                raise CheckpointError(f"{self.path} stores {name!r:.60} in a way (kind {kind}) that is not known here")
            numbers = 1
            for length in shape:
                numbers *= length
            block = TYPES[kind]
            size = numbers // block.numbers * block.size
            if name in found or shape[-1] % block.numbers or not numbers or base + offset + size > len(self.data):
                raise self.wrong(f"{name!r:.60} is there twice, or does not fit")
            found[name] = Entry(self.path, shape, block, base + offset, size)
        return found

    def wrong(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path} is damaged, {what}: {AGAIN}")
