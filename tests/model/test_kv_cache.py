"""The KV cache holds what was written, where it was written; a prefix is copied exactly."""

from collections.abc import Callable

import pytest
import torch
from caches import view
from hypothesis import given, settings
from hypothesis import strategies as st

from llama import Llama, SamplingParams
from llama.device import ADA
from llama.errors import DeviceError, ParameterError
from llama.kernels.ops import rope_and_store
from llama.model.kv_cache import FLOAT8, KVCache, check_kv_dtype

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
        keys, values = view(cache, layer, slot, position + 1)
        expected = torch.tensor([[key], [key + 1000 if key else 0.0]])
        assert torch.equal(keys[:, position], expected)
        assert torch.equal(values[:, position], -expected)


def test_views_share_memory_and_prefixes_copy_exactly() -> None:
    """A view is what was written, without a copy; `copy_prefix` copies its range in every layer and nothing else."""
    cache = cache_of(2)
    for tensor in (*cache.keys, *cache.values):
        tensor.copy_(torch.randn(tensor.shape))
    before = [tensor.clone() for tensor in (*cache.keys, *cache.values)]
    cache.copy_prefix(1, 3, 7, start=2)
    for tensor, old in zip((*cache.keys, *cache.values), before, strict=True):
        old[:, 3, 2:7] = old[:, 1, 2:7]
        assert torch.equal(tensor, old)
    keys, values = view(cache, 1, 3, 5)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_float8_holds_a_byte_a_number(dtype: torch.dtype) -> None:
    """Numbers come back in `dtype`, off by a sixteenth at most, cut at 448; prefixes are copied; the rest stays."""
    cache = KVCache(2, 2, 3, 10, 8, dtype, torch.device("cpu"), float8=True)
    assert all(t.dtype == FLOAT8 and t.nbytes == 2 * 3 * 10 * 8 for t in (*cache.keys, *cache.values))
    for tensor in (*cache.keys, *cache.values):
        tensor.fill_(3)
    heads = torch.randn(4, 1 + 2 * 2, 8).to(dtype)
    heads[0, -1, 0], heads[1, -1, 1] = 5000, -5000
    freqs_cis = torch.tensor([1.0, 0.0]).repeat(4, 1, 4, 1)  # rotates by nothing
    rows = cache.rows(torch.full((4,), 2), torch.arange(4))
    rope_and_store(heads, freqs_cis, cache.keys[1], cache.values[1], rows, 1)
    keys, values = view(cache, 1, 2, 5)
    assert keys.dtype == values.dtype == dtype
    expected = heads.transpose(0, 1)
    assert ((keys[:, :4] - expected[1:3]).abs() <= expected[1:3].abs() / 16 + 2**-9).all()
    assert (
        (values[:, :4] - expected[3:].clamp(-448, 448)).abs() <= expected[3:].clamp(-448, 448).abs() / 16 + 2**-9
    ).all()
    assert values[1, 0, 0] == 448 and values[1, 1, 1] == -448
    assert (keys[:, 4] == 3).all() and (view(cache, 0, 2, 10)[0] == 3).all()
    cache.copy_prefix(2, 0, 4)
    assert all(a.equal(b[:, :4]) for a, b in zip(view(cache, 1, 0, 4), (keys, values), strict=True))


def test_a_model_with_a_float8_cache_says_nearly_the_same(build: Callable[..., Llama]) -> None:
    """In chunks and single tokens: log-probabilities of the same tokens (logits have a deviation of 3) agree nearly."""
    prompts = [[1, *range(30, 60)], [1, *range(30, 55), 7], [1, 9]]
    params = SamplingParams(temperature=0, max_gen_len=0, logprobs=True)
    found, expected = (
        build(max_step_tokens=16, **options).generate(prompts, params=params, echo=True)[1]
        for options in ({"kv_dtype": "fp8"}, {})
    )
    differences = [
        abs(a - b) for own, other in zip(found, expected, strict=True) for a, b in zip(own, other, strict=True)
    ]
    assert 0 < max(differences) < 0.5 and sum(differences) / len(differences) < 0.2


def test_what_float8_needs(
    build: Callable[..., Llama], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """A GPU that converts it, or a CPU; the line at the start says so."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: ADA)
    check_kv_dtype("fp8", torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    check_kv_dtype(None, torch.device("cuda", 0))
    for device in ("cuda:0", "mps"):
        with pytest.raises(DeviceError, match=f"kv_dtype='fp8' needs a CUDA GPU from Ada or Hopper on.*not {device}"):
            check_kv_dtype("fp8", torch.device(device))
    with pytest.raises(ParameterError, match="kv_dtype='int8' is not a format of the KV cache: use fp8"):
        build(kv_dtype="int8")
    build(kv_dtype="fp8")
    assert "float32, cache in fp8 on cpu" in capsys.readouterr().err
