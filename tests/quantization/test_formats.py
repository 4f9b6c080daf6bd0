"""Which matrices are quantised, and how large they are then."""

import pytest

from llama.checkpoint.layout import check_groups, format_of, quantized_shapes, scales_of
from llama.errors import CheckpointError, ParameterError
from llama.quantization.formats import FORMATS, check_format

SHAPES = {"tok_embeddings.weight": (100, 64), "layers.0.attention.wo.weight": (64, 96), "norm.weight": (64,)}


def test_matrices_of_the_layers_become_integers_and_scales() -> None:
    stored = quantized_shapes(SHAPES, "int4")
    assert stored == {
        "tok_embeddings.weight": (100, 64), "layers.0.attention.wo.weight": (64, 48),
        "layers.0.attention.wo.scales": (64, 3), "norm.weight": (64,),
    }  # fmt: skip
    assert quantized_shapes(SHAPES, "int8")["layers.0.attention.wo.weight"] == (64, 96)
    assert quantized_shapes(SHAPES, None) == SHAPES
    assert format_of("layers.0.ffn_norm.weight", "int4") is None and format_of("output.weight", None) is None
    assert format_of("output.weight", "int4") == "int8"
    name = "layers.0.feed_forward.w2.weight"
    assert format_of(name, "int4") == format_of(scales_of(name), "int4") == "int4"


def test_bytes_of_a_weight() -> None:
    """8.5 bits and 4.5 bits."""
    assert FORMATS["int8"].nbytes(3200) == 3400 and FORMATS["int4"].nbytes(3200) == 1800


def test_parts_are_made_of_whole_groups() -> None:
    check_groups(SHAPES, "int8", 1)
    check_groups(SHAPES, None, 7)
    with pytest.raises(
        CheckpointError, match=r"wo\.weight has 48 inputs in each of 2 processes, but int4 needs a multi"
    ):
        check_groups(SHAPES, "int4", 2)
    with pytest.raises(ParameterError, match="quantize='fp8' is not a format: use int8 or int4, or leave it out"):
        check_format("fp8")
