"""Attention of a packed step is the textbook's, for any spans."""

import pytest
import torch
from caches import cache_of, write
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import naive

from llama.cli.chat.session import CPU
from llama.model.attention import plan
from llama.model.step import Step


@settings(deadline=None, max_examples=60)
@given(data=st.data())
@pytest.mark.parametrize("group", [1, 2, 4])
def test_attention_is_the_textbooks(group: int, data: st.DataObject) -> None:
    """Whole prompts, chunks and single tokens, in any slots and any mixture."""
    kv_heads, head_dim = data.draw(st.sampled_from([1, 2, 3])), 8
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    cache = cache_of(kv_heads, head_dim=head_dim)
    slots = data.draw(st.permutations(range(4)))[: data.draw(st.integers(1, 4))]
    spans = [(slot, data.draw(st.integers(0, 10)), data.draw(st.integers(1, 9))) for slot in slots]
    full = {slot: torch.randn(2, start + n, kv_heads, head_dim, generator=g) for slot, start, n in spans}
    for slot, start, _ in spans:  # what earlier steps wrote
        rows = cache.rows(torch.full((start,), slot), torch.arange(start))
        write(cache, rows, full[slot][:, :start])
    step = Step.pack([(slot, start, [5] * n) for slot, start, n in spans], [], CPU)
    new = torch.cat([full[slot][:, start:] for slot, start, _ in spans], dim=1)
    write(cache, cache.rows(step.slots, step.positions), new)
    queries = torch.randn(len(step.tokens), kv_heads * group, head_dim, generator=g)
    out = plan(step, cache)(queries, cache.keys[1], cache.values[1])
    for span in step.spans:
        expected = naive(queries[span.rows], *full[span.slot], span.start)
        assert torch.allclose(out[span.rows], expected, atol=1e-5)
