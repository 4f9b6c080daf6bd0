"""What a GGUF file says of its model → `ModelArgs`; what would change the mathematics and is not known is refused.

Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from llama.checkpoint.json_object import shown
from llama.checkpoint.params import check_sizes
from llama.errors import CheckpointError
from llama.model.args import ModelArgs
from llama.model.rope import RopeScaling

ARCHITECTURES = ("llama", "qwen2")
_CHANGES = ("expert_count", "attention.scale", "attention.causal", "attn_logit_softcapping", "final_logit_softcapping",
            "embedding_scale", "residual_scale", "logit_scale", "attention.clamp_kqv")  # fmt: skip


def read_args(metadata: Mapping[str, Any], path: Path, vocab_size: int, factors: tuple[float, ...]) -> ModelArgs:
    """`factors`: those of the tensor rope_freqs, if there is one. Raises CheckpointError."""
    kind = metadata.get("general.architecture")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        known = " and ".join(ARCHITECTURES)
        raise CheckpointError(f"{path} is of architecture {shown(kind)}: what can be run here is {known}")
    own = {key.removeprefix(f"{kind}."): value for key, value in metadata.items() if key.startswith(f"{kind}.")}
    for key in _CHANGES:
        if own.get(key):
            raise CheckpointError(f"{path} sets {key}={shown(own[key])}, which is not computed here")
    sizes = {name: own.get(key) for name, key in (
        ("dim", "embedding_length"), ("n_layers", "block_count"), ("own_hidden_dim", "feed_forward_length"),
        ("n_heads", "attention.head_count"), ("norm_eps", "attention.layer_norm_rms_epsilon"),
    )}  # fmt: skip
    if missing := [name for name, value in sizes.items() if value is None or isinstance(value, list)]:
        raise CheckpointError(f"{path} says no {missing[0]}, or one for each layer: it cannot be run here")
    args = ModelArgs(
        **sizes,  # type: ignore[arg-type]  # `check_sizes` looks at them
        n_kv_heads=own.get("attention.head_count_kv"), own_head_dim=own.get("attention.key_length"),
        vocab_size=vocab_size, rope_theta=own.get("rope.freq_base", 10000.0), qkv_bias=kind == "qwen2",
    )  # fmt: skip
    check_sizes(args, path)
    for key in ("attention.value_length", "rope.dimension_count"):
        if own.get(key, args.head_dim) != args.head_dim:
            raise CheckpointError(f"{path} sets {key}={shown(own[key])}, other than its heads of {args.head_dim}")
    try:
        return with_rope(args, own, factors)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path} scales positions in a way that cannot be followed: {error}") from None


def with_rope(args: ModelArgs, own: Mapping[str, Any], factors: tuple[float, ...]) -> ModelArgs:
    """The same with how positions are scaled."""
    if args.head_dim * args.n_heads == args.dim:
        args = replace(args, own_head_dim=None)
    kind, factor = own.get("rope.scaling.type", "none"), own.get("rope.scaling.factor", 0) or 1.0
    if factors:
        if len(factors) != args.head_dim // 2 or not all(0 < f < 1e9 for f in factors):
            raise ValueError("rope_freqs does not have a positive number for each pair")
        if kind not in ("none", "linear") or factor != 1:
            raise ValueError("it has rope_freqs, and scales positions in another way too")
        return replace(args, rope_scaling=RopeScaling("factors", factors=factors))
    if kind == "none" or (kind == "linear" and factor == 1):
        return args
    if kind == "linear":
        return replace(args, rope_scaling=RopeScaling("linear", factor))
    if kind != "yarn":
        raise ValueError(f"{shown(kind)} is none of linear and yarn")
    original = own.get("rope.scaling.original_context_length") or own.get("context_length", 0)
    scaling = RopeScaling("yarn", factor, original)
    longer = own.get("rope.scaling.attn_factor", 1.0) * (0.1 * math.log(factor) + 1 if factor > 1 else 1.0)
    return replace(args, rope_scaling=replace(scaling, attention_factor=longer))
