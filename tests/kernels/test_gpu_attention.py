"""Attention of single queries on CUDA: our Triton kernel against plain arithmetic."""

from types import ModuleType

import pytest
import torch
from caches import view
from emulation import DEVICE, HALF, TOLERANCE, error, gpu, gpu_path
from reference import naive

from llama.model.attention import SDPA, GatheredRows, Together, plan
from llama.model.kv_cache import KVCache
from llama.model.step import Step

__all__ = ["gpu", "gpu_path"]


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(("kv_heads", "group", "head_dim"), [(2, 1, 24), (1, 8, 64), (2, 3, 128)])
@pytest.mark.parametrize("float8", [False, True])
def test_attention_agrees_with_plain_arithmetic(
    gpu: ModuleType, dtype: torch.dtype, kv_heads: int, group: int, head_dim: int, float8: bool
) -> None:
    """Lengths of one position, of a whole split, of several and a part; slots in any order, and empty ones between."""
    if float8 and DEVICE.type == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no float8")
    cache = KVCache(1, kv_heads, 4, 600, head_dim, dtype, torch.device("cpu"), float8)
    for tensor in (cache.keys[0], cache.values[0]):
        tensor.copy_(torch.randn(tensor.shape))
    slots, positions = torch.tensor([3, 0, 2]), torch.tensor([0, 255, 580])
    q = torch.randn(3, kv_heads * group, head_dim).to(dtype)
    found = gpu.attend(*(t.to(DEVICE) for t in (q, cache.keys[0], cache.values[0], slots, positions)))
    for i, (slot, position) in enumerate(zip(slots.tolist(), positions.tolist(), strict=True)):
        keys, values = (t.float().transpose(0, 1) for t in view(cache, 0, slot, position + 1))
        assert error(found[i : i + 1], naive(q[i : i + 1].float(), keys, values, position)) < TOLERANCE[dtype]


@pytest.mark.parametrize("float8", [False, True])
def test_single_tokens_among_prompts_go_through_them(gpu_path: None, float8: bool) -> None:
    """Where the flash kernel cannot read the cache: prompts are left to PyTorch, single tokens go in one call."""
    cache = KVCache(1, 2, 6, 40, 16, torch.float16, torch.device("cpu"), float8)
    for tensor in (cache.keys[0], cache.values[0]):
        tensor.copy_(torch.randn(tensor.shape))
    spans = [(4, 9, 1), (0, 0, 5), (2, 30, 1), (5, 3, 4), (1, 0, 1)]
    step = Step.pack([(slot, start, [5] * n) for slot, start, n in spans], [], torch.device("cpu"))
    how = plan(step, cache)
    assert isinstance(how, Together)
    singles, sdpa = how.plans
    assert isinstance(sdpa, SDPA) and [span.slot for span in sdpa.spans] == [0, 5]
    assert isinstance(singles, GatheredRows)
    assert singles.rows.tolist() == [0, 6, 11] and singles.plan.slots.tolist() == [4, 2, 1]
    q = torch.randn(len(step.tokens), 4, 16).half()
    found = how(q, cache.keys[0], cache.values[0])
    for span in step.spans:
        keys, values = (t.float().transpose(0, 1) for t in view(cache, 0, span.slot, span.length))
        assert error(found[span.rows], naive(q[span.rows].float(), keys, values, span.start)) < 2e-3
