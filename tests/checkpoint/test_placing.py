"""What `max_memory` and `device_map` come to on this machine: which devices count, what is refused before loading."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DEMO

from llama import Llama
from llama.checkpoint import loader, memory, placing
from llama.checkpoint.info import describe
from llama.checkpoint.source import open_source
from llama.errors import DeviceError, ParameterError
from llama.options import RunOptions
from llama.placement import Placement


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """This machine has so many bytes free on its CPU, and on CUDA devices: machine(cpu, *cuda)."""

    def machine(cpu: int, *cuda: int) -> None:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(cuda))
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
        monkeypatch.setattr(memory, "free_bytes", lambda device: cpu if device.type == "cpu" else cuda[device.index])

    return machine


@pytest.fixture
def placed(ckpt_dir: Path) -> Callable[..., Placement]:
    """The placement of the small model, in float32 and with 4 sequences of 128 tokens: placed(options)."""
    source = open_source(ckpt_dir)

    def placed(max_batch_size: int = 4, **given: Any) -> Placement:
        options = RunOptions(max_seq_len=128, max_batch_size=max_batch_size, **given)
        args = replace(source.args, max_seq_len=128, max_batch_size=max_batch_size)
        return placing.place(args, options, source, torch.device(placing.main_device(options)), torch.float32)

    return placed


@pytest.mark.parametrize(
    ("options", "main"),
    [
        ({"device_map": "auto"}, "cuda:0"),
        ({"device_map": "auto", "device": "cpu"}, "cpu"),
        ({"device_map": "auto", "device": "cuda:1"}, "cuda:1"),
        ({"max_memory": {"cuda:1": 5, "cuda:0": 7}}, "cuda:0"),
        ({"max_memory": {"cuda:1": 5, "cpu": 7}, "device": "cuda"}, "cuda:1"),
        ({"max_memory": {"cpu": 7}}, "cpu"),
        ({"device_map": {"layers.0": "disk"}}, "cpu"),
        ({"device_map": {"layers.0": "disk", "layers.1": "cuda:5"}}, "cuda:5"),
    ],
)
def test_the_first_accelerator_that_may_be_used_is_the_main_device(
    machine: Callable[..., None], options: dict[str, Any], main: str
) -> None:
    machine(100, 200, 300)
    assert placing.main_device(RunOptions(**options)) == main


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"device": "cpu", "max_memory": {"cuda:1": 5}}, "device='cpu', but max_memory or device_map names cuda:1"),
        ({"device": "cuda:0", "max_memory": {"cuda:1": 5}},
         "device='cuda:0', but max_memory or device_map names cuda:1"),
        ({"device": torch.device("cuda"), "device_map": {"layers.0": "cpu:1"}},
         "device='cuda', but max_memory or device_map names only the CPU"),
    ],
)  # fmt: skip
def test_a_device_that_contradicts_the_map_is_refused(
    build: Callable[..., Llama], options: dict[str, Any], said: str
) -> None:
    with pytest.raises(ParameterError) as error:
        build(**options)
    assert str(error.value) == f"{said}: leave device out"


def test_devices_that_are_not_named_have_what_is_free(
    machine: Callable[..., None], placed: Callable[..., Placement]
) -> None:
    """The small model has 2 layers: on the machine's two GPUs, on one of them, and on the CPU's memory alone."""
    machine(10**9, 10**9, 10**9)
    assert placed(device_map="auto") == Placement("cuda:0", ("cuda:0",) * 2, "cuda:0")
    assert placed(device_map="balanced").devices == ("cuda:0", "cuda:1")
    assert placed(max_memory={"cuda:1": "1GB"}).devices == ("cuda:1",)
    assert placed(device_map="auto", device="cuda:1").devices == ("cuda:1",)
    assert placed(device_map="auto", device="cpu") == Placement("cpu", ("cpu",) * 2, "cpu")
    assert placed(device_map={"layers.0": "disk", "layers.1": "cpu:1"}).devices == ("disk", "cpu:1")


def test_layers_for_which_there_is_no_memory_are_on_the_disk(
    machine: Callable[..., None], placed: Callable[..., Placement], build: Callable[..., Llama]
) -> None:
    """One byte less than all needs."""
    machine(10**9)
    args = build().model.params
    needed = memory.need(args, torch.float32, 1, 512)
    whole = needed.weights + 4 * 128 * needed.cache_per_token + needed.workspace
    assert placed(max_memory={"cpu": whole}, device="cpu").devices == ("cpu",)
    less = placed(max_memory={"cpu": whole - 1}, device="cpu")
    assert "disk" in less.devices
    machine(whole - 1)
    assert placed(device_map="auto", device="cpu") == less


def test_what_is_granted_must_be_free_too(machine: Callable[..., None], placed: Callable[..., Placement]) -> None:
    machine(10**6, 10**9)
    with pytest.raises(DeviceError, match=r"^not enough memory on cpu .* on cpu:0: .* more than its 1\.00 MB"):
        placed(device_map={"layers.0-1": "cpu:0"}, max_memory={"cpu:0": "1GB"})
    placed(max_memory={"cuda:0": "1GB"})
    with pytest.raises(DeviceError, match=r"^not enough memory on cuda:0 .* more than its 1\.00 GB"):
        placed(max_memory={"cuda:0": "1TB"}, max_batch_size=10**5)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"device_map": {"layers.0-1": "cuda:1"}}, "cuda:1, but this machine has 1 CUDA device"),
        ({"max_memory": {"cuda:0": "1GB", "mps": "1GB"}, "device_map": {"layers.0-1": "mps"}},
         "mps, but this machine has no MPS device"),
    ],
)  # fmt: skip
def test_a_device_that_is_not_here_is_refused(
    machine: Callable[..., None], placed: Callable[..., Placement], options: dict[str, Any], said: str
) -> None:
    machine(10**9, 10**9)
    with pytest.raises(DeviceError) as error:
        placed(**options)
    assert str(error.value) == f"the model is to be on {said}: leave it out of max_memory and device_map"


def test_several_processes_are_refused(build: Callable[..., Llama], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placing, "world_size", lambda: 2)
    with pytest.raises(DeviceError, match="but 2 processes are running: start it without torchrun, or leave them out"):
        build(device_map="auto")


def test_a_gpu_that_is_not_here_is_refused_by_build(
    machine: Callable[..., None], build: Callable[..., Llama], ckpt_dir: Path
) -> None:
    """Though its limit is given, with which `llama info` plans for another machine."""
    machine(10**9)
    options: dict[str, Any] = {"max_memory": {"cuda:0": "5GiB"}}
    assert describe(ckpt_dir, 128, 4, **options)["placement"]["fits"]
    with pytest.raises(DeviceError, match=r"^the model is to be on cuda:0, but this machine has no CUDA device"):
        build(device=None, **options)


def test_a_map_of_another_model_is_refused_before_anything_is_read(
    build: Callable[..., Llama], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "load", lambda *given: pytest.fail("it was read"))
    with pytest.raises(ParameterError, match=r"^device_map has layers\.0-31, but the model has layers 0-3$"):
        build(DEMO, device_map={"layers.0-31": "cpu"})


def test_the_model_is_placed_as_the_map_says(build: Callable[..., Llama]) -> None:
    placement = Placement("cpu:0", ("cpu:0", "disk"), "cpu:1")
    table = {"layers.0": "cpu:0", "layers.1": "disk", "output": "cpu:1"}
    assert build(device_map=table).model.placement == placement
