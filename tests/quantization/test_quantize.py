"""Weights → integers and scales, and back."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llama.quantization.quantize import DEQUANTIZE, QUANTIZE, dequantize_int4, quantize_int4, quantize_int8


def round_trip(name: str, weight: torch.Tensor) -> torch.Tensor:
    q, scales = QUANTIZE[name](weight)
    assert scales.dtype == torch.float16 and scales.isfinite().all() and (scales != 0).all()
    return DEQUANTIZE[name](q, scales)


def test_four_numbers_worked_out_by_hand() -> None:
    """A group whose largest is 127 has scale 1 in int8; one whose largest is −8 has scale 1 in int4."""
    weight = torch.zeros(1, 32)
    weight[0, :4] = torch.tensor([127.0, -1.0, 2.4, -126.6])
    q, scales = quantize_int8(weight)
    assert scales.tolist() == [[1.0]] and q[0, :5].tolist() == [127, -1, 2, -127, 0]
    weight[0, :4] = torch.tensor([-8.0, 7.0, 1.0, -3.0])
    weight[0, 16] = 5
    packed, scales = quantize_int4(weight)
    assert scales.tolist() == [[1.0]]
    assert packed[0, :4].tolist() == [0 + (5 + 8) * 16, 15 + 8 * 16, 9 + 8 * 16, 5 + 8 * 16]
    assert dequantize_int4(packed, scales).equal(weight)


@given(st.integers(1, 5), st.integers(1, 4), st.floats(-20, 3), st.integers(0, 2**31))
@settings(deadline=None)
def test_what_comes_back_is_near(rows: int, groups: int, exponent: float, seed: int) -> None:
    """Within half a step of the group's scale in int8; in int4 within one of a range of 15 steps."""
    weight = torch.randn(rows, groups * 32, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    largest = weight.unflatten(1, (-1, 32)).abs().amax(-1).repeat_interleave(32, 1)
    smallest = 2.0**-24
    assert ((round_trip("int8", weight) - weight).abs() <= largest / 127 * 0.51 + smallest * 64).all()
    assert ((round_trip("int4", weight) - weight).abs() <= largest * 0.26 + smallest * 8).all()


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_extreme_weights_stay_finite(name: str) -> None:
    """Zeros are exact; what is beyond float16's scales is cut, not infinite."""
    assert round_trip(name, torch.zeros(2, 64)).equal(torch.zeros(2, 64))
    for size in (1e-30, 1e-7, 1e4, 1e30):
        assert round_trip(name, torch.full((1, 32), size)).isfinite().all()
    exact = torch.full((3, 32), -0.5)
    assert (round_trip(name, exact) - exact).abs().max() < 1e-3


def test_rows_do_not_depend_on_what_is_quantised_with_them(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(7, 64)
    whole = [quantize(weight) for quantize in QUANTIZE.values()]
    monkeypatch.setattr("llama.quantization.quantize.ROWS", 64)
    for (q, scales), quantize in zip(whole, QUANTIZE.values(), strict=True):
        parts = quantize(weight)
        assert parts[0].equal(q) and parts[1].equal(scales)


def test_the_search_for_scales_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clipping the largest weight of a group can place the others better: the squared error is smaller."""
    weight = torch.randn(64, 256)
    searched = (round_trip("int4", weight) - weight).square().mean()
    monkeypatch.setattr("llama.quantization.quantize.STRETCHES", (1.0,))
    plain = (round_trip("int4", weight) - weight).square().mean()
    assert searched < 0.97 * plain
