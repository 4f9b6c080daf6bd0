"""`params.json`: a checkpoint's sizes, read into `ModelArgs`; what would change the mathematics is refused."""

import json
import math
from pathlib import Path
from typing import Any

from llama.errors import CheckpointError
from llama.model import ModelArgs
from llama.weight_format import FORMATS

_POSITIVE_INTS = ("dim", "n_layers", "n_heads", "n_kv_heads", "multiple_of")
_POSITIVE_NUMBERS = ("norm_eps", "rope_theta", "ffn_dim_multiplier")
_OPTIONAL = ("n_kv_heads", "ffn_dim_multiplier")
# Keys that say something about the files or the run, never about the mathematics.
HARMLESS = {
    "max_seq_len", "max_batch_size", "kv_dtype", "model_parallel_size", "name", "model_name", "description", "version",
    "license", "_comment", "comment", "dtype", "torch_dtype",
}  # fmt: skip


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
                f"{path} sets {key}={json.dumps(value)}, which Llama-2 does not have: this is a checkpoint of another"
                " model, and running it as Llama-2 would give wrong text"
            )
    missing = [key for key in ("dim", "n_layers", "n_heads") if key not in given]
    if missing:
        raise CheckpointError(f"{path} lacks {', '.join(missing)}: get the params.json that came with these weights")
    args = ModelArgs(**{key: value for key, value in given.items() if key not in ignored})
    _check(args, path)
    return args, ignored


def _read_object(path: Path) -> dict[str, Any]:
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: get the params.json that came with these weights") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON ({error}): get the params.json that came with the weights") from None
    if not isinstance(given, dict):
        raise CheckpointError(f"{path} holds a JSON {type(given).__name__}, not an object with the model's sizes")
    return given


def _check(args: ModelArgs, path: Path) -> None:
    if args.quantize is not None and args.quantize not in FORMATS:
        raise CheckpointError(f"{path} sets quantize={args.quantize!r}: expected {' or '.join(FORMATS)}")
    for name in (*_POSITIVE_INTS, *_POSITIVE_NUMBERS, "vocab_size"):
        value = getattr(args, name)
        if value is None and name in _OPTIONAL:
            continue
        whole = name in (*_POSITIVE_INTS, "vocab_size")
        if (name, value) != ("vocab_size", -1) and not _is_positive(value, whole):
            raise CheckpointError(
                f"{path} sets {name}={value!r}: expected a positive {'integer' if whole else 'number'}"
            )
    if args.dim % args.n_heads or args.head_dim % 2:
        raise CheckpointError(f"{path}: dim={args.dim} does not split into n_heads={args.n_heads} heads of even size")
    if args.n_heads % args.kv_heads:
        raise CheckpointError(f"{path}: n_heads={args.n_heads} is not a multiple of n_kv_heads={args.kv_heads}")


def _is_positive(value: Any, whole: bool) -> bool:
    kind = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
    return kind and math.isfinite(value) and value > 0
