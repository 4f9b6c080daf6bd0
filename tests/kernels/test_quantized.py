"""Products with packed weights: every variant of the kernels against plain arithmetic."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from checkpoints import unpacked
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llama.kernels import dispatch, library, quantized
from llama.quantization.quantize import DEQUANTIZE, QUANTIZE

BEST = library.VARIANTS[library.load()[0].llama_variant()] if library.load()[0] else None
VARIANTS = library.VARIANTS[: library.VARIANTS.index(BEST) + 1] if BEST else ()
needs_kernels = pytest.mark.skipif(not library.load()[0], reason=f"{dispatch.why_not(torch.device('cpu'))}")
# int8 activations with a scale for each 32 numbers: half a step of 127, and bfloat16's 8 bits.
TOLERANCE = {torch.float32: 0.012, torch.bfloat16: 0.012}


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(quantized, "variant", lambda: library.VARIANTS.index(request.param))
    return request.param


@contextmanager
def threads_set(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def product(x: Tensor, q: Tensor, scales: Tensor | None) -> Tensor:
    return quantized.packed_product(x, *quantized.pack(q, scales), len(q))


def reference(x: Tensor, q: Tensor, scales: Tensor, name: str) -> Tensor:
    return x.double() @ DEQUANTIZE[name](q, scales).double().T


def error(y: Tensor, expected: Tensor) -> float:
    return ((y.double() - expected).norm() / expected.norm()).item()


@needs_kernels
@pytest.mark.parametrize("n", [1, 4, 16, 40, 130])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_integer_of_eight_bits_is_a_weight(variant: str, dtype: torch.dtype, n: int) -> None:
    """Also -128, which we write nowhere, and files of others may have: alone, among others, under the same signs."""
    generator = torch.Generator().manual_seed(2)
    q = torch.randint(-128, 128, (48, 128), dtype=torch.int8, generator=generator)
    q[:16], q[16:32] = -128, torch.where(q[16:32] < 0, -128, 127)
    scales = torch.rand(48, 4, generator=generator).half()
    for x in (torch.randn(n, 128, generator=generator), torch.ones(n, 128), -torch.ones(n, 128)):
        found = product(x.to(dtype), q, scales)
        assert error(found, reference(x.to(dtype), q, scales, "int8")) < TOLERANCE[dtype]


@needs_kernels
@pytest.mark.parametrize("name", ["int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_shape_agrees_with_plain_arithmetic(variant: str, name: str, dtype: torch.dtype) -> None:
    """Odd numbers of rows and outputs, one run of inputs and many, whole blocks and half ones."""
    generator = torch.Generator().manual_seed(1)
    for outputs, inputs in ((1, 32), (3, 64), (17, 96), (64, 448), (130, 1056)):
        q, scales = QUANTIZE[name](torch.randn(outputs, inputs, generator=generator))
        for n in (1, 2, 3, 4, 5, 8, 9, 16, 17, 40, 65, 130):
            x = torch.randn(n, inputs, generator=generator).to(dtype)
            y = product(x, q, scales)
            assert y.shape == (n, outputs) and y.dtype == dtype
            assert error(y, reference(x, q, scales, name)) < TOLERANCE[dtype] * (3 if inputs == 32 else 1), (n, outputs)


@needs_kernels
@given(
    st.integers(1, 70), st.integers(1, 40), st.integers(1, 12), st.sampled_from(["int8", "int4"]), st.booleans(),
    st.integers(1, 3), st.integers(0, 2**31),
)  # fmt: skip
@settings(deadline=None, max_examples=60)
def test_random_shapes_agree(
    n: int, outputs: int, runs: int, name: str, half: bool, threads: int, seed: int
) -> None:  # fmt: skip
    """With integers for weights and x that every variant holds exactly, results are exact but for float32 sums."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(-7, 8, (outputs, runs * 32), generator=generator).float()
    weight[:, ::32] = -8 if name == "int4" else 127
    x = torch.randint(-100, 101, (n, runs * 32), generator=generator).float()
    x[:, ::32] = 127
    x = x.bfloat16() if half else x
    q, scales = QUANTIZE[name](weight)
    assert DEQUANTIZE[name](q, scales).equal(weight)
    with threads_set(threads):
        y = product(x, q, scales)
    expected = reference(x, q, scales, name)
    size = x.double().abs() @ weight.double().abs().T
    assert ((y.double() - expected).abs() <= size * (2**-8 if half else 1e-5)).all()


@needs_kernels
@pytest.mark.parametrize("name", ["int8", "int4"])
def test_results_depend_on_neither_threads_nor_neighbours(variant: str, name: str) -> None:
    """To the bit: rows of x computed together with others of the same kernel, on any number of threads."""
    q, scales = QUANTIZE[name](torch.randn(83, 160))
    for dtype, sizes in (
        (torch.float32, (1, 2, 5, 8)),
        (torch.bfloat16, (1, 3, 8) if variant == "portable" else (1, 3, 8, 13)),
        (torch.bfloat16, (1, 8) if variant == "portable" else (17, 31, 40)),
    ):
        x = torch.randn(40, 160).to(dtype)
        whole = product(x[: sizes[-1]], q, scales)
        for n in sizes:
            assert product(x[:n], q, scales).equal(whole[:n])
        for threads in (1, 2, 3, 5):
            with threads_set(threads):
                assert product(x[: sizes[-1]], q, scales).equal(whole)


@pytest.mark.skipif(BEST != "amx", reason="bfloat16 weights are packed where there are tiles for them")
@given(st.integers(1, 600), st.integers(1, 90), st.integers(1, 12), st.integers(1, 3), st.integers(0, 2**31))
@settings(deadline=None, max_examples=40)
def test_bfloat16_weights_agree_too(n: int, outputs: int, runs: int, threads: int, seed: int) -> None:
    """Sums of products of small integers are exact in float32, in whatever order."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(-7, 8, (outputs, runs * 32), generator=generator).bfloat16()
    x = torch.randint(-100, 101, (n, runs * 32), generator=generator).bfloat16()
    with threads_set(threads):
        y = product(x, weight, None)
    assert y.equal((x.float() @ weight.float().T).bfloat16())


@pytest.mark.skipif(BEST != "amx", reason="bfloat16 weights are packed where there are tiles for them")
@pytest.mark.parametrize("n", [1, 2, 5, 40])
def test_what_is_not_finite_stays_in_its_row_of_bfloat16(n: int) -> None:
    weight, x = torch.randn(50, 96).bfloat16(), torch.randn(n, 96).bfloat16()
    for bad in (float("nan"), float("inf"), 3e38):
        broken = x.clone()
        broken[n - 1, 70] = bad
        y = product(broken, weight, None)
        assert y[: n - 1].equal(product(x, weight, None)[: n - 1])
        assert torch.allclose(y[-1:].float(), (broken[-1:].double() @ weight.double().T).float(), 0.01, equal_nan=True)


@needs_kernels
@pytest.mark.parametrize("name", ["int8", "int4", "bfloat16"])
def test_packed_weights_are_the_same_weights(name: str) -> None:
    """Rows 16 at a time, of each run four bytes of every row side by side; missing rows are zeros."""
    weight = torch.randint(-128, 128, (21, 96)).to(torch.int8)
    if name == "int4":
        weight = weight[:, :48].contiguous().view(torch.uint8)
    if name == "bfloat16":
        weight = weight.bfloat16()
    scales = torch.rand(21, 3).half()
    packed, own = quantized.pack(weight, scales)
    assert packed.dtype == weight.dtype and quantized.is_packed(packed)
    rows = unpacked(packed)
    assert rows[:21].equal(weight) and not rows[21:].any()
    assert own.transpose(1, 2).flatten(0, 1)[:21].equal(scales)


@needs_kernels
@pytest.mark.parametrize("name", ["int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_extreme_activations(variant: str, name: str, dtype: torch.dtype) -> None:
    """Zeros, tiny and huge numbers; what is not finite is not finite afterwards, in its own row only."""
    q, scales = QUANTIZE[name](torch.randn(20, 96))
    x = torch.zeros(5, 96).to(dtype)
    x[1], x[2], x[3] = 1e-38, 1e30, torch.randn(96).to(dtype)
    x[4, 50] = 3e4
    y = product(x, q, scales)
    assert (y[0] == 0).all() and y.isfinite().all()
    assert error(y[2], reference(x[2:3], q, scales, name)[0]) < 0.03
    assert error(y[4], reference(x[4:], q, scales, name)[0]) < 0.03
    for bad in (float("nan"), float("inf"), -float("inf")):
        broken = x.clone()
        broken[3, 70] = bad
        y = product(broken, q, scales)
        assert not y[3].isfinite().any() and y[[0, 1, 2, 4]].isfinite().all()


@needs_kernels
@pytest.mark.parametrize("name", ["int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dequantised_weights_are_those_of_plain_arithmetic(variant: str, name: str, dtype: torch.dtype) -> None:
    q, scales = QUANTIZE[name](torch.randn(9, 224) * 3)
    assert quantized.dequantize(*quantized.pack(q, scales), 9, dtype).equal(DEQUANTIZE[name](q, scales, dtype))


@needs_kernels
@pytest.mark.parametrize("name", ["int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("exponent", [-40, -24, -16, 0, 16, 60])
def test_quantised_weights_are_those_of_plain_arithmetic(
    variant: str, name: str, dtype: torch.dtype, exponent: int
) -> None:
    """Of every size, those that scales cannot reach too. Where scales of int4 err alike, roundings choose."""
    weight = (torch.randn(37, 4096) * 2.0**exponent).to(dtype)
    weight[3] = 0
    (q, scales), (expected, expected_scales) = quantized.quantize(weight, name), QUANTIZE[name](weight)
    assert (q.dtype, q.shape, scales.dtype, scales.shape) == (
        expected.dtype, expected.shape, torch.float16, expected_scales.shape,
    )  # fmt: skip
    same = (scales == expected_scales).repeat_interleave(q.shape[1] // scales.shape[1], dim=1)
    assert same.float().mean() > 0.99
    assert (q[same].int() - expected[same].int()).count_nonzero() <= 1e-4 * q.numel()
    found, plain = (DEQUANTIZE[name](*pair) - weight.float() for pair in ((q, scales), (expected, expected_scales)))
    assert found.double().norm() <= plain.double().norm() * 1.00001


@pytest.mark.parametrize("name", ["int8", "int4"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite_is_not_hidden(name: str, bad: float) -> None:
    """Its scale is NaN, and those of the other runs are not, in the kernels as in plain arithmetic."""
    weight = torch.randn(3, 96)
    weight[1, 40] = bad
    expected = torch.zeros(3, 3, dtype=torch.bool)
    expected[1, 1] = True
    for quantize in (QUANTIZE[name], lambda weight: quantized.quantize(weight, name)):
        assert quantize(weight)[1].isnan().equal(expected)


@needs_kernels
def test_there_is_one_pool_of_threads() -> None:
    """PyTorch's OpenMP runs the kernels too: no second one is loaded."""
    code = (
        "import re, torch\nfrom llama.kernels import quantized\nfrom llama.quantization.quantize import quantize_int8\n"
        "torch.randn(4096, 512) @ torch.randn(512, 512)\n"
        "quantized.packed_product(torch.randn(1, 512), *quantized.pack(*quantize_int8(torch.randn(512, 512))), 512)\n"
        "maps = open('/proc/self/maps').read()\n"
        "print(len({line.split()[-1] for line in maps.splitlines() if re.search(r'lib(g|i)?omp', line)}))\n"
    )
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert out.stdout == "1\n"


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_without_the_kernels_pytorch_computes_the_same(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """And what is missing is said."""
    monkeypatch.setattr(dispatch, "load", lambda: (None, "no compiler"))
    q, scales = QUANTIZE[name](torch.randn(50, 96))
    assert not quantized.can_pack(q, torch.float32)
    for n in (1, 20):
        x = torch.randn(n, 96)
        y = quantized.packed_product(x, q, scales, 50)
        assert error(y, reference(x, q, scales, name)) < 1e-5
    assert (
        dispatch.why_not(torch.device("cpu"))
        == "no compiled kernels (no compiler): PyTorch's operators are used, which are slower"
    )
