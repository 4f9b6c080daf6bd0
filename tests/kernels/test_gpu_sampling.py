"""Tokens drawn on CUDA: our Triton kernel against a sorted row."""

import importlib
from types import ModuleType

import pytest
import torch
from emulation import DEVICE, gpu

from llama.engine import sampling

__all__ = ["gpu"]
FILTERS = [  # top_p, min_p, top_k
    (1.0, 0.0, 0), (0.9, 0.0, 0), (0.3, 0.0, 0), (0.0, 0.0, 0), (0.999, 0.0, 0), (1.0, 0.05, 0), (0.95, 1.0, 0),
    (1.0, 0.0, 1), (1.0, 0.0, 40), (0.5, 0.0, 7), (0.8, 0.02, 300), (0.99, 0.0, 90000),
]  # fmt: skip
SHAPES = ["peaked", "flat", "with ties", "all alike", "half banned", "not finite"]
NOISE = (0.37, 1 - 2**-24)  # each filter meets either in half of the shapes


@pytest.mark.parametrize("vocab", [1, 30, 520])  # one block, and three
@pytest.mark.parametrize("shape", SHAPES)
def test_tokens_are_drawn_as_from_a_sorted_row(
    gpu: ModuleType, vocab: int, shape: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exactly, whatever the filters; and always a token of the vocabulary."""
    kernel = importlib.import_module("llama.kernels.gpu_sampling")
    monkeypatch.setattr(kernel, "BLOCK_SIZE", 256)
    logits = torch.randn(len(FILTERS), vocab) * {"peaked": 6, "all alike": 0}.get(shape, 1)
    if shape == "with ties":
        logits = logits.round()
    if shape == "half banned":
        logits[:, 1::2] = -torch.inf
    if shape == "not finite":
        logits[:, vocab // 2] = torch.nan
    probs = torch.softmax(logits, -1).to(DEVICE)
    *columns, top_k = (torch.tensor(column) for column in zip(*FILTERS, strict=True))
    noise = torch.tensor([NOISE[(row + SHAPES.index(shape)) % 2] for row in range(len(FILTERS))])
    numbers = torch.stack([torch.ones(len(FILTERS)), *columns, noise]).to(DEVICE)
    tokens = kernel.draw(probs, numbers, top_k.to(DEVICE))
    assert ((tokens >= 0) & (tokens < vocab)).all()
    if shape != "not finite":
        assert tokens.equal(sampling._draw_sorted(probs, numbers, top_k.to(DEVICE)))


def test_top_p_is_of_what_top_k_keeps(gpu: ModuleType) -> None:
    kernel = importlib.import_module("llama.kernels.gpu_sampling")
    probs = torch.tensor([[0.3, 0.5, 0.2]] * 2).to(DEVICE)
    numbers = torch.tensor([[1.0, 1.0], [0.65, 0.6], [0.0, 0.0], [0.1, 0.1]]).to(DEVICE)
    assert kernel.draw(probs, numbers, torch.tensor([2, 2]).to(DEVICE)).tolist() == [0, 1]


@pytest.mark.cuda
def test_tokens_are_drawn_as_on_a_cpu() -> None:
    """All of sampling, from logits on: but for draws that fall where two tokens meet."""
    logits, numbers = torch.randn(512, 32000) * 3, torch.rand(4, 512)
    numbers[0] = torch.tensor([0.0, 0.6, 1.0, 1.5] * 128)
    numbers[2] *= 0.1
    top_k = torch.tensor([0, 0, 40, 5000] * 128)
    found = sampling.sample_all(logits.cuda(), numbers.cuda(), top_k.cuda()).cpu()
    assert (found != sampling.sample_all(logits, numbers, top_k)).sum() <= 2
