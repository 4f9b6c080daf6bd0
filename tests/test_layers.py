"""All layers of a decode step in one call give what they give one after the other."""

from pathlib import Path

import pytest
import torch
from checkpoints import random_weights, save
from conftest import DEMO

from llama import Llama, SamplingParams, model
from llama.kernels import layers, library

LIBRARY = library.load()[0]
pytestmark = pytest.mark.skipif(LIBRARY is None, reason=f"{library.why_not()}")
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
    """Greedy tokens, their log-probabilities, and how many steps went through all layers in one call."""
    calls = []
    run = layers.Layers.run
    with monkeypatch.context() as patch:
        patch.setattr(layers.Layers, "run", lambda self, *a: calls.append(1) or run(self, *a))
        patch.setattr(layers, "MOST_PLAIN_ROWS", 8)
        if not together:
            patch.setattr(model, "can_run", lambda x, quantized: False)
        llama = Llama.build(str(folder), str(DEMO / "tokenizer.model"), 64, 3, device="cpu", **options)
        tokens, logprobs = llama.generate(PROMPTS, params=SamplingParams(temperature=0, max_gen_len=12, logprobs=True))
    return tokens, logprobs or [], len(calls)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_quantised_layers_give_the_same_bits(
    folder: Path, monkeypatch: pytest.MonkeyPatch, quantize: str, dtype: str
) -> None:
    """The same kernels in the same order: only the calls are fewer."""
    together = generated(folder, monkeypatch, True, quantize=quantize, dtype=dtype)
    apart = generated(folder, monkeypatch, False, quantize=quantize, dtype=dtype)
    assert together[:2] == apart[:2]
    assert together[2] >= 11 and apart[2] == 0


def test_bfloat16_layers_agree(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums in another order: logits within bfloat16's rounding."""
    together, apart = (generated(folder, monkeypatch, way) for way in (True, False))
    if library.VARIANTS[library.variant()] != "amx":
        pytest.skip("needs instructions for bfloat16")
    assert together[2] >= 11
    first = [(a[:3], b[:3]) for a, b in zip(together[1], apart[1], strict=True)]
    assert all(abs(p - q) < 0.15 for a, b in first for p, q in zip(a, b, strict=True))


@pytest.mark.skipif(LIBRARY is None or library.VARIANTS[library.variant()] != "amx", reason="needs AVX512-BF16")
def test_bfloat16_products_are_those_of_plain_arithmetic() -> None:
    """Odd numbers of outputs and inputs, 1 to 8 rows, any number of threads."""
    for outputs, inputs in ((1, 32), (17, 96), (130, 50)):
        w, x = torch.randn(outputs, inputs).bfloat16(), torch.randn(8, inputs).bfloat16()
        expected = x.double() @ w.double().T
        for n in range(1, 9):
            for threads in (1, 3):
                y = torch.empty(n, outputs, dtype=torch.bfloat16)
                LIBRARY.llama_plain_product(
                    x.data_ptr(), w.data_ptr(), y.data_ptr(), n, inputs, outputs, threads
                )  # fmt: skip
                assert torch.allclose(y.double(), expected[:n], rtol=2**-7, atol=0.02)


def test_float32_weights_are_left_to_pytorch(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert generated(folder, monkeypatch, True, dtype="float32")[2] == 0


def test_another_cache_gets_another_table(folder: Path) -> None:
    """Two engines on one model do not write into each other's cache."""
    first = Llama.build(str(folder), str(DEMO / "tokenizer.model"), 64, 3, device="cpu", quantize="int8")
    second = Llama(first.model, first.tokenizer)
    params = SamplingParams(temperature=0, max_gen_len=8)
    assert first.generate(PROMPTS, params=params) == second.generate(PROMPTS, params=params)
    assert first.generate(PROMPTS[::-1], params=params)[0] == second.generate(PROMPTS, params=params)[0][::-1]
