"""`params.json`: a checkpoint's sizes, read into `ModelArgs`; what would change the mathematics is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llama.errors import CheckpointError
from llama.model.args import ModelArgs
from llama.model.rope import RopeScaling, rope_scaling
from llama.paths import read
from llama.quantization.formats import FORMATS

_POSITIVE_INTS = ("dim", "n_layers", "n_heads", "n_kv_heads", "multiple_of", "own_head_dim", "own_hidden_dim")
_POSITIVE_NUMBERS = ("norm_eps", "rope_theta", "ffn_dim_multiplier")
GET = "get the params.json that came with these weights"
_OPTIONAL = ("n_kv_heads", "ffn_dim_multiplier", "own_head_dim", "own_hidden_dim")
_SWITCHES = ("qkv_bias", "o_bias", "mlp_bias")
# Keys that say something about the files or the run, never about the mathematics.
HARMLESS = {
    "max_seq_len", "max_batch_size", "kv_dtype", "model_parallel_size", "name", "model_name", "description", "version",
    "license", "_comment", "comment", "dtype", "torch_dtype",
}  # fmt: skip
_LARGEST = {True: 2**31 - 1, False: 1e38}  # of an integer, of a number: beyond, what is computed from it overflows
_MOST_BYTES = 1 << 20  # of the file; Meta's has a hundred


def read_params(folder: Path) -> tuple[ModelArgs, list[str]]:
    """The sizes, and the keys that were ignored: harmless ones, and switches that are off (false, null or 0).

    Raises CheckpointError where the file is not JSON, lacks a size, or has a key that this model does not follow.
    """
    path = folder / "params.json"
    given = _read_object(path)
    ignored = []
    for key, value in given.items():
        if key in HARMLESS or (key not in ModelArgs.__dataclass_fields__ and not value):
            ignored.append(key)
        elif key not in ModelArgs.__dataclass_fields__:
            raise CheckpointError(
                f"{path} sets {key:.60}={_shown(value, json.dumps)}, which Llama-2 does not have: this is a"
                " checkpoint of another model, and running it as Llama-2 would give wrong text"
            )
    missing = [key for key in ("dim", "n_layers", "n_heads") if key not in given]
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


def _read_object(path: Path) -> dict[str, Any]:
    try:
        given = json.loads(read(path, _MOST_BYTES).decode("utf-8-sig"), object_pairs_hook=_without_doubles)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: {GET}") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}; {GET}") from None
    except UnicodeDecodeError:
        raise CheckpointError(f"{path} is not JSON, which is text in UTF-8: save it so, or {GET}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON ({error!s:.100}): {GET}") from None
    if not isinstance(given, dict):
        raise CheckpointError(f"{path} holds a JSON {type(given).__name__}, not an object with the model's sizes")
    return given


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Which of two values for one key is meant, nobody knows; readers of JSON differ in which they take."""
    given: dict[str, Any] = {}
    for key, value in pairs:
        if key in given:
            raise ValueError(f"{key!r:.60} stands in it twice")
        given[key] = value
    return given


def check_sizes(args: ModelArgs, path: Path) -> None:
    """Raise CheckpointError, which names the file that sets them, unless a model can have these sizes."""
    if args.quantize not in (None, *FORMATS):
        raise CheckpointError(f"{path} sets quantize={_shown(args.quantize)}: expected {' or '.join(FORMATS)}")
    for name in (*_POSITIVE_INTS, *_POSITIVE_NUMBERS, "vocab_size"):
        value = getattr(args, name)
        if value is None and name in _OPTIONAL:
            continue
        whole = name in (*_POSITIVE_INTS, "vocab_size")
        if (name, value) != ("vocab_size", -1) and not _is_positive(value, whole):
            kind = "integer" if whole else "number"
            raise CheckpointError(
                f"{path} sets {name}={_shown(value)}: expected a positive {kind}, at most {_LARGEST[whole]}"
            )
    for name in _SWITCHES:
        if not isinstance(getattr(args, name), bool):
            raise CheckpointError(f"{path} sets {name}={_shown(getattr(args, name))}: expected true or false")
    if not isinstance(args.rope_scaling, RopeScaling | None):
        raise CheckpointError(f"{path} sets rope_scaling={_shown(args.rope_scaling)}: expected an object")
    if (args.own_head_dim is None and args.dim % args.n_heads) or args.head_dim % 2:
        raise CheckpointError(f"{path}: dim={args.dim} does not split into n_heads={args.n_heads} heads of even size")
    if args.n_heads % args.kv_heads:
        raise CheckpointError(f"{path}: n_heads={args.n_heads} is not a multiple of n_kv_heads={args.kv_heads}")


def _shown(value: Any, write: Callable[[Any], str] = repr) -> str:
    """A value as an error quotes it: cut, and what may be nested deeper than can be written is not written."""
    return "{…}" if isinstance(value, dict) else "[…]" if isinstance(value, list) else f"{write(value):.60}"


def _is_positive(value: Any, whole: bool) -> bool:
    kind = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
    return kind and 0 < value <= _LARGEST[whole]  # NaN is neither
