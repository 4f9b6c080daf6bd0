"""A small tokenizer and a random model with the pieces that Code Llama's have at their ends."""

from collections.abc import Sequence
from pathlib import Path

from checkpoints import SMALL, random_weights, save
from conftest import DEMO

from llama.text.gguf_tokenizer import _field

INFILLING = ["▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>"]
STEP = "<step>"


def tokenizer(path: Path, pieces: Sequence[str], base: Path = DEMO / "tokenizer.model") -> Path:
    """A SentencePiece model with more pieces: of a message of protobuf, repeated fields may stand anywhere."""
    more = [_field(1, _field(1, piece.encode()) + _field(2, -1e9) + _field(3, 1)) for piece in pieces]
    path.write_bytes(base.read_bytes() + b"".join(more))
    return path


def checkpoint(folder: Path, pieces: Sequence[str]) -> Path:
    sizes = {**SMALL, "vocab_size": 1024 + len(pieces)}
    save(folder, sizes, random_weights(sizes))
    tokenizer(folder / "tokenizer.model", pieces)
    return folder
