"""A checkpoint as one GGUF file: matrices as they are, or in the blocks of Q8_0 and Q4_0, which are our groups.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, version 3.
"""

import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama.checkpoint.gguf_source import FACTORS, LOSSLESS, PLAIN, their_name
from llama.checkpoint.huggingface import to_halves, turns_in_halves
from llama.checkpoint.layout import expected_shapes, format_of, scales_of
from llama.checkpoint.source import Source
from llama.checkpoint.writer import whole_tensor
from llama.errors import CheckpointError
from llama.gguf import MAGIC, TYPES
from llama.model.args import ModelArgs
from llama.model.rope import frequencies
from llama.progress import Move

ALIGNMENT = 32
_CODES = {block.name: code for code, block in TYPES.items()}
_OF_DTYPE = {dtype: name for name, dtype in PLAIN.items()}
_OF_FORMAT = {own_format: name for name, own_format in LOSSLESS.items()}


class GGUFWriter:
    """What writes the file, tensor by tensor. `tokens` is what it says of its tokenizer."""

    def __init__(self, source: Source, args: ModelArgs, tokens: Mapping[str, Any]) -> None:
        self._source, self._args = source, args
        self._architecture = "qwen2" if args.qkv_bias else "llama"
        if args.o_bias or args.mlp_bias:
            raise CheckpointError(
                f"{source.folder} has biases that GGUF's {self._architecture} does not: choose hf or meta"
            )
        self._factors = _factors(source, args)
        self._entries = {
            their_name(name): (name, self._kind(name), shape) for name, shape in expected_shapes(args).items()
        }
        if self._factors is not None:
            self._entries[FACTORS] = ("", "F32", tuple(self._factors.shape))
        self._header = self._written_header(self._metadata(tokens))
        self.size = len(self._header) + sum(self._padded(kind, shape) for _, kind, shape in self._entries.values())

    def _kind(self, name: str) -> str:
        """How a tensor is stored: norms and biases in full."""
        if own_format := format_of(name, self._args.quantize):
            return _OF_FORMAT[own_format]
        return "F32" if len(expected_shapes(self._args)[name]) == 1 else _OF_DTYPE[self._source.dtype(name)]

    def _padded(self, kind: str, shape: tuple[int, ...]) -> int:
        block = TYPES[_CODES[kind]]
        return -(-(math.prod(shape) // block.numbers * block.size) // ALIGNMENT) * ALIGNMENT

    def _metadata(self, tokens: Mapping[str, Any]) -> dict[str, Any]:
        args, kind = self._args, self._architecture
        own: dict[str, Any] = {
            "context_length": self._source.trained_length or 4096, "embedding_length": args.dim,
            "block_count": args.n_layers, "feed_forward_length": args.hidden_dim, "attention.head_count": args.n_heads,
            "attention.head_count_kv": args.kv_heads, "attention.key_length": args.head_dim,
            "attention.value_length": args.head_dim, "attention.layer_norm_rms_epsilon": float(args.norm_eps),
            "rope.dimension_count": args.head_dim, "rope.freq_base": float(args.rope_theta),
            "vocab_size": args.vocab_size, **_scaling(self._source, args),
        }  # fmt: skip
        matrices = self._kind("layers.0.attention.wo.weight")
        types = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 7, "BF16": 32}
        general = {"general.architecture": kind, "general.alignment": ALIGNMENT, "general.file_type": types[matrices],
                   "general.quantization_version": 2}  # fmt: skip
        return {**general, **{f"{kind}.{key}": value for key, value in own.items()}, **tokens}

    def _written_header(self, metadata: Mapping[str, Any]) -> bytes:
        header = MAGIC + struct.pack("<IQQ", 3, len(self._entries), len(metadata))
        header += b"".join(_text(key) + _value(value) for key, value in metadata.items())
        at = 0
        for name, (_, kind, shape) in self._entries.items():
            header += _text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
            header += struct.pack("<IQ", _CODES[kind], at)
            at += self._padded(kind, shape)
        return header + bytes(-len(header) % ALIGNMENT)

    def write(self, path: Path, move: Move) -> None:
        with open(path, "wb") as file:
            file.write(self._header)
            for name, kind, _ in self._entries.values():
                data = self._bytes(name, kind)
                file.write(data.numpy().data)
                file.write(bytes(-data.nbytes % ALIGNMENT))
                move(data.nbytes, path.stem)

    def _bytes(self, name: str, kind: str) -> Tensor:
        if not name:
            assert self._factors is not None
            return self._factors.view(torch.uint8)
        weight = self._ordered(name, whole_tensor(self._source, name))
        if kind in PLAIN:
            return weight.to(PLAIN[kind]).contiguous().view(-1).view(torch.uint8)
        scales = self._ordered(name, whole_tensor(self._source, scales_of(name)))
        scale_bytes = scales.contiguous().view(-1, 1).view(torch.uint8)
        integers = weight.contiguous().view(-1).view(torch.uint8).view(len(scale_bytes), -1)
        return torch.cat((scale_bytes, integers), 1).view(-1)

    def _ordered(self, name: str, rows: Tensor) -> Tensor:
        turned = self._architecture != "llama" and turns_in_halves(name)
        return to_halves(rows, self._args.head_dim) if turned else rows


def _factors(source: Source, args: ModelArgs) -> Tensor | None:
    """What each pair's angle is divided by, where that is how positions are scaled."""
    scaling = args.rope_scaling
    if scaling is None or scaling.kind in ("linear", "yarn"):
        return None
    if scaling.kind == "dynamic":
        raise CheckpointError(
            f"{source.folder} scales positions by the length of texts, which GGUF does not: choose hf"
        )
    plain = frequencies(args.head_dim, 1, args.rope_theta, None)
    return (plain / frequencies(args.head_dim, 1, args.rope_theta, scaling)).contiguous()


def _scaling(source: Source, args: ModelArgs) -> dict[str, Any]:
    scaling = args.rope_scaling
    if scaling is None or scaling.kind not in ("linear", "yarn"):
        return {}
    own: dict[str, Any] = {"rope.scaling.type": scaling.kind, "rope.scaling.factor": float(scaling.factor)}
    if scaling.kind == "linear":
        return own
    usual = 0.1 * math.log(scaling.factor) + 1 if scaling.factor > 1 else 1.0
    if (scaling.beta_fast, scaling.beta_slow, scaling.truncate) != (32, 1, True):
        raise CheckpointError(f"{source.folder} has yarn with bounds of its own, which GGUF does not say: choose hf")
    own["rope.scaling.original_context_length"] = scaling.original_max_position_embeddings
    return own | {"rope.scaling.attn_factor": scaling.attention_factor / usual}


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value: Any) -> bytes:
    """A value with its kind: lists are of whole numbers, of numbers, or of texts."""
    if isinstance(value, list):
        kind = 8 if isinstance(value[0], str) else 6 if isinstance(value[0], float) else 5
        items = b"".join(map(_text, value)) if kind == 8 else struct.pack(f"<{len(value)}{'fi'[kind == 5]}", *value)
        return struct.pack("<IIQ", 9, kind, len(value)) + items
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + _text(value)
    return struct.pack("<If", 6, value) if isinstance(value, float) else struct.pack("<II", 4, value)
