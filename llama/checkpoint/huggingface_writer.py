"""A checkpoint as a Hugging Face folder: config.json, and safetensors files of at most 5 GB with their index.

Format: https://huggingface.co/docs/safetensors. A file is the length of its header, the header (JSON: each tensor's
dtype, shape and place), and the tensors' bytes one after the other.
"""

import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama.checkpoint.huggingface import their_name, to_halves, turns_in_halves
from llama.checkpoint.layout import expected_shapes
from llama.checkpoint.source import Source
from llama.checkpoint.writer import whole_tensor
from llama.errors import CheckpointError
from llama.model.args import ModelArgs
from llama.progress import Move

LARGEST = 5 * 10**9  # bytes of a file's tensors
DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_HEADER_STEP = 8


def files(source: Source, args: ModelArgs) -> "dict[str, bytes | _Tensors]":
    """File name → what writes it, for the tensors and config.json."""
    if args.quantize:
        raise CheckpointError(
            f"{source.folder} is quantised as {args.quantize}, which no Hugging Face folder holds: convert what it was"
            " made from, or choose another format"
        )
    if strange := {str(source.dtype(name)) for name in source.names if source.dtype(name) not in DTYPES}:
        raise CheckpointError(f"{source.folder} holds {min(strange)}, which is not written here")
    config = json.dumps(config_json(source, args), indent=2).encode()
    groups = list(_groups(source, args))
    if len(groups) == 1:
        return {"model.safetensors": _Tensors(source, args, groups[0]), "config.json": config}
    named = {f"model-{n:05}-of-{len(groups):05}.safetensors": group for n, group in enumerate(groups, 1)}
    index = {"metadata": {}, "weight_map": {their_name(name): file for file, group in named.items() for name in group}}
    tensors: dict[str, bytes | _Tensors] = {file: _Tensors(source, args, group) for file, group in named.items()}
    return {**tensors, "model.safetensors.index.json": json.dumps(index).encode(), "config.json": config}


def _groups(source: Source, args: ModelArgs) -> Iterator[list[str]]:
    """The tensors' names, file by file."""
    group: list[str] = []
    size = 0
    for name, shape in expected_shapes(args).items():
        own = math.prod(shape) * source.dtype(name).itemsize
        if group and size + own > LARGEST:
            yield group
            group, size = [], 0
        group.append(name)
        size += own
    yield group


class _Tensors:
    """One file of tensors, written one by one."""

    def __init__(self, source: Source, args: ModelArgs, names: list[str]) -> None:
        self._source, self._args, self._names = source, args, names
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        shapes, at = expected_shapes(args), 0
        for name in names:
            size = math.prod(shapes[name]) * source.dtype(name).itemsize
            entry = {"dtype": DTYPES[source.dtype(name)], "shape": list(shapes[name]), "data_offsets": [at, at + size]}
            entries[their_name(name)] = entry
            at += size
        header = json.dumps(entries).encode()
        header += b" " * (-len(header) % _HEADER_STEP)
        self._header = struct.pack("<Q", len(header)) + header
        self.size = len(self._header) + at

    def write(self, path: Path, move: Move) -> None:
        with open(path, "wb") as file:
            file.write(self._header)
            for name in self._names:
                data = self._tensor(name)
                file.write(data.reshape(-1).view(torch.uint8).numpy().data)
                move(data.nbytes, path.stem)

    def _tensor(self, name: str) -> Tensor:
        tensor = whole_tensor(self._source, name)
        return to_halves(tensor, self._args.head_dim).contiguous() if turns_in_halves(name) else tensor


def config_json(source: Source, args: ModelArgs) -> dict[str, Any]:
    """What config.json says of these sizes. Raises CheckpointError where it cannot."""
    kind = "qwen2" if args.qkv_bias and not args.o_bias else "llama"
    if (args.o_bias and not args.qkv_bias) or (kind == "qwen2" and args.mlp_bias):
        raise CheckpointError(f"{source.folder} has biases that no config.json describes: choose another format")
    own: dict[str, Any] = {"attention_bias": args.o_bias, "mlp_bias": args.mlp_bias} if kind == "llama" else {}
    if source.end_ids:
        own["eos_token_id"] = list(source.end_ids)
    return {
        "architectures": [f"{kind.capitalize()}ForCausalLM"], "model_type": kind, "hidden_act": "silu",
        "hidden_size": args.dim, "intermediate_size": args.hidden_dim, "num_hidden_layers": args.n_layers,
        "num_attention_heads": args.n_heads, "num_key_value_heads": args.kv_heads, "head_dim": args.head_dim,
        "vocab_size": args.vocab_size, "rms_norm_eps": args.norm_eps, "rope_theta": args.rope_theta,
        **_rope(source, args), "max_position_embeddings": _positions(source, args), "tie_word_embeddings": False,
        "dtype": str(source.dtype("tok_embeddings.weight")).removeprefix("torch."), **own,
    }  # fmt: skip


def _positions(source: Source, args: ModelArgs) -> int:
    if args.rope_scaling and args.rope_scaling.kind == "dynamic":
        return args.rope_scaling.original_max_position_embeddings
    return source.trained_length or 4096


def _rope(source: Source, args: ModelArgs) -> dict[str, Any]:
    scaling = args.rope_scaling
    if scaling is None:
        return {}
    told: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    original = {"original_max_position_embeddings": scaling.original_max_position_embeddings}
    if scaling.kind == "yarn":
        names = ("attention_factor", "beta_fast", "beta_slow", "truncate")
        told |= {**original, **{name: getattr(scaling, name) for name in names}}
    elif scaling.kind == "llama3":
        told |= {**original, **{name: getattr(scaling, name) for name in ("low_freq_factor", "high_freq_factor")}}
    elif scaling.kind == "factors":
        raise CheckpointError(f"{source.folder} scales positions pair by pair, which no config.json says: choose gguf")
    return {"rope_scaling": told}
