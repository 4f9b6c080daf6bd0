"""Random checkpoints in Meta's layout, of known sizes, with a tokenizer of 32000 pieces, for benchmarks."""

import json
import struct
from pathlib import Path

import torch
from sentencepiece import SentencePieceProcessor

from llama import ModelArgs
from llama.checkpoint.find import DEMO
from llama.checkpoint.layout import expected_shapes
from llama.checkpoint.pth_writer import write_shard

VOCABULARY = 32000
SHAPES = {
    "134M": {"dim": 768, "n_layers": 12, "n_heads": 12, "multiple_of": 32, "norm_eps": 1e-5},
    "1.1B": {"dim": 2048, "n_layers": 22, "n_heads": 32, "n_kv_heads": 4, "multiple_of": 256, "norm_eps": 1e-5},
    "7B": {"dim": 4096, "n_layers": 32, "n_heads": 32, "multiple_of": 256, "norm_eps": 1e-5},
}


def make_checkpoint(folder: Path, shape: str, dtype: torch.dtype = torch.bfloat16) -> Path:
    """The folder `folder`/`shape` with a random checkpoint of one shard; one that is there already is kept.

    Every tensor is drawn in `dtype`, scaled so that activations keep their size; params.json, written last, says
    that the rest is complete.
    """
    params = {**SHAPES[shape], "vocab_size": VOCABULARY}
    target = folder / shape
    done = target / "params.json"
    if done.exists() and json.loads(done.read_text()) == params:
        return target
    target.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)

    def drawn(name: str) -> torch.Tensor:
        tensor = torch.empty_like(layout[name], device="cpu")
        return tensor.fill_(1) if tensor.dim() == 1 else tensor.normal_(0, tensor.shape[1] ** -0.5, generator=generator)

    shapes = expected_shapes(ModelArgs(**params))
    layout = {name: torch.empty(size, dtype=dtype, device="meta") for name, size in shapes.items()}
    write_shard(target / "consolidated.00.pth", layout, drawn, lambda count, said: None)  # one tensor in memory at once
    make_tokenizer(target / "tokenizer.model", VOCABULARY)
    done.write_text(json.dumps(params))
    return target


def make_tokenizer(path: Path, n: int) -> None:
    """The demo's tokenizer with fillers, which no text encodes to, up to exactly n pieces.

    The file is a protobuf message, in which a list's items may stand apart: pieces (its field 1, of text in field 1,
    score in field 2 and kind in field 3) can be written after its end.
    """
    model = (DEMO / "tokenizer.model").read_bytes()
    known = SentencePieceProcessor(model_proto=model).vocab_size()
    fillers = b""
    for number in range(known, n):
        text = f"<filler{number}>".encode()
        piece = b"\x0a" + bytes([len(text)]) + text + b"\x15" + struct.pack("<f", -1e6) + b"\x18\x01"
        fillers += b"\x0a" + bytes([len(piece)]) + piece
    path.write_bytes(model + fillers)
