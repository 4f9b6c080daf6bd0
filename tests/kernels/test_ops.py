"""The small operations of a step: our library's and PyTorch's agree."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llama.kernels import dispatch, library, ops
from llama.model.rope import precompute_freqs_cis

LIBRARY = library.load()[0]
VARIANTS = range(LIBRARY.llama_variant() + 1) if LIBRARY else ()
needs_library = pytest.mark.skipif(LIBRARY is None, reason=f"{dispatch.why_not(torch.device('cpu'))}")
BOTH = st.sampled_from([torch.float32, torch.bfloat16])


@pytest.fixture(params=VARIANTS, ids=library.VARIANTS[: len(VARIANTS)])
def variant(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(ops, "variant", lambda: request.param)
    return request.param


def close(found: Tensor, expected: Tensor) -> bool:
    """Equal but for the order of float32 sums, and one step of rounding where the result is bfloat16."""
    tolerance = 2**-7 if found.dtype == torch.bfloat16 else 2e-6
    return torch.allclose(found.double(), expected.double(), rtol=tolerance, atol=tolerance / 4)


def plainly(monkeypatch: pytest.MonkeyPatch, run):  # type: ignore[no-untyped-def]
    """What PyTorch's operators give."""
    with monkeypatch.context() as patch:
        patch.setattr(ops, "cpu_library", lambda x: None)
        return run()


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_norm_and_silu_and_mul_agree(variant: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """For odd sizes, one row and many, on any number of threads."""
    for n, dim in ((1, 8), (3, 17), (7, 192), (300, 448)):
        x, weight = torch.randn(n, dim).to(dtype) * 3, torch.randn(dim).to(dtype)
        normed = ops.rms_norm(x, weight, 1e-5)
        assert close(normed, plainly(monkeypatch, lambda x=x, w=weight: ops.rms_norm(x, w, 1e-5)))
        both = torch.randn(n, 2 * dim).to(dtype) * 4
        assert close(ops.silu_and_mul(both), plainly(monkeypatch, lambda both=both: ops.silu_and_mul(both)))
        for threads in (1, 3):
            before = torch.get_num_threads()
            torch.set_num_threads(threads)
            assert ops.rms_norm(x, weight, 1e-5).equal(normed)
            torch.set_num_threads(before)


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_heads_after_rope_and_stored_ones_agree(
    variant: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Queries come back after RoPE, keys and values go to their places; nothing else of the cache changes."""
    for n, n_heads, kv_heads, head_dim in ((1, 2, 1, 2), (5, 8, 4, 24), (70, 4, 4, 64)):
        heads = torch.randn(n, n_heads + 2 * kv_heads, head_dim).to(dtype)
        freqs_cis = precompute_freqs_cis(head_dim, 90, 10000.0, torch.device("cpu"))[torch.randint(0, 90, (n,))][
            :, None
        ]
        rows = torch.randperm(3 * 40)[:n]
        found, expected = ([torch.full((kv_heads, 3, 40, head_dim), 7.0).to(dtype) for _ in range(2)] for _ in range(2))
        q = ops.rope_and_store(heads, freqs_cis, *found, rows, n_heads)
        plain = plainly(
            monkeypatch, lambda a=(heads, freqs_cis, *expected, rows, n_heads): ops.rope_and_store(*a)
        )  # fmt: skip
        assert q.shape == (n, n_heads, head_dim) and close(q, plain)
        assert close(found[0], expected[0]) and found[1].equal(expected[1])


@needs_library
@given(st.data())
@settings(deadline=None, max_examples=40)
def test_single_queries_attend_as_the_textbook_says(data: st.DataObject) -> None:
    """Any slots and lengths, heads that share keys, rows in any order."""
    kv_heads, group = data.draw(st.sampled_from([(1, 1), (2, 3), (4, 2)]))
    head_dim, dtype = data.draw(st.sampled_from([2, 24, 64, 128, 256])), data.draw(BOTH)
    lengths = data.draw(st.lists(st.integers(1, 33), min_size=1, max_size=4))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    keys, values = (torch.randn(kv_heads, 4, 33, head_dim, generator=generator).to(dtype) for _ in range(2))
    q = torch.randn(6, kv_heads * group, head_dim, generator=generator).to(dtype)
    rows = torch.randperm(6, generator=generator)[: len(lengths)]
    slots = torch.randperm(4, generator=generator)[: len(lengths)]
    out = torch.zeros_like(q)
    ops.attend(q, keys, values, out, rows, slots * 33, torch.tensor(lengths), max(lengths))
    for row, slot, length in zip(rows.tolist(), slots.tolist(), lengths, strict=True):
        for head in range(kv_heads * group):
            seen = keys[head // group, slot, :length].double(), values[head // group, slot, :length].double()
            expected = (seen[0] @ q[row, head].double() / math.sqrt(head_dim)).softmax(0) @ seen[1]
            assert torch.allclose(out[row, head].double(), expected, atol=0.02 if dtype == torch.bfloat16 else 1e-5)
    untouched = [row for row in range(6) if row not in rows.tolist()]
    assert (out[untouched] == 0).all()


@needs_library
def test_numbers_that_are_not_finite_stay_so(variant: int) -> None:
    for bad in (float("nan"), float("inf")):
        x = torch.ones(3, 32)
        x[1, 5] = bad
        normed = ops.rms_norm(x, torch.ones(32), 1e-5)
        assert normed[[0, 2]].isfinite().all() and not normed[1].isfinite().all()
        keys = torch.randn(1, 1, 9, 32)
        values = torch.randn(1, 1, 9, 32)
        out = torch.zeros(3, 1, 32)
        places = torch.arange(3), torch.zeros(3, dtype=torch.int64), torch.full((3,), 9)
        ops.attend(x[:, None].contiguous(), keys, values, out, *places, 9)
        assert out[[0, 2]].isfinite().all() and not out[1].isfinite().all()
