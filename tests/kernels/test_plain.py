"""Products with weights as they are stored: every variant of the kernels against plain arithmetic."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llama.kernels import dispatch, library, plain
from llama.kernels.plain import can_multiply, plain_product
from llama.model.linear import product, product_of_parts

LIBRARY = library.load()[0]
VARIANTS = library.VARIANTS[: LIBRARY.llama_variant() + 1] if LIBRARY else ()
PAIRS = [(torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.float32, torch.float16),
         (torch.bfloat16, torch.bfloat16)]  # fmt: skip
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3}  # bfloat16 has 8 bits
pytestmark = pytest.mark.skipif(LIBRARY is None, reason=f"{dispatch.why_not(torch.device('cpu'))}")


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(plain, "variant", lambda: library.VARIANTS.index(request.param))
    return request.param


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def error(y: Tensor, x: Tensor, weight: Tensor) -> float:
    expected = x.double() @ weight.double().T
    return ((y.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize(("dtype", "stored"), PAIRS, ids=str)
def test_every_shape_agrees_with_plain_arithmetic(variant: str, dtype: torch.dtype, stored: torch.dtype) -> None:
    """Rows in all numbers, fewer outputs than threads and places, inputs that fill no vector."""
    generator = torch.Generator().manual_seed(1)
    for outputs, inputs in ((1, 1), (2, 7), (3, 32), (5, 33), (17, 96), (64, 448), (131, 1055)):
        weight = torch.randn(outputs, inputs, generator=generator).to(stored)
        for n in range(1, 17):
            x = torch.randn(n, inputs, generator=generator).to(dtype)
            y = plain_product(x, weight)
            assert y.shape == (n, outputs) and y.dtype == dtype
            assert error(y, x, weight) < TOLERANCE[dtype], (n, outputs, inputs)


@pytest.mark.parametrize(("dtype", "stored"), PAIRS, ids=str)
@settings(max_examples=20)
@given(n=st.integers(1, 16), outputs=st.integers(1, 70), inputs=st.integers(1, 200), seed=st.integers(0, 2**32))
def test_results_depend_on_neither_threads_nor_neighbours(
    dtype: torch.dtype, stored: torch.dtype, n: int, outputs: int, inputs: int, seed: int
) -> None:
    """To the bit, in each variant: a row alone, among others, on one thread and on three."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=generator).to(stored)
    x = torch.randn(n, inputs, generator=generator).to(dtype)
    before = torch.get_num_threads()
    for name in VARIANTS:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(plain, "variant", lambda name=name: library.VARIANTS.index(name))
            alone = torch.cat([plain_product(x[i : i + 1], weight) for i in range(n)])
            try:
                for count in (1, 3):
                    torch.set_num_threads(count)
                    assert plain_product(x, weight).equal(alone), (name, count)
            finally:
                torch.set_num_threads(before)


@pytest.mark.parametrize(("dtype", "stored"), PAIRS, ids=str)
@settings(max_examples=20)
@given(rows=st.lists(st.integers(0, 40), min_size=1, max_size=5), n=st.sampled_from([1, 2, 5, 16, 17, 30]))
def test_parts_are_one_matrix(dtype: torch.dtype, stored: torch.dtype, rows: list[int], n: int) -> None:
    """To the bit, wherever they lie, whatever their lengths; by PyTorch's operators within rounding."""
    generator = torch.Generator().manual_seed(sum(rows))
    parts = [torch.randn(count + 1, 70, generator=generator).to(stored)[:count] for count in rows]
    x = torch.randn(n, 70, generator=generator).to(dtype)
    for name in VARIANTS:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(plain, "variant", lambda name=name: library.VARIANTS.index(name))
            assert plain_product(x, *parts).equal(plain_product(x, torch.cat(parts))), name
            torch.testing.assert_close(
                product_of_parts(x, parts), product_of_parts(x, [torch.cat(parts)]), atol=2e-1, rtol=2e-2
            )


@pytest.mark.parametrize(("dtype", "stored"), PAIRS, ids=str)
def test_what_is_not_finite_stays_in_its_row(variant: str, dtype: torch.dtype, stored: torch.dtype) -> None:
    """Of x and of W; nothing is read behind a row's end."""
    for inputs in (40, 64):
        weight, x = torch.randn(9, inputs).to(stored), torch.randn(5, inputs).to(dtype)
        for bad in (float("nan"), float("inf"), -float("inf")):
            w, row = weight.clone(), x.clone()
            w[4, inputs - 1], row[3, 0] = bad, bad
            y = plain_product(row, w)
            fine = torch.ones(5, 9, dtype=torch.bool)
            fine[3], fine[:, 4] = False, False
            assert y[fine].isfinite().all() and not y[~fine].isfinite().any()


def test_another_device_is_not_asked_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before each product on a GPU this must cost nothing: no tensor is made there."""
    monkeypatch.setattr(plain, "cpu_library", lambda x: pytest.fail("asked"))
    assert not can_multiply(torch.empty(4, 4, device="meta"), torch.float32, 1)


def test_other_products_are_left_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """More rows, other dtypes; without our kernels all of them, with the same result."""
    weight = torch.randn(48, 64)
    assert can_multiply(weight, torch.float32, plain.most_rows())
    assert not can_multiply(weight, torch.float32, plain.most_rows() + 1)
    assert not can_multiply(weight, torch.bfloat16, 1) and not can_multiply(weight.double(), torch.float32, 1)
    assert not can_multiply(weight.half(), torch.float16, 1)
    x = torch.randn(4, 64)
    ours = product(x, weight, None, 48)
    monkeypatch.setattr(plain, "cpu_library", lambda x: None)
    assert not can_multiply(weight, torch.float32, 1)
    torch.testing.assert_close(product(x, weight, None, 48), ours, atol=1e-5, rtol=1e-5)
