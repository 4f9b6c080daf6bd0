"""The packed path of CUDA: what the flash kernel is told, over an emulation of it."""

import inspect

import pytest
import torch
from caches import CPU, cache_of, write
from emulation import flash_attention_forward, flash_kernel
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference import naive

from llama.model import flash_attention
from llama.model.attention import plan
from llama.model.flash_attention import FlashAttention
from llama.model.kv_cache import KVCache
from llama.model.step import Step

__all__ = ["flash_kernel"]
WAYS = ["public", "operator"]  # varlen_attn, and what older versions of PyTorch have beneath it


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, flash_kernel: None) -> str:
    if request.param == "operator":
        monkeypatch.setattr(flash_attention, "_varlen_attn", lambda: None)
    elif flash_attention._varlen_attn() is None:
        pytest.skip("varlen_attn takes no lengths in this version of PyTorch")
    return request.param


def test_the_emulation_has_the_operators_signature() -> None:
    schema = torch.ops.aten._flash_attention_forward.default._schema
    own = inspect.signature(flash_attention_forward).parameters
    there = {argument.name: argument for argument in schema.arguments}
    required = [name for name, argument in there.items() if not argument.has_default_value()]
    assert list(there) == list(own)[: len(there)]
    assert required == [name for name, p in own.items() if p.default is inspect.Parameter.empty]
    assert all(
        argument.kwarg_only == (own[name].kind is inspect.Parameter.KEYWORD_ONLY) for name, argument in there.items()
    )


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_call_computes_what_one_call_a_span_does(
    way: str, group: int, dtype: torch.dtype, data: st.DataObject
) -> None:
    """Whole prompts, chunks and single tokens, in any slots and any mixture."""
    kv_heads, head_dim = data.draw(st.sampled_from([1, 3])), 8
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    cache = KVCache(2, kv_heads, 4, 20, head_dim, dtype, CPU)
    slots = data.draw(st.permutations(range(4)))[: data.draw(st.integers(1, 4))]
    longest = data.draw(st.sampled_from([1, 9]))
    spans = [(slot, data.draw(st.integers(0, 10)), data.draw(st.integers(1, longest))) for slot in slots]
    full = {slot: torch.randn(2, start + n, kv_heads, head_dim, generator=g).to(dtype) for slot, start, n in spans}
    for slot, start, n in spans:
        write(cache, cache.rows(torch.full((start + n,), slot), torch.arange(start + n)), full[slot])
    step = Step.pack([(slot, start, [5] * n) for slot, start, n in spans], range(sum(n for *_, n in spans)), CPU)
    assert step.decodes == all(n == 1 for *_, n in spans)
    queries = torch.randn(len(step.tokens), kv_heads * group, head_dim, generator=g).to(dtype)
    made = plan(step, cache)
    assert isinstance(made, FlashAttention)
    out = made(queries, cache.keys[1], cache.values[1])
    for span in step.spans:
        expected = naive(queries[span.rows].float(), *full[span.slot].float(), span.start)
        assert torch.allclose(out[span.rows].float(), expected, atol=1e-5 if dtype == torch.float32 else 0.02)


def test_a_decode_step_is_planned_on_the_device(flash_kernel: None) -> None:
    """From its tensors alone, whatever is in them later: nothing of it comes from the host's list of spans."""
    cache = cache_of(2)
    step = Step.pack([(3, 5, [1]), (0, 2, [1])], [0, 1], CPU)
    bare = Step(step.tokens, step.slots, step.positions, step.logit_rows, (), all_logits=True, decodes=True)
    for given_step in (step, bare):
        made = flash_attention.plan_flash(given_step, cache)
        assert made.query_starts.tolist() == [0, 1, 2] and made.key_starts.tolist()[:2] == [60, 0]
        assert made.lengths.tolist() == [6, 3]
        assert (made.most_queries, made.most_keys) == (1, cache.max_seq_len)


def test_where_the_kernel_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA, in 16 bits, from Ampere on, for heads that it has; never on a CPU."""

    class Keys:
        def __init__(self, dtype: torch.dtype = torch.bfloat16, head_dim: int = 128) -> None:
            self.dtype, self.shape, self.device = dtype, (2, 1, 8, head_dim), torch.device("cuda", 0)

    capability = [(9, 0)]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability[0])
    assert flash_attention.flash_kernel_reads(Keys()) and flash_attention.flash_kernel_reads(Keys(torch.float16, 256))
    for keys in (Keys(torch.float32), Keys(torch.float8_e4m3fn), Keys(head_dim=260), Keys(head_dim=20)):
        assert not flash_attention.flash_kernel_reads(keys)
    capability[0] = (7, 5)
    assert not flash_attention.flash_kernel_reads(Keys())
    assert not flash_attention.flash_kernel_reads(torch.empty(2, 1, 8, 128, dtype=torch.bfloat16))


@pytest.mark.cuda
@pytest.mark.parametrize("group", [1, 8])
@pytest.mark.parametrize("lone", [False, True])
def test_the_kernel_itself_agrees_with_plain_arithmetic(group: int, lone: bool) -> None:
    """bfloat16, heads of 128, lengths up to 700: within 0.02 of numbers of size 1."""
    device, kv_heads, head_dim = torch.device("cuda"), 4, 128
    cache = KVCache(2, kv_heads, 4, 1024, head_dim, torch.bfloat16, device)
    spans = [(2, 0, 300), (0, 600, 1), (3, 400, 130)] if not lone else [(2, 300, 1), (0, 600, 1)]
    full = {slot: torch.randn(2, start + n, kv_heads, head_dim).bfloat16() for slot, start, n in spans}
    for slot, start, n in spans:
        rows = cache.rows(torch.full((start + n,), slot), torch.arange(start + n)).to(device)
        write(cache, rows, full[slot].to(device))
    step = Step.pack([(slot, start, [5] * n) for slot, start, n in spans], range(sum(n for *_, n in spans)), device)
    queries = torch.randn(len(step.tokens), kv_heads * group, head_dim).bfloat16()
    assert lone or isinstance(plan(step, cache), FlashAttention)
    out = flash_attention.plan_flash(step, cache)(queries.to(device), cache.keys[1], cache.values[1]).cpu()
    for span in step.spans:
        expected = naive(queries[span.rows].float(), *full[span.slot].float(), span.start)
        assert torch.allclose(out[span.rows].float(), expected, atol=0.02)
