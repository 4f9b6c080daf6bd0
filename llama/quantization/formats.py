"""How quantised matrices are stored: which they are, and the shapes and bytes of their integers and scales.

A matrix (outputs, inputs) named X.weight becomes integers X.weight and scales X.scales (outputs, inputs / group), in
float16: each run of `group` inputs of a row has its own scale. int8: (outputs, inputs) int8; int4: two a byte,
(outputs, inputs / 2) uint8. Embeddings and norms stay as they are; the output layer is int8 in either, which measures
harmless (benchmarks/RESULTS.md).
"""

from dataclasses import dataclass

from llama.errors import ParameterError

SCALE_BYTES = 2


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
