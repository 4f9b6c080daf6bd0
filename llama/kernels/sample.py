"""Tokens from rows of logits by our library for CPUs; PyTorch's operators take the largest elsewhere."""

import torch
from torch import Tensor

from llama.kernels.dispatch import cpu_library
from llama.kernels.library import variant


def greedy(logits: Tensor) -> tuple[list[int], list[bool]]:
    """For each row of logits (R, V) float32: the first of the largest, and whether all are finite."""
    library = cpu_library(logits)
    if library is None:
        return logits.argmax(-1).tolist(), logits.sum(-1).isfinite().tolist()
    logits = logits.contiguous()
    tokens, finite = torch.empty(len(logits), dtype=torch.int64), torch.empty(len(logits), dtype=torch.bool)
    library.llama_greedy(
        logits.data_ptr(), tokens.data_ptr(), finite.data_ptr(), logits.shape[0], logits.shape[1], variant()
    )  # fmt: skip
    return tokens.tolist(), finite.tolist()


def draw(logits: Tensor, numbers: Tensor, top_k: Tensor) -> Tensor:
    """`sampling.sample`, where there is a `cpu_library`: `numbers` (4, R) are temperature, top_p, min_p and noise."""
    library = cpu_library(logits)
    assert library is not None
    logits, numbers, (rows, vocab) = logits.contiguous(), numbers.contiguous(), logits.shape
    tokens, threads = torch.empty(rows, dtype=torch.int64), min(rows, torch.get_num_threads())
    workspace = torch.empty(threads * library.llama_sample_workspace(vocab), dtype=torch.uint8)
    library.llama_sample(
        logits.data_ptr(), numbers.data_ptr(), top_k.data_ptr(), tokens.data_ptr(), workspace.data_ptr(), rows, vocab,
        variant(), threads,
    )  # fmt: skip
    return tokens
