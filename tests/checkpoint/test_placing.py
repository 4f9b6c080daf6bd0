"""What `max_memory` and `device_map` come to on this machine: which devices count, what is refused before loading."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DEMO

from llama import Llama
from llama.checkpoint import loader, memory, placing
from llama.errors import DeviceError, ParameterError
from llama.options import RunOptions
from llama.placement import Placement

SIZES = {"max_seq_len": 128, "max_batch_size": 4}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """This machine has so many bytes free on its CPU, and on CUDA devices: machine(cpu, *cuda)."""

    def machine(cpu: int, *cuda: int) -> None:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(cuda))
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
        monkeypatch.setattr(memory, "free_bytes", lambda device: cpu if device.type == "cpu" else cuda[device.index])

    return machine


@pytest.fixture
def placed(monkeypatch: pytest.MonkeyPatch, build: Callable[..., Llama]) -> Callable[..., tuple[Any, Placement]]:
    """The device and the placement with which `build` of the small model has the weights read: placed(options)."""

    class Stop(Exception):
        pass

    def placed(**options: Any) -> tuple[Any, Placement]:
        seen: list[Any] = []

        def load(source: Any, args: Any, options: Any, device: Any, dtype: Any, placement: Any) -> None:
            seen.extend((device, placement))
            raise Stop

        monkeypatch.setattr(loader, "load", load)
        with pytest.raises(Stop):
            build(**{"device": None, "dtype": "float32", **SIZES, **options})
        return seen[0], seen[1]

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
    machine: Callable[..., None], placed: Callable[..., tuple[Any, Placement]]
) -> None:
    """The small model has 2 layers: on the machine's two GPUs, on one of them, and on the CPU's memory alone."""
    machine(10**9, 10**9, 10**9)
    assert placed(device_map="auto") == (torch.device("cuda:0"), Placement("cuda:0", ("cuda:0",) * 2, "cuda:0"))
    device, balanced = placed(device_map="balanced")
    assert balanced.layers == ("cuda:0", "cuda:1")
    device, alone = placed(max_memory={"cuda:1": "1GB"})
    assert device == torch.device("cuda:1") and set(alone.layers) == {"cuda:1"}
    device, on_cpu = placed(device_map="auto", device="cpu")
    assert device == torch.device("cpu") and on_cpu == Placement("cpu", ("cpu",) * 2, "cpu")


def test_layers_for_which_there_is_no_memory_are_on_the_disk(
    machine: Callable[..., None], placed: Callable[..., tuple[Any, Placement]], build: Callable[..., Llama]
) -> None:
    """One byte less than all, and at last no room for what is beside the weights."""
    machine(10**9)
    args = build().model.params
    needed = memory.need(args, torch.float32, 1, 512)
    whole = needed.weights + 4 * 128 * needed.cache_per_token + needed.workspace
    assert placed(max_memory={"cpu": whole})[1].layers == ("cpu",) * 2
    assert "disk" in (placement := placed(max_memory={"cpu": whole - 1})[1]).layers or placement.output == "disk"
    machine(whole - 1)
    assert placed(device_map="auto")[1] == placement
    with pytest.raises(DeviceError, match=r"^not enough memory on cpu for "):
        placed(max_memory={"cpu": 1000})


def test_what_is_granted_must_be_free_too(
    machine: Callable[..., None], placed: Callable[..., tuple[Any, Placement]]
) -> None:
    machine(10**6, 10**9)
    with pytest.raises(DeviceError, match=r"^not enough memory on cpu .* more than its 1\.00 MB"):
        placed(device_map={"layers.0-1": "cpu:0"}, max_memory={"cpu:0": "1GB"})
    placed(max_memory={"cuda:0": "1GB"})
    with pytest.raises(DeviceError, match=r"^not enough memory on cuda:0 .* more than its 1\.00 GB"):
        placed(max_memory={"cuda:0": "9GB"}, max_batch_size=10**5)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"device_map": {"layers.0-1": "cuda:1"}}, "cuda:1, but this machine has 1 CUDA device"),
        ({"max_memory": {"cuda:0": "1GB", "mps": "1GB"}, "device_map": {"layers.0-1": "mps"}},
         "mps, but this machine has no MPS device"),
    ],
)  # fmt: skip
def test_a_device_that_is_not_here_is_refused(
    machine: Callable[..., None], build: Callable[..., Llama], options: dict[str, Any], said: str
) -> None:
    machine(10**9, 10**9)
    with pytest.raises(DeviceError) as error:
        build(device=None, **options)
    assert str(error.value) == f"the model is to be on {said}: leave it out of max_memory and device_map"


def test_several_processes_are_refused(build: Callable[..., Llama], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placing, "world_size", lambda: 2)
    with pytest.raises(DeviceError, match="but 2 processes are running: start it without torchrun, or leave them out"):
        build(device_map="auto")


def test_a_map_of_another_model_is_refused_before_anything_is_read(
    build: Callable[..., Llama], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "load", lambda *given: pytest.fail("it was read"))
    with pytest.raises(ParameterError, match=r"^device_map has layers\.0-31, but the model has layers 0-3$"):
        build(Path(DEMO), device_map={"layers.0-31": "cpu"})
