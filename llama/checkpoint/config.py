"""`config.json` of a Hugging Face folder → `ModelArgs`; what would change the mathematics and is not known is refused.

Format: https://huggingface.co/docs/transformers/main_classes/configuration and the classes of its models.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llama.checkpoint.json_object import read_object, shown
from llama.checkpoint.params import check_sizes
from llama.errors import CheckpointError
from llama.model.args import ModelArgs
from llama.model.rope import RopeScaling

GET = "get the config.json that came with these weights"
# What transformers' classes take for what a file leaves out.
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"max_position_embeddings": 32768, "num_key_value_heads": 32},
}
CLASSES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM"}
SIZES = {"dim": "hidden_size", "own_hidden_dim": "intermediate_size", "n_layers": "num_hidden_layers",
         "n_heads": "num_attention_heads", "vocab_size": "vocab_size"}  # fmt: skip
# Each would change what is computed; none of these architectures has it, or we do not.
CHANGES = (
    "quantization_config", "compression_config", "num_local_experts", "num_experts", "n_routed_experts",
    "attn_logit_softcapping", "final_logit_softcapping", "embedding_multiplier", "residual_multiplier",
    "attention_multiplier", "logits_scaling", "scale_emb", "clip_qkv", "use_qk_norm", "qk_layernorm", "alibi",
    "no_rope_layers", "is_encoder_decoder", "cross_attention_layers",
)  # fmt: skip
SUGGESTED = ("temperature", "top_p", "top_k", "repetition_penalty")
_TURNS = ("low_freq_factor", "high_freq_factor")
ROPE_KEYS = {"rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings", "attention_factor",
             "beta_fast", "beta_slow", "truncate", "mscale", "mscale_all_dim", "low_freq_factor", "high_freq_factor",
             "partial_rotary_factor", "finetuned"}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Config:
    """What config.json and generation_config.json say."""

    args: ModelArgs
    architecture: str
    tied: bool  # the output layer is the embedding table
    end_ids: tuple[int, ...]
    trained_length: int  # the positions that the model was made for
    window: int | None  # attention looks back no further than so many tokens; None: to the beginning
    suggested: Mapping[str, str]  # of temperature, top_p, top_k and the like: for people to see


def read_config(folder: Path) -> Config:
    """Raises CheckpointError, which names what is missing, wrong, or not followed here."""
    path = folder / "config.json"
    given = read_object(path, GET)
    kind = given.get("model_type")
    if not isinstance(kind, str) or kind not in DEFAULTS:
        known = ", ".join(DEFAULTS)
        raise CheckpointError(f"{path} is of model_type {shown(kind)}; what can be run here is {known}")
    given = {**DEFAULTS[kind], **given}
    _check_followed(given, kind, path)
    if missing := [name for name in SIZES.values() if name not in given]:
        raise CheckpointError(f"{path} lacks {', '.join(missing)}: {GET}")
    sizes = {own: given[name] for own, name in SIZES.items()}
    theta, scaling = _rope(given, path)
    args = ModelArgs(
        **sizes, n_kv_heads=given.get("num_key_value_heads"), own_head_dim=given.get("head_dim"),
        norm_eps=given.get("rms_norm_eps", 1e-6), rope_theta=theta, rope_scaling=scaling,
        qkv_bias=given.get("attention_bias", kind == "qwen2"), o_bias=given.get("attention_bias", False),
        mlp_bias=given.get("mlp_bias", False),
    )  # fmt: skip
    check_sizes(args, path)
    if args.head_dim * args.n_heads == args.dim:
        args = replace(args, own_head_dim=None)
    generation = _generation(folder)
    return Config(
        args, CLASSES[kind], bool(given.get("tie_word_embeddings")), _end_ids((given, generation), path),
        _whole(given, "max_position_embeddings", path), _window(given, kind, path),
        {key: shown(generation[key]) for key in SUGGESTED if key in generation},
    )  # fmt: skip


def _check_followed(given: dict[str, Any], kind: str, path: Path) -> None:
    for key in CHANGES:
        if given.get(key):
            value = given[key]
            method = f" ({shown(value.get('quant_method'))})" if isinstance(value, dict) else ""
            raise CheckpointError(f"{path} sets {key}{method}, which is not followed here: use a checkpoint without it")
    classes = given.get("architectures") or [CLASSES[kind]]
    if classes != [CLASSES[kind]]:
        raise CheckpointError(f"{path} is of {shown(classes[0] if isinstance(classes, list) else classes)}:"
                              f" expected {CLASSES[kind]}, which completes text")  # fmt: skip
    if given.get("hidden_act", "silu") not in ("silu", "swish"):
        raise CheckpointError(f"{path} sets hidden_act={shown(given['hidden_act'])}: only silu is computed here")
    layers = given.get("layer_types") or []
    if not isinstance(layers, list) or any(layer != "full_attention" for layer in layers):
        raise CheckpointError(f"{path} sets layer_types other than full_attention: these are not computed here")
    for key in ("tie_word_embeddings", "attention_bias", "mlp_bias"):
        if not isinstance(given.get(key, False), bool):
            raise CheckpointError(f"{path} sets {key}={shown(given[key])}: expected true or false")


def _rope(given: dict[str, Any], path: Path) -> tuple[Any, RopeScaling | None]:
    """theta, and how positions are scaled; transformers 5 keeps both in rope_parameters, 4 beside each other."""
    rope = given.get("rope_parameters") or given.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise CheckpointError(f"{path} sets rope_scaling={shown(rope)}: expected an object")
    theta = rope.get("rope_theta", given.get("rope_theta", 10000.0))
    if given.get("partial_rotary_factor", 1) != 1 or rope.get("partial_rotary_factor", 1) != 1:
        raise CheckpointError(f"{path} turns only a part of each head (partial_rotary_factor), which is not done here")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if strange := set(rope) - ROPE_KEYS:
        raise CheckpointError(f"{path} sets {min(strange)!r:.60} of its RoPE scaling, which is not known")
    try:
        return theta, _scaling(kind, rope, given, path)
    except ValueError as error:
        raise CheckpointError(f"{path} scales positions in a way that cannot be followed: {error}") from None


def _scaling(kind: Any, rope: dict[str, Any], given: dict[str, Any], path: Path) -> RopeScaling:
    trained = _whole(given, "max_position_embeddings", path)
    if kind == "linear":
        return RopeScaling("linear", rope.get("factor"))  # type: ignore[arg-type]  # it checks what it is given
    if kind == "dynamic":
        return RopeScaling("dynamic", rope.get("factor"), trained)  # type: ignore[arg-type]  # as above
    original = rope.get("original_max_position_embeddings", given.get("original_max_position_embeddings", trained))
    if kind == "llama3":
        turns = {name: rope.get(name, RopeScaling.__dataclass_fields__[name].default) for name in _TURNS}
        return RopeScaling("llama3", rope.get("factor"), original, **turns)  # type: ignore[arg-type]  # as above
    if kind != "yarn":
        raise ValueError(f"{shown(kind)} is none of linear, dynamic, yarn and llama3")
    scaling = RopeScaling("yarn", rope.get("factor") or trained / original, original,
                          beta_fast=rope.get("beta_fast") or 32, beta_slow=rope.get("beta_slow") or 1,
                          truncate=rope.get("truncate", True))  # fmt: skip
    return replace(scaling, attention_factor=rope.get("attention_factor") or _yarn_length(scaling.factor, rope))


def _yarn_length(factor: float, rope: dict[str, Any]) -> float:
    """By how much queries and keys become longer, where the file does not say (transformers' rule)."""

    def length(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1 if factor > 1 else 1.0

    scale, of_all = rope.get("mscale"), rope.get("mscale_all_dim")
    if scale and of_all:
        return length(_number(scale, "mscale")) / length(_number(of_all, "mscale_all_dim"))
    return length(1)


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e9:
        raise ValueError(f"{name}={value!r:.40}: expected a positive number")
    return float(value)


def _whole(given: dict[str, Any], name: str, path: Path) -> int:
    value = given[name]
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
        raise CheckpointError(f"{path} sets {name}={shown(value)}: expected a number of tokens")
    return value


def _window(given: dict[str, Any], kind: str, path: Path) -> int | None:
    """How far attention looks back, if not to the beginning."""
    used = given.get("use_sliding_window", False) if kind == "qwen2" else kind == "mistral"
    return _whole(given, "sliding_window", path) if used and given.get("sliding_window") is not None else None


def _generation(folder: Path) -> dict[str, Any]:
    """generation_config.json, which a folder need not have."""
    path = folder / "generation_config.json"
    return read_object(path, "remove it, or get the one that came with these weights") if path.is_file() else {}


def end_ids(folder: Path) -> tuple[int, ...]:
    """The tokens that end a text, by generation_config.json in a folder; none where there is no such file."""
    return _end_ids([_generation(folder)], folder / "generation_config.json")


def _end_ids(sources: Iterable[dict[str, Any]], path: Path) -> tuple[int, ...]:
    found: dict[int, None] = {}
    for source in sources:
        value = source.get("eos_token_id")
        for token in value if isinstance(value, list) else [] if value is None else [value]:
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < 2**31:
                raise CheckpointError(f"{path} sets eos_token_id={shown(value)}:"
                                      " expected a token, or a list of tokens")  # fmt: skip
            found[token] = None
    return tuple(found)
