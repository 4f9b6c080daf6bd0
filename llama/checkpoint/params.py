"""`params.json`: a checkpoint's sizes, read into `ModelArgs`; what would change the mathematics is refused."""

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from llama.checkpoint.json_object import read_object, shown
from llama.errors import CheckpointError
from llama.model.args import ModelArgs
from llama.model.rope import RopeScaling, rope_scaling
from llama.quantization.formats import FORMATS

_POSITIVE_INTS = ("dim", "n_layers", "n_heads", "n_kv_heads", "multiple_of", "own_head_dim", "own_hidden_dim")
_POSITIVE_NUMBERS = ("norm_eps", "rope_theta", "ffn_dim_multiplier")
GET = "get the params.json that came with these weights"
_OPTIONAL = ("n_kv_heads", "ffn_dim_multiplier", "own_head_dim", "own_hidden_dim")
_NEEDED = ("dim", "n_layers", "n_heads")
_SWITCHES = ("qkv_bias", "o_bias", "mlp_bias")
# Keys that say something about the files or the run, never about the mathematics.
PADDED = "padded_vocabulary"  # of a checkpoint whose tables may have more rows than its tokenizer has tokens
HARMLESS = {
    PADDED,
    "max_seq_len", "max_batch_size", "kv_dtype", "model_parallel_size", "name", "model_name", "description", "version",
    "license", "_comment", "comment", "dtype", "torch_dtype",
}  # fmt: skip
_LARGEST = {True: 2**31 - 1, False: 1e38}  # of an integer, of a number: beyond, what is computed from it overflows


def read_params(folder: Path) -> tuple[ModelArgs, list[str]]:
    """The sizes, and the keys that were ignored: harmless ones, and switches that are off (false, null or 0).

    Raises CheckpointError where the file is not JSON, lacks a size, or has a key that this model does not follow.
    """
    path = folder / "params.json"
    given = read_object(path, GET)
    ignored = []
    for key, value in given.items():
        if key in HARMLESS or (key not in ModelArgs.__dataclass_fields__ and not value):
            ignored.append(key)
        elif key not in ModelArgs.__dataclass_fields__:
            raise CheckpointError(
                f"{path} sets {key:.60}={shown(value, json.dumps)}, which Llama-2 does not have: this is a"
                " checkpoint of another model, and running it as Llama-2 would give wrong text"
            )
    missing = [key for key in _NEEDED if key not in given]
    if missing:
        raise CheckpointError(f"{path} lacks {', '.join(missing)}: {GET}")
    sizes = {key: value for key, value in given.items() if key not in ignored}
    if isinstance(sizes.get("rope_scaling"), dict):
        try:
            sizes["rope_scaling"] = rope_scaling(sizes["rope_scaling"])
        except ValueError as error:
            raise CheckpointError(f"{path} sets a rope_scaling that cannot be followed: {error}") from None
    args = ModelArgs(**sizes)
    check_sizes(args, path)
    return args, [f"{key:.60}" for key in ignored]


def params_json(args: ModelArgs, *, padded: bool) -> str:
    """What a params.json says of these sizes: those that differ from what is taken where nothing is said."""
    own = {field.name: getattr(args, field.name) for field in fields(ModelArgs) if field.name not in HARMLESS}
    said = {key: value for key, value in own.items() if key in _NEEDED or value != getattr(ModelArgs(), key)}
    if padded:
        said[PADDED] = True
    if args.rope_scaling:
        said["rope_scaling"] = asdict(args.rope_scaling)
    return json.dumps(said, indent=1)


def check_sizes(args: ModelArgs, path: Path) -> None:
    """Raise CheckpointError, which names the file that sets them, unless a model can have these sizes."""
    if args.quantize not in (None, *FORMATS):
        raise CheckpointError(f"{path} sets quantize={shown(args.quantize)}: expected {' or '.join(FORMATS)}")
    for name in (*_POSITIVE_INTS, *_POSITIVE_NUMBERS, "vocab_size"):
        value = getattr(args, name)
        if value is None and name in _OPTIONAL:
            continue
        whole = name in (*_POSITIVE_INTS, "vocab_size")
        if (name, value) != ("vocab_size", -1) and not _is_positive(value, whole):
            kind = "integer" if whole else "number"
            raise CheckpointError(
                f"{path} sets {name}={shown(value)}: expected a positive {kind}, at most {_LARGEST[whole]}"
            )
    for name in _SWITCHES:
        if not isinstance(getattr(args, name), bool):
            raise CheckpointError(f"{path} sets {name}={shown(getattr(args, name))}: expected true or false")
    if not isinstance(args.rope_scaling, RopeScaling | None):
        raise CheckpointError(f"{path} sets rope_scaling={shown(args.rope_scaling)}: expected an object")
    if (args.own_head_dim is None and args.dim % args.n_heads) or args.head_dim % 2:
        raise CheckpointError(f"{path}: dim={args.dim} does not split into n_heads={args.n_heads} heads of even size")
    if args.n_heads % args.kv_heads:
        raise CheckpointError(f"{path}: n_heads={args.n_heads} is not a multiple of n_kv_heads={args.kv_heads}")


def _is_positive(value: Any, whole: bool) -> bool:
    kind = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
    return kind and 0 < value <= _LARGEST[whole]  # NaN is neither
