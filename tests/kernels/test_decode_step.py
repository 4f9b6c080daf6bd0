"""A decode step in one call gives what its operations give one after the other."""

from pathlib import Path

import pytest
import torch
from checkpoints import random_weights, save
from conftest import DEMO

from llama import Llama, SamplingParams
from llama.kernels import decode_step, dispatch, library, ops, quantized
from llama.model import forward
from llama.model.step import Step

LIBRARY = library.load()[0]
pytestmark = pytest.mark.skipif(LIBRARY is None, reason=f"{dispatch.why_not(torch.device('cpu'))}")
PARAMS = {"dim": 256, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 1024, "multiple_of": 64,
          "norm_eps": 1e-5}  # fmt: skip
PROMPTS = [[1, 5, 9, 200, 17], [1, 7], [1, 33, 301, 44, 80, 80, 12, 9, 5]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    weights = random_weights(PARAMS, torch.bfloat16)
    return save(tmp_path_factory.mktemp("layers") / "model", PARAMS, weights)


def generated(
    folder: Path, monkeypatch: pytest.MonkeyPatch, together: bool, **options: object
) -> tuple[list[list[int]], list[list[float]], int]:  # fmt: skip
    """Greedy tokens, their log-probabilities, and how many steps were one call."""
    calls = []
    run = decode_step.DecodeStep.run
    with monkeypatch.context() as patch:
        patch.setattr(decode_step.DecodeStep, "run", lambda self, *a: calls.append(1) or run(self, *a))
        if not together:
            patch.setattr(forward, "can_fuse_on_cpu", lambda rows, model, cache: False)
        llama = Llama.build(str(folder), str(DEMO / "tokenizer.model"), 64, 3, device="cpu", **options)
        tokens, logprobs = llama.generate(PROMPTS, params=SamplingParams(temperature=0, max_gen_len=12, logprobs=True))
    return tokens, logprobs or [], len(calls)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quantize", ["int8", "int4", None])
def test_both_ways_give_the_same_bits(
    folder: Path, monkeypatch: pytest.MonkeyPatch, quantize: str | None, dtype: str
) -> None:
    """The same kernels in the same order: only the calls are fewer."""
    together = generated(folder, monkeypatch, True, quantize=quantize, dtype=dtype)
    apart = generated(folder, monkeypatch, False, quantize=quantize, dtype=dtype)
    assert together[:2] == apart[:2]
    assert together[2] >= 11 and apart[2] == 0


@pytest.mark.parametrize(
    "variant", range(LIBRARY.llama_variant() + 1) if LIBRARY else [], ids=lambda n: library.VARIANTS[n]
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_a_token_is_computed_alike_with_those_around_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch, quantize: str, dtype: str, variant: int
) -> None:
    """Sequences of several tokens each, in one step or a token a step, in one call or layer by layer: the same bits."""
    for module in (decode_step, ops, quantized):
        monkeypatch.setattr(module, "variant", lambda: variant)
    model = Llama.build(
        str(folder), str(DEMO / "tokenizer.model"), 64, 3, device="cpu", quantize=quantize, dtype=dtype
    ).model  # fmt: skip
    lengths = [4, 1, 3] if library.VARIANTS[variant] == "portable" else [7, 1, 5]  # which multiplies 8 rows at most
    starts, g = [13, 30, 0], torch.Generator().manual_seed(1)
    texts = [
        torch.randint(3, 1000, (start + n,), generator=g).tolist() for start, n in zip(starts, lengths, strict=True)
    ]
    alone, caches = [], [model.new_cache(3, 64) for _ in range(3)]
    for slot, (text, start) in enumerate(zip(texts, starts, strict=True)):
        for position, token in enumerate(text):
            for cache in caches if position < start else caches[:1]:
                logits = model(Step.pack([(slot, position, [token])], [0], model.device), cache)
            if position >= start:
                alone.append(logits)
    parts = [(slot, start, text[start:]) for slot, (text, start) in enumerate(zip(texts, starts, strict=True))]
    step = Step.pack(parts, range(sum(lengths)), model.device)
    together = model(step, caches[1])
    monkeypatch.setattr(forward, "can_fuse_on_cpu", lambda rows, model, cache: False)
    by_layers = model(step, caches[2])
    assert together.equal(torch.cat(alone)) and by_layers.equal(together)
    for cache in caches[1:]:
        for layer in range(PARAMS["n_layers"]):
            for stored, own in ((caches[0].keys, cache.keys), (caches[0].values, cache.values)):
                assert all(stored[layer][:, s, : len(t)].equal(own[layer][:, s, : len(t)]) for s, t in enumerate(texts))


def test_float16_is_left_to_pytorch(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Activations of it; weights of it are not (see test_loader.py)."""
    assert generated(folder, monkeypatch, True, dtype="float16")[2] == 0


def test_another_cache_gets_another_table(folder: Path) -> None:
    """Two engines on one model do not write into each other's cache. Our kernels compute a row alike in any order."""
    first = Llama.build(str(folder), str(DEMO / "tokenizer.model"), 64, 3, device="cpu", quantize="int8")
    second = Llama(first.model, first.tokenizer)
    params = SamplingParams(temperature=0, max_gen_len=8)
    assert first.generate(PROMPTS, params=params) == second.generate(PROMPTS, params=params)
    assert first.generate(PROMPTS[::-1], params=params)[0] == second.generate(PROMPTS, params=params)[0][::-1]
