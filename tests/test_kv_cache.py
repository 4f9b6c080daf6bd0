"""The KV cache holds what was written, where it was written; a prefix is copied exactly."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llama.kv_cache import KVCache

LAYERS, SLOTS, POSITIONS = 2, 3, 6


def cache_of(kv_heads: int, slots: int = 4, positions: int = 20, head_dim: int = 8, layers: int = LAYERS) -> KVCache:
    return KVCache(layers, kv_heads, slots, positions, head_dim, torch.float32, torch.device("cpu"))


def write(cache: KVCache, layer: int, rows: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
    """Put keys and values (N, K, D) at token rows (N,)."""
    for stored, own in ((cache.keys[layer], keys), (cache.values[layer], values)):
        stored.flatten(1, 2)[:, rows] = own.transpose(0, 1)


PLACES = st.lists(st.tuples(st.integers(0, SLOTS - 1), st.integers(0, POSITIONS - 1)), max_size=8, unique=True)
COPIES = st.tuples(
    st.integers(0, SLOTS - 1), st.integers(0, SLOTS - 1), st.integers(0, POSITIONS), st.integers(0, POSITIONS)
)


@settings(deadline=None)
@given(st.lists(PLACES | COPIES, max_size=12))
def test_any_writes_and_copies_are_those_of_a_dict(actions: list) -> None:
    """After packed writes to one layer and copies of prefixes, each view is what a plain dict says."""
    cache = cache_of(kv_heads=2, slots=SLOTS, positions=POSITIONS, head_dim=1)
    for tensor in (*cache.keys, *cache.values):
        tensor.zero_()
    naive = {(layer, slot, p): 0.0 for layer in range(LAYERS) for slot in range(SLOTS) for p in range(POSITIONS)}
    for number, action in enumerate(actions, 1):
        if isinstance(action, tuple):
            source, target, length, start = action
            cache.copy_prefix(source, target, length, start)
            naive |= {(n, target, p): naive[n, source, p] for n in range(LAYERS) for p in range(start, length)}
        elif action:
            layer = number % LAYERS
            written = [number + place / 100 for place in range(len(action))]
            slots, positions = torch.tensor(action).unbind(1)
            keys = torch.tensor(written)[:, None, None].repeat(1, 2, 1)
            keys[:, 1] += 1000  # the second head's
            write(cache, layer, cache.rows(slots, positions), keys, -keys)
            naive |= {(layer, *place): key for place, key in zip(action, written, strict=True)}
    for (layer, slot, position), key in naive.items():
        keys, values = cache.view(layer, slot, position + 1)
        expected = torch.tensor([[key], [key + 1000 if key else 0.0]])
        assert torch.equal(keys[:, position], expected)
        assert torch.equal(values[:, position], -expected)


def test_views_share_memory_and_prefixes_copy_exactly() -> None:
    """`view` is what was written, without a copy; `copy_prefix` copies its range in every layer and nothing else."""
    cache = cache_of(2)
    for tensor in (*cache.keys, *cache.values):
        tensor.copy_(torch.randn(tensor.shape))
    before = [tensor.clone() for tensor in (*cache.keys, *cache.values)]
    cache.copy_prefix(1, 3, 7, start=2)
    for tensor, old in zip((*cache.keys, *cache.values), before, strict=True):
        old[:, 3, 2:7] = old[:, 1, 2:7]
        assert torch.equal(tensor, old)
    keys, values = cache.view(1, 3, 5)
    assert keys.shape == values.shape == (2, 5, 8)
    assert keys.data_ptr() == cache.keys[1][:, 3].data_ptr()


def test_writes_go_to_their_slots_and_positions_alone() -> None:
    cache = cache_of(2)
    for tensor in (*cache.keys, *cache.values):
        tensor.zero_()
    keys, values = torch.randn(3, 2, 8), torch.randn(3, 2, 8)
    write(cache, 0, cache.rows(torch.tensor([2, 0, 2]), torch.tensor([4, 19, 0])), keys, values)
    for row, (slot, position) in enumerate([(2, 4), (0, 19), (2, 0)]):
        assert torch.equal(cache.keys[0][:, slot, position], keys[row])
        assert torch.equal(cache.values[0][:, slot, position], values[row])
    assert int((cache.keys[0] != 0).any(-1).sum()) == 6
    assert not cache.keys[1].any()
