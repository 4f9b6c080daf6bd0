"""What only CUDA has, on a CPU: PyTorch's flash kernel as plain arithmetic, our Triton kernels interpreted."""

import importlib
import math
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

from llama.engine import sampling
from llama.kernels import dispatch, ops, quantized
from llama.model import attention, flash_attention, forward

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
HALF = [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.cuda)]
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.cpu().double() - expected.double()).norm() / expected.double().norm()).item()


def flash_attention_forward(
    query: Tensor, key: Tensor, value: Tensor, cum_seq_q: Tensor, cum_seq_k: Tensor, max_q: int, max_k: int,
    dropout_p: float, is_causal: bool, return_debug_mask: bool, *, scale: float | None = None,
    window_size_left: int | None = None, window_size_right: int | None = None, seqused_k: Tensor | None = None,
    alibi_slopes: Tensor | None = None, block_table: Tensor | None = None, num_splits: int | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """aten::_flash_attention_forward for packed sequences: keys begin at cum_seq_k, as many as seqused_k says.

    The causal mask ends at the bottom right: a sequence's last query sees its last key.
    """
    assert (dropout_p, return_debug_mask, alibi_slopes, block_table, scale) == (0.0, False, None, None, None)
    assert is_causal and window_size_left in (None, -1) and window_size_right in (None, 0, -1)
    assert query.dim() == key.dim() == value.dim() == 3 and key.shape == value.shape
    assert query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
    n = len(cum_seq_q) - 1
    assert all(t.dtype == torch.int32 and t.is_contiguous() for t in (cum_seq_q, cum_seq_k, seqused_k))
    assert len(cum_seq_k) == n + 1 and len(seqused_k) == n and cum_seq_q[0] == 0 and cum_seq_q[-1] == len(query)
    out, group = torch.empty_like(query), query.shape[1] // key.shape[1]
    for begin, end, first, used in zip(cum_seq_q, cum_seq_q[1:], cum_seq_k, seqused_k, strict=False):
        q, rows = query[begin:end].float(), slice(first, first + used)
        assert 0 < len(q) <= max_q and len(q) <= used <= max_k and first + used <= len(key)
        k, v = (t[rows].float().repeat_interleave(group, dim=1) for t in (key, value))
        scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[-1])
        scores.masked_fill_(torch.ones(len(q), int(used)).tril(int(used) - len(q)) == 0, -math.inf)
        out[begin:end] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).to(out.dtype)
    nothing = torch.empty(0)
    return out, nothing, nothing, nothing, nothing


@pytest.fixture
def flash_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """The packed path of CUDA on this machine, over the emulated kernel."""
    emulate_flash_kernel(monkeypatch)


def emulate_flash_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    flash_attention._varlen_attn()  # PyTorch's own import wants the operator as it is
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", flash_attention_forward)
    for module in (flash_attention, attention):
        monkeypatch.setattr(module, "flash_kernel_reads", lambda keys: True)
    monkeypatch.setattr(forward, "can_fuse_on_cpu", lambda rows, model, cache: False)


@pytest.fixture(scope="session")
def gpu() -> ModuleType:
    """Our kernels for CUDA: on a GPU where there is one, else interpreted (see conftest), without bfloat16 products."""
    triton = pytest.importorskip("triton", reason="needs Triton")
    if missing := dispatch.no_triton():
        pytest.skip(missing)
    old, new_numpy = version_of(triton.__version__) < (3, 8), version_of(np.__version__) >= (2, 4)
    if old and new_numpy and not torch.cuda.is_available():
        pytest.skip(f"the interpreter of Triton {triton.__version__} needs NumPy before 2.4")
    return importlib.import_module("llama.kernels.gpu")


def version_of(text: str) -> tuple[int, int]:
    major, minor, *_ = text.split(".")
    return int(major), int(minor)


@pytest.fixture
def gpu_path(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model on this machine goes through all that it goes through on CUDA, and none of what a CPU has."""
    if torch.cuda.is_available():
        pytest.skip("the kernels are not interpreted where there is a GPU")
    monkeypatch.setattr(dispatch, "load", lambda: (None, "not on CUDA"))
    for module in (attention, dispatch, quantized, ops):
        monkeypatch.setattr(module, "gpu_kernels", lambda x: gpu)
    monkeypatch.setattr(sampling, "gpu_sampling", lambda device: importlib.import_module("llama.kernels.gpu_sampling"))
