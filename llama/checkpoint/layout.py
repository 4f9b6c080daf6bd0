"""What a checkpoint consists of: the name, whole shape, split axis and format of every tensor, as Meta names them.

Opening, filling, the estimate of memory, `info` and the writer all ask here.
"""

import math
from collections.abc import Mapping

import torch

from llama.checkpoint.resharding import possible_sizes
from llama.errors import CheckpointError, DeviceError
from llama.model.args import ModelArgs
from llama.quantization.formats import FORMATS
from llama.wording import either

# The matrices that are joined while they are read, in the order of their rows.
JOINED = {"wqkv": ("wq", "wk", "wv"), "w13": ("w1", "w3")}
IGNORED = {"rope.freqs"}  # old files carry the RoPE frequencies, which are computed here

EMBEDDING, OUTPUT = "tok_embeddings.weight", "output.weight"
NEVER_QUANTIZED = {"tok_embeddings", "norm", "attention_norm", "ffn_norm"}

SCALE_DTYPE = torch.float16

Shapes = dict[str, tuple[int, ...]]  # by name

BIASED = ("wq", "wk", "wv", "wo", "w1", "w2", "w3")  # what may have a bias

# The axis along which Meta's model parallelism splits each weight; None: every process has it whole.
SPLIT_AXIS = {
    "tok_embeddings": 1, "output": 0, "norm": None, "attention_norm": None, "ffn_norm": None,
    "wq": 0, "wk": 0, "wv": 0, "wo": 1, "w1": 0, "w2": 1, "w3": 0,
}  # fmt: skip


def split_axis(name: str) -> int | None:
    """The axis of a parameter, or of a quantised one's scales, by its name ("layers.0.attention.wq.weight" → 0).

    Raises CheckpointError for a name that Llama-2 does not have: how it is split cannot be guessed.
    """
    parts = name.split(".")
    known = len(parts) > 1 and parts[-2] in SPLIT_AXIS and parts[-1] in ("weight", "scales")
    if not (known or (len(parts) > 1 and parts[-2] in BIASED and parts[-1] == "bias")):
        raise CheckpointError(f"{name!r} is not a parameter of Llama-2, so how it is split is not known")
    axis = SPLIT_AXIS[parts[-2]]
    return None if parts[-1] == "bias" and axis == 1 else axis  # such a bias is added to the sum of all parts


def format_of(name: str, quantize: str | None) -> str | None:
    """The format of a parameter, by its checkpoint name, in a checkpoint quantised as `quantize`; None: as it is."""
    *_, kind, leaf = name.split(".")
    if quantize is None or kind in NEVER_QUANTIZED or leaf == "bias":
        return None
    assert kind in SPLIT_AXIS
    return "int8" if kind == "output" else quantize


def scales_of(name: str) -> str:
    """The name of a matrix's scales: layers.0.attention.wq.weight → layers.0.attention.wq.scales."""
    return name.removesuffix("weight") + "scales"


def integer_dtype(weight_format: str) -> torch.dtype:
    """The dtype of the integers that a matrix in this format becomes."""
    dtype: torch.dtype = getattr(torch, FORMATS[weight_format].dtype)
    return dtype


def stored_dtype(name: str, quantize: str | None) -> torch.dtype | None:
    """The dtype of a tensor in a checkpoint quantised as `quantize`; None: any of floating point."""
    weight_format = format_of(name, quantize)
    return integer_dtype(weight_format) if weight_format and name.endswith(".weight") else None


def quantized_shapes(shapes: Shapes, quantize: str | None) -> Shapes:
    """Name → whole shape of every tensor on disk, from those of the parameters."""
    if quantize is None:
        return shapes
    stored: Shapes = {}
    for name, shape in shapes.items():
        if weight_format := format_of(name, quantize):
            rows, columns = shape
            stored[name], stored[scales_of(name)] = FORMATS[weight_format].shapes(rows, columns)
        else:
            stored[name] = shape
    return stored


def check_groups(shapes: Shapes, quantize: str | None, processes: int) -> None:
    """Raise CheckpointError unless each process's part of every matrix is made of whole groups."""
    for name, shape in shapes.items():
        if weight_format := format_of(name, quantize):
            group = FORMATS[weight_format].group
            inputs = shape[1] // processes if split_axis(name) == 1 else shape[1]
            if inputs % group:
                raise CheckpointError(
                    f"{name} has {inputs} inputs in each of {processes} processes, but {quantize} needs a multiple of"
                    f" {group}: run it without quantize, or on fewer processes"
                )


def expected_shapes(args: ModelArgs) -> Shapes:
    """Every parameter's name on disk and its whole shape, before any split."""
    q, kv = args.n_heads * args.head_dim, args.kv_heads * args.head_dim
    layer = {
        "attention.wq": (q, args.dim), "attention.wk": (kv, args.dim), "attention.wv": (kv, args.dim),
        "attention.wo": (args.dim, q), "feed_forward.w1": (args.hidden_dim, args.dim),
        "feed_forward.w2": (args.dim, args.hidden_dim), "feed_forward.w3": (args.hidden_dim, args.dim),
        "attention_norm": (args.dim,), "ffn_norm": (args.dim,),
    }  # fmt: skip
    biases = {
        "attention.wq": q * args.qkv_bias, "attention.wk": kv * args.qkv_bias, "attention.wv": kv * args.qkv_bias,
        "attention.wo": args.dim * args.o_bias, "feed_forward.w1": args.hidden_dim * args.mlp_bias,
        "feed_forward.w2": args.dim * args.mlp_bias, "feed_forward.w3": args.hidden_dim * args.mlp_bias,
    }  # fmt: skip
    shapes: Shapes = {EMBEDDING: (args.vocab_size, args.dim), "norm.weight": (args.dim,),
                      OUTPUT: (args.vocab_size, args.dim)}  # fmt: skip
    for i in range(args.n_layers):
        shapes |= {f"layers.{i}.{name}.weight": shape for name, shape in layer.items()}
        shapes |= {f"layers.{i}.{name}.bias": (length,) for name, length in biases.items() if length}
    return shapes


def stored_shapes(args: ModelArgs) -> Shapes:
    """Every tensor's name on disk and its whole shape: a quantised matrix is two, its integers and its scales."""
    return quantized_shapes(expected_shapes(args), args.quantize)


def shard_shape(name: str, whole: tuple[int, ...], shards: int) -> tuple[int, ...]:
    """The shape of the part of a parameter, of shape `whole`, that one of `shards` shards or processes has."""
    axis = split_axis(name)
    return tuple(length // shards if i == axis else length for i, length in enumerate(whole))


def weight_bytes(
    args: ModelArgs, weight_format: str | None, dtype: torch.dtype, held: torch.dtype, processes: int
) -> dict[str, int]:  # fmt: skip
    """The bytes of one process's share of each part (tok_embeddings, layers.0, …, norm, output): matrices quantised as
    `weight_format` or `held` in a dtype of their own, the others in `dtype`."""
    sizes: dict[str, int] = {}
    for name, whole in expected_shapes(args).items():
        count, own_format = math.prod(shard_shape(name, whole, processes)), format_of(name, weight_format)
        own_dtype = held if format_of(name, "int8") else dtype
        part = ".".join(name.split(".")[: 2 if name.startswith("layers.") else 1])
        size = FORMATS[own_format].nbytes(count) if own_format else count * own_dtype.itemsize
        sizes[part] = sizes.get(part, 0) + size
    return sizes


def renamed(name: str, names: Mapping[str, str], layers: str) -> str:
    """layers.3.attention.wq.weight in another format's words: `names` has those of its stems, `layers` its prefix."""
    stem, _, leaf = name.rpartition(".")
    if not stem.startswith("layers."):
        return f"{names[stem]}.{leaf}"
    _, layer, kind = stem.split(".", 2)
    return f"{layers}.{layer}.{names[kind]}.{leaf}"


def process_counts(args: ModelArgs) -> list[int]:
    """The numbers of processes that the model can be split over, ascending."""
    return possible_sizes(*_split_lengths(args).values())


def _split_lengths(args: ModelArgs) -> dict[str, int]:
    return {"heads": args.n_heads, "kv heads": args.kv_heads, "dim": args.dim, "hidden dim": args.hidden_dim,
            "vocabulary": args.vocab_size}  # fmt: skip


def check_split(args: ModelArgs, shards: int, processes: int, do: str = "start") -> None:
    """Raise DeviceError, which says to `do` with the numbers that would do, unless the model splits so."""
    for name, length in _split_lengths(args).items():
        if length % processes:
            what = f"{length} {name}" if "heads" in name else f"the {name} of {length}"
            counted = f"{shards} shard{'s' if shards > 1 else ''}"
            ways = f"{do} {either(process_counts(args))}"
            raise DeviceError(f"{counted}, but {what} cannot be split over {processes} processes: {ways}")


def stored_names(name: str) -> list[str]:
    """The names on disk that a parameter of the model is joined from, in the order of its rows."""
    for joined, parts in JOINED.items():
        if f".{joined}." in name:
            return [name.replace(joined, part) for part in parts]
    return [name]
