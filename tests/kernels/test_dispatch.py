"""Which kernels a device has, and the one line that says why it has none."""

import sys
from types import SimpleNamespace

import pytest
import torch

from llama.kernels import dispatch


def test_where_they_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA, in 16 bits, where Triton can compile and launch them; what is missing is said in one line."""

    class OnCUDA:
        device, dtype = torch.device("cuda", 0), torch.bfloat16

    kernels = object()
    with monkeypatch.context() as patch:
        patch.setattr(dispatch, "load_gpu", lambda device: kernels)
        assert dispatch.gpu_kernels(OnCUDA()) is kernels
        assert dispatch.gpu_kernels(torch.empty(0, dtype=torch.bfloat16)) is None
        patch.setattr(OnCUDA, "dtype", torch.float32)
        assert dispatch.gpu_kernels(OnCUDA()) is None

    def why(missing: str) -> str:
        return f"no compiled kernels ({missing}): PyTorch's operators are used, which are slower"

    launched = []
    monkeypatch.delenv("LLAMA_KERNELS", raising=False)
    monkeypatch.setattr(dispatch, "no_triton", dispatch.no_triton.__wrapped__)
    monkeypatch.setattr(dispatch, "no_gpu", dispatch.no_gpu.__wrapped__)
    monkeypatch.setattr(dispatch, "_gpu", lambda: SimpleNamespace(silu_and_mul=launched.append))
    monkeypatch.setattr(torch, "zeros", lambda *size, device, dtype: device)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__="3.10.0+git1"))
    assert dispatch.why_not(OnCUDA.device) is None and launched == [OnCUDA.device]

    def cannot_launch(x: object) -> None:
        raise RuntimeError("Failed to find C compiler.\nmore about it")

    monkeypatch.setattr(dispatch, "_gpu", lambda: SimpleNamespace(silu_and_mul=cannot_launch))
    assert dispatch.load_gpu(OnCUDA.device) is None
    assert dispatch.why_not(OnCUDA.device) == why("RuntimeError: Failed to find C compiler.")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert dispatch.why_not(OnCUDA.device) == why("compute capability 7.5 is less than 8.0")
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__="3.2.0"))
    assert dispatch.why_not(OnCUDA.device) == why("Triton 3.2.0 is older than 3.5")
    monkeypatch.setitem(sys.modules, "triton", None)
    assert dispatch.why_not(OnCUDA.device) == why("Triton is not installed")
    monkeypatch.setenv("LLAMA_KERNELS", "none")
    assert dispatch.why_not(OnCUDA.device) == why("LLAMA_KERNELS=none") and dispatch.load_gpu(OnCUDA.device) is None
    assert dispatch.why_not(torch.device("mps")) is None
