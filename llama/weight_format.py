"""How quantised matrices are stored: which they are, and the shapes and bytes of their integers and scales.

A matrix (outputs, inputs) named X.weight becomes integers X.weight and scales X.scales (outputs, inputs / group), in
float16: each run of `group` inputs of a row has its own scale. int8: (outputs, inputs) int8; int4: two a byte,
(outputs, inputs / 2) uint8. Embeddings and norms stay as they are; the output layer is int8 in either, which measures
harmless (benchmarks/RESULTS.md).
"""

from dataclasses import dataclass

from llama.errors import CheckpointError, ParameterError
from llama.resharding import SPLIT_AXIS, split_axis

SCALE_BYTES = 2
KEPT = {"tok_embeddings", "norm", "attention_norm", "ffn_norm"}


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


def format_of(name: str, quantize: str | None) -> str | None:
    """The format of a parameter, by its checkpoint name, in a checkpoint quantised as `quantize`; None: as it is."""
    kind = name.split(".")[-2]
    if quantize is None or kind in KEPT:
        return None
    assert kind in SPLIT_AXIS
    return "int8" if kind == "output" else quantize


def scales_of(name: str) -> str:
    """The name of a matrix's scales: layers.0.attention.wq.weight → layers.0.attention.wq.scales."""
    return name.removesuffix("weight") + "scales"


def quantized_shapes(shapes: dict[str, tuple[int, ...]], quantize: str | None) -> dict[str, tuple[int, ...]]:
    """Name → whole shape of every tensor on disk, from those of the parameters."""
    if quantize is None:
        return shapes
    stored: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        if form := format_of(name, quantize):
            stored[name], stored[scales_of(name)] = FORMATS[form].shapes(*shape)
        else:
            stored[name] = shape
    return stored


def check_groups(shapes: dict[str, tuple[int, ...]], quantize: str | None, processes: int) -> None:
    """Raise CheckpointError unless each process's part of every matrix is made of whole groups."""
    for name, shape in shapes.items():
        if form := format_of(name, quantize):
            group = FORMATS[form].group
            inputs = shape[1] // processes if split_axis(name) == 1 else shape[1]
            if inputs % group:
                raise CheckpointError(
                    f"{name} has {inputs} inputs in each of {processes} processes, but {quantize} needs a multiple of"
                    f" {group}: run it without quantize, or on fewer processes"
                )
