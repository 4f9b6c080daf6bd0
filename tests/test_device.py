"""The device, dtype and threads that are chosen, on machines that are made up."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llama import device
from llama.device import (
    ADA,
    _granted_cores,
    choose_device,
    choose_dtype,
    compute_capability,
    default_threads,
    parse_dtype,
)
from llama.errors import DeviceError, ParameterError


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Pretend a machine: how many CUDA devices, MPS or not, how many processes, which of them this is."""

    def machine(cuda: int = 0, mps: bool = False, processes: int = 1, local_rank: int = 0) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        monkeypatch.setattr(device, "world_size", lambda: processes)
        monkeypatch.setenv("LOCAL_RANK", str(local_rank))

    return machine


@pytest.mark.parametrize(
    ("has", "asked", "chosen"),
    [
        ({}, None, "cpu"),
        ({"cuda": 1}, None, "cuda:0"),
        ({"cuda": 1, "mps": True}, None, "cuda:0"),
        ({"cuda": 4, "processes": 4, "local_rank": 3}, None, "cuda:3"),
        ({"cuda": 4, "processes": 4, "local_rank": 3}, "cuda", "cuda:3"),
        ({"cuda": 4}, "cuda:2", "cuda:2"),
        ({"cuda": 4}, torch.device("cuda", 1), "cuda:1"),
        ({"cuda": 1}, "cpu", "cpu"),
        ({"mps": True}, None, "mps"),
        ({"mps": True}, "mps", "mps"),
        ({"mps": True, "processes": 2}, None, "cpu"),
    ],
)
def test_the_device_is_the_one_asked_for_or_the_best(
    machine: Callable[..., None], has: dict[str, Any], asked: Any, chosen: str
) -> None:
    machine(**has)
    assert choose_device(asked) == torch.device(chosen)


@pytest.mark.parametrize(
    ("has", "asked", "said"),
    [
        ({}, "cuda", "device='cuda' was asked for, but "),
        ({}, "mps", "device='mps' was asked for, but this machine has no MPS device: use device='cpu'"),
        (
            {"cuda": 2, "processes": 3, "local_rank": 2},
            None,
            "process 2 of this machine wants CUDA device 2, but there are 2: start torchrun with --nproc_per_node 2 or",
        ),
        ({"cuda": 1}, "cuda:1", "wants CUDA device 1, but there "),
    ],
)
def test_a_device_that_is_not_there_is_refused(
    machine: Callable[..., None], has: dict[str, Any], asked: Any, said: str
) -> None:
    machine(**has)
    with pytest.raises(DeviceError, match=re.escape(said)):
        choose_device(asked)


@pytest.mark.parametrize(("built", "said"), [(None, "this PyTorch was built without CUDA"), ("12.8", "sees no CUDA")])
def test_why_there_is_no_cuda_is_said(
    machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch, built: str | None, said: str
) -> None:
    machine()
    monkeypatch.setattr(torch.version, "cuda", built)
    with pytest.raises(DeviceError, match=said):
        choose_device("cuda")


@pytest.mark.parametrize(
    ("given", "dtype"),
    [(None, None), ("float32", torch.float32), (torch.float16, torch.float16), ("torch.bfloat16", torch.bfloat16)],
)
def test_a_dtype_is_parsed(given: Any, dtype: torch.dtype | None) -> None:
    assert parse_dtype(given) == dtype


@pytest.mark.parametrize("given", ["fp16", "float", torch.int8, 16, "None"])
def test_a_dtype_that_is_none_of_three_is_refused(given: Any) -> None:
    with pytest.raises(ParameterError, match="is not supported: use bfloat16, float16, float32"):
        parse_dtype(given)


def test_only_a_cuda_device_has_a_compute_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: ADA)
    assert compute_capability(torch.device("cuda", 0)) == ADA
    assert compute_capability(torch.device("cpu")) == compute_capability(torch.device("mps")) == (0, 0)


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.mark.parametrize(
    ("stored", "device", "fast", "chosen"),
    [
        (BF16, "cuda", True, BF16), (BF16, "cuda", False, FP32), (FP16, "cuda", False, FP16),
        (BF16, "cpu", True, BF16), (BF16, "cpu", False, FP32), (FP16, "cpu", True, FP16), (FP16, "cpu", False, FP32),
        (FP32, "cuda", True, FP32), (FP32, "cpu", False, FP32), (BF16, "mps", False, BF16),
    ],
)  # fmt: skip
def test_the_stored_dtype_is_kept_where_it_is_fast(
    monkeypatch: pytest.MonkeyPatch, stored: torch.dtype, device: str, fast: bool, chosen: torch.dtype
) -> None:
    """Else float32, never another half: float16 would overflow where bfloat16 did not."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0) if fast else (7, 5))
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: fast)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", lambda: fast)
    assert choose_dtype(stored, torch.device(device)) == chosen


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 8),
        ({"cpu.max": "max 100000\n"}, 8),
        ({"cpu.max": "250000 100000\n"}, 2),
        ({"cpu.max": "20000 100000\n"}, 1),
        ({"cpu.max": "3200000 100000\n"}, 8),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8),
        ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
    ],
)
def test_a_containers_limit_counts_as_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], expected: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert _granted_cores(tmp_path) == expected


def test_processes_of_a_machine_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun tells each to use one thread; a user's own number, and a single process's, stay as they are."""
    monkeypatch.setattr(device, "_granted_cores", lambda: 12)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    for together, told, expected in (("4", "1", 3), ("4", "2", 5), ("1", "1", 5), ("16", "1", 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", together)
        monkeypatch.setenv("OMP_NUM_THREADS", told)
        assert default_threads() == expected
    monkeypatch.setattr(device, "_granted_cores", lambda: 2)
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert default_threads() == 2
