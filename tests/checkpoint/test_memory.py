"""What a run needs is counted right, and what an error says fits does fit."""

import re
from pathlib import Path

import pytest
import torch

from llama.checkpoint.layout import expected_shapes
from llama.checkpoint.memory import Need, check_fits, free_bytes, need, total_bytes
from llama.errors import DeviceError
from llama.model.args import ModelArgs

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
ARGS = ModelArgs(dim=64, n_layers=3, n_heads=8, n_kv_heads=4, vocab_size=500, multiple_of=32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weights_and_cache_are_counted_to_the_byte(dtype: torch.dtype) -> None:
    counted = need(ARGS, dtype, 1, 128)
    parameters = sum(torch.Size(shape).numel() for shape in expected_shapes(ARGS).values())
    assert counted.weights == parameters * dtype.itemsize
    assert counted.cache_per_token == 2 * 3 * 4 * 8 * dtype.itemsize
    half = need(ARGS, dtype, 2, 128)
    norms = (2 * 3 + 1) * 64
    assert half.weights == ((parameters - norms) // 2 + norms) * dtype.itemsize
    assert half.cache_per_token == counted.cache_per_token // 2
    assert counted.workspace > 3 * 128 * 500 * 4
    narrow = need(ARGS, dtype, 1, 128, kv_dtype="fp8")
    assert narrow.cache_per_token == 2 * 3 * 4 * 8 and narrow.weights == counted.weights


def test_sizes_in_the_message_fit_and_one_more_does_not() -> None:
    needed = Need(weights=1000, cache_per_token=10, workspace=500)
    check_fits(needed, 1500 + 10 * 64, 16, 4, CPU)
    with pytest.raises(DeviceError) as error:
        check_fits(needed, 1500 + 10 * 64 - 1, 16, 4, CPU)
    message = str(error.value)
    assert message.startswith("not enough memory on cpu: weights 1.00 kB + KV cache 640 bytes + workspace 500 bytes")
    total = int(re.search(r"max_seq_len × max_batch_size up to (\d+)", message)[1])
    batch = int(re.search(r"max_batch_size=(\d+) at max_seq_len=16", message)[1])
    length = int(re.search(r"max_seq_len=(\d+) at max_batch_size=4", message)[1])
    assert (total, batch, length) == (63, 3, 15)
    assert message.endswith(
        " or max_seq_len=15 at max_batch_size=4; or device_map='auto' reads what does not fit from the disk in each"
        " step: 1 byte, 5e-10 s at 2.00 GB/s"
    )
    check_fits(needed, 1500 + 10 * 64 - 1, 16, batch, CPU)
    check_fits(needed, 1500 + 10 * 64 - 1, length, 4, CPU)


def test_weights_that_leave_no_room_say_so() -> None:
    with pytest.raises(DeviceError, match="the weights alone leave no room"):
        check_fits(Need(1000, 10, 500), 1200, 16, 4, GPU)
    with pytest.raises(DeviceError, match=r"up to 2 fits$"):
        check_fits(Need(1000, 10, 500), 1525, 16, 4, GPU)
    with pytest.raises(DeviceError, match=r"up to 1 fits$"):
        check_fits(Need(1000, 10, 500), 1510, 16, 4, GPU)
    with pytest.raises(DeviceError, match=r"up to 4 fits, such as max_seq_len=1 at max_batch_size=4$"):
        check_fits(Need(1000, 10, 500), 1540, 16, 4, GPU)


def test_a_cpu_reads_from_the_disk_what_it_cannot_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Said with the bytes of a step, where cache and workspace fit: they are not read from anywhere."""
    needed, cache = Need(13 * 10**9, 10**6, 10**9), 64 * 10**6
    with pytest.raises(DeviceError) as error:
        check_fits(needed, 4 * 10**9, 16, 4, CPU)
    said = "device_map='auto' reads what does not fit from the disk in each step: 10.06 GB, 5 s at 2.00 GB/s"
    assert str(error.value).endswith(f"larger device; or {said}")
    for free, device in ((10**9 + cache - 1, CPU), (4 * 10**9, GPU)):
        with pytest.raises(DeviceError, match=r"larger device$"):
            check_fits(needed, free, 16, 4, device)
    monkeypatch.setattr("llama.checkpoint.memory.world_size", lambda: 2)
    with pytest.raises(DeviceError, match=r"larger device$"):
        check_fits(needed, 4 * 10**9, 16, 4, CPU)


def test_memory_that_pytorch_keeps_on_a_gpu_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a model was deleted, PyTorch holds its memory for what comes next."""
    for name, size in {"mem_get_info": (1000, 8000), "memory_reserved": 6000, "memory_allocated": 4500}.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, size=size: size)
    assert free_bytes(torch.device("cuda", 0)) == 2500
    assert total_bytes(torch.device("cuda", 0)) == 8000


def test_processes_of_one_machine_share_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = free_bytes(CPU)
    assert 0 < alone < 1 << 50
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert free_bytes(CPU) < alone / 2


# As Linux writes them: cgroup v1 has a folder for memory, and its counters with "total_" include the groups below.
V1 = {"memory/memory.limit_in_bytes": "9000\n", "memory/memory.usage_in_bytes": "4000\n"}


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({"memory.max": "9000\n", "memory.current": "4000\n", "memory.stat": "anon 10\ninactive_file 500\n"}, 5500),
        ({"memory.max": "9000\n", "memory.current": "4000\n", "memory.stat": "anon 10\n"}, 5000),
        ({"memory.max": "max\n", "memory.current": "4000\n", "memory.stat": ""}, None),
        ({**V1, "memory/memory.stat": "inactive_file 7\ntotal_inactive_file 300\ntotal_active_file 200\n"}, 5500),
        ({**V1, "memory/memory.stat": "inactive_file 7\n"}, 5000),
        ({**V1, "memory/memory.stat": "", "memory/memory.limit_in_bytes": f"{2**63 - 4096}\n"}, None),
        ({**V1, "memory/memory.stat": "?"}, None),
        ({}, None),
    ],
)
def test_a_containers_limit_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], free: int | None
) -> None:
    """What is free is the limit less what is used, page cache aside; without a limit, what the machine has."""
    monkeypatch.setattr("llama.checkpoint.memory.Path", lambda _: tmp_path)
    (tmp_path / "memory").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    found = free_bytes(CPU)
    assert found == free if free else found > 10**6
    assert total_bytes(CPU) == 9000 if free else total_bytes(CPU) >= found
