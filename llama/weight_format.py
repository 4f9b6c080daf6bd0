"""How quantised matrices are stored: which they are, and the shapes and bytes of their integers and scales.

A matrix (outputs, inputs) named X.weight becomes integers X.weight and scales X.scales (outputs, inputs / group), in
float16: each run of `group` inputs of a row has its own scale. int8: (outputs, inputs) int8; int4: two a byte,
(outputs, inputs / 2) uint8. Embeddings and norms stay as they are, and so does the output layer.
"""

from dataclasses import dataclass

from llama.errors import CheckpointError, ParameterError
from llama.resharding import SPLIT_AXIS, split_axis

SCALE_BYTES = 2
MATRICES = frozenset(SPLIT_AXIS) - {"tok_embeddings", "output", "norm", "attention_norm", "ffn_norm"}


@dataclass(frozen=True, slots=True)
class WeightFormat:
    """`group` inputs share a scale; a byte holds `per_byte` of them."""

    group: int
    per_byte: int
    dtype: str  # of the integers, torch's name

    def shapes(self, outputs: int, inputs: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """The shapes of a matrix's integers and of its scales."""
        return (outputs, inputs // self.per_byte), (outputs, inputs // self.group)

    def nbytes(self, weights: int) -> int:
        """The bytes of so many weights with their scales."""
        return weights // self.per_byte + weights // self.group * SCALE_BYTES


FORMATS = {"int8": WeightFormat(group=32, per_byte=1, dtype="int8"), "int4": WeightFormat(32, 2, "uint8")}


def check_format(quantize: str | None) -> None:
    """Raise ParameterError unless it is the name of a format, or None."""
    if quantize is not None and quantize not in FORMATS:
        raise ParameterError(f"quantize={quantize!r} is not a format: use {' or '.join(FORMATS)}, or leave it out")


def is_matrix(name: str) -> bool:
    """Whether a parameter, by its checkpoint name, is one of those that are quantised."""
    return name.split(".")[-2] in MATRICES


def scales_of(name: str) -> str:
    """The name of a matrix's scales: layers.0.attention.wq.weight → layers.0.attention.wq.scales."""
    return name.removesuffix("weight") + "scales"


def quantized_shapes(shapes: dict[str, tuple[int, ...]], quantize: str | None) -> dict[str, tuple[int, ...]]:
    """Name → whole shape of every tensor on disk, from those of the parameters."""
    if quantize is None:
        return shapes
    stored: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        if is_matrix(name):
            stored[name], stored[scales_of(name)] = FORMATS[quantize].shapes(*shape)
        else:
            stored[name] = shape
    return stored


def check_groups(shapes: dict[str, tuple[int, ...]], quantize: str | None, processes: int) -> None:
    """Raise CheckpointError unless each process's part of every matrix is made of whole groups."""
    if quantize is None:
        return
    group = FORMATS[quantize].group
    for name, shape in shapes.items():
        if is_matrix(name):
            inputs = shape[1] // processes if split_axis(name) == 1 else shape[1]
            if inputs % group:
                raise CheckpointError(
                    f"{name} has {inputs} inputs in each of {processes} processes, but {quantize} needs a multiple of"
                    f" {group}: run it without quantize, or on fewer processes"
                )
