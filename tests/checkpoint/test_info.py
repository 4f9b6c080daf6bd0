"""What `describe` says of a checkpoint: figures worked out by hand, for the demo and for Llama-2's own sizes."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import SMALL, random_weights, save
from conftest import DEMO

from llama import Llama
from llama.checkpoint import info, memory, meta_folder
from llama.checkpoint.info import Info, describe, text
from llama.errors import CheckpointError, ParameterError

SEVEN = {"dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32, "norm_eps": 1e-5, "vocab_size": -1}
SEVENTY = {"dim": 8192, "multiple_of": 4096, "ffn_dim_multiplier": 1.3, "n_heads": 64, "n_kv_heads": 8,
           "n_layers": 80, "norm_eps": 1e-5, "vocab_size": -1}  # fmt: skip


def hollow(params: dict, hidden: int, kv: int, shards: int) -> dict[str, torch.Tensor]:
    """One shard's tensors in bfloat16 without their contents: the shapes of Meta's model parallelism."""
    dim, part = params["dim"], {}
    part["tok_embeddings"], part["output"], part["norm"] = (32000, dim // shards), (32000 // shards, dim), (dim,)
    for i in range(params["n_layers"]):
        attention, feed_forward = f"layers.{i}.attention", f"layers.{i}.feed_forward"
        part[f"{attention}.wq"], part[f"{attention}.wo"] = (dim // shards, dim), (dim, dim // shards)
        part[f"{attention}.wk"] = part[f"{attention}.wv"] = (kv // shards, dim)
        part[f"{feed_forward}.w1"] = part[f"{feed_forward}.w3"] = (hidden // shards, dim)
        part[f"{feed_forward}.w2"] = (dim, hidden // shards)
        part[f"layers.{i}.attention_norm"] = part[f"layers.{i}.ffn_norm"] = (dim,)
    return {f"{name}.weight": torch.empty(shape, dtype=torch.bfloat16, device="meta") for name, shape in part.items()}


@pytest.fixture
def of_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """A folder whose shards seem to hold a whole Llama-2: of_size(params, hidden, kv, shards)."""

    def of_size(params: dict, hidden: int, kv: int, shards: int) -> Path:
        (tmp_path / "params.json").write_text(json.dumps(params))
        for number in range(shards):
            (tmp_path / f"consolidated.{number:02d}.pth").write_bytes(b"x" * 1500)
        monkeypatch.setattr(meta_folder, "open_shard", lambda path: hollow(params, hidden, kv, shards))
        return tmp_path

    return of_size


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """This machine has so many bytes free on its CPU, which runs float32, and on CUDA devices: machine(cpu, *cuda)."""

    def machine(cpu: int, *cuda: int) -> None:
        def free(device: torch.device) -> int:
            return cpu if device.type == "cpu" else cuda[device.index]

        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(cuda))
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
        monkeypatch.setattr(memory, "free_bytes", free)
        monkeypatch.setattr(memory, "total_bytes", lambda device: 2 * free(device))
        own = {"cpu": torch.float32}
        monkeypatch.setattr(info, "choose_dtype", lambda stored, device: own.get(device.type, stored))
        monkeypatch.setattr(info, "held_dtype", lambda stored, dtype, device: dtype)  # as without our kernels

    return machine


# --------------------------------------------------------------------------------------------------------- numbers


def test_the_demo_in_numbers() -> None:
    """Its figures by hand: 2 · 1024 · 192 + 4 · (2 · 192² + 2 · 96 · 192 + 3 · 192 · 448 + 2 · 192) + 192."""
    info = describe(DEMO, 512, 8)
    sizes = ("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden_dim", "vocab_size", "norm_eps")
    assert [info[name] for name in sizes] == [192, 4, 8, 4, 24, 448, 1024, 1e-5]
    assert (info["rope_theta"], info["dtype"], info["ignored_params"]) == (10000.0, "bfloat16", [])
    assert info["parameters"] == 1_869_504 and info["weights_bytes"] == 3_739_008
    assert info["cache_bytes"] == 8 * 512 * 2 * 4 * 4 * 24 * 2  # sequences, tokens, k and v, layers, kv heads, D, bytes
    assert info["shards"] == [{"file": "consolidated.00.pth", "bytes": (DEMO / "consolidated.00.pth").stat().st_size}]
    assert info["processes"] == [1, 2, 4]
    cpu = info["devices"][-1]
    assert cpu["device"] == "cpu" and cpu["fits"] and 0 < cpu["free_bytes"] <= cpu["total_bytes"]


def test_seven_billion_parameters_and_where_they_fit(of_size: Callable, machine: Callable) -> None:
    """6,738,415,616 parameters; a cached token has 2 · 32 · 4096 numbers; a token of a step, its logits and sums."""
    machine(44 * 10**9, 24 * 10**9, 16 * 10**9)
    info = describe(of_size(SEVEN, 11008, 4096, 1), 2048, 8)
    assert (info["parameters"], info["vocab_size"], info["hidden_dim"]) == (6_738_415_616, 32000, 11008)
    assert (info["weights_bytes"], info["cache_bytes"]) == (13_476_831_232, 8_589_934_592)
    assert info["processes"] == [1, 2, 4, 8, 16, 32]
    first, second, cpu = info["devices"]
    assert [device["device"] for device in info["devices"]] == ["cuda:0", "cuda:1", "cpu"]
    assert (first["dtype"], first["weights_bytes"], first["cache_bytes"]) == ("bfloat16", 13_476_831_232, 8_589_934_592)
    assert (cpu["dtype"], cpu["weights_bytes"], cpu["cache_bytes"]) == ("float32", 26_953_662_464, 17_179_869_184)
    assert first["workspace_bytes"] == 2048 * (8 * 4096 + 3 * 11008) * 4 + 3 * 2048 * 32000 * 4 == 1_325_400_064
    assert cpu["workspace_bytes"] == 512 * (8 * 4096 + 3 * 11008) * 4 + 3 * 512 * 32000 * 4 == 331_350_016
    # (24 GB − weights − workspace) / 1.07 GB a sequence = 8.6; (16 − …) = 1.1; (44 − …) / 2.15 = 7.8
    assert [device["fits"] for device in info["devices"]] == [True, False, False]
    assert [device["largest_batch_size"] for device in info["devices"]] == [8, 1, 7]
    assert [device["devices_for_one_sequence"] for device in info["devices"]] == [1, 1, 1]
    assert (second["total_bytes"], second["free_bytes"]) == (32 * 10**9, 16 * 10**9)


def test_seventy_billion_parameters_need_several_devices(of_size: Callable, machine: Callable) -> None:
    """138 GB in bfloat16, 276 GB in float32, over 1, 2, 4 or 8 devices; 18 GB does not hold an eighth and its work."""
    machine(150 * 10**9, 80 * 10**9, 40 * 10**9, 18 * 10**9)
    info = describe(of_size(SEVENTY, 28672, 1024, 8), 4096, 1)
    assert (info["parameters"], info["n_kv_heads"], info["hidden_dim"]) == (68_976_648_192, 8, 28672)
    assert info["weights_bytes"] == 137_953_296_384
    assert info["cache_bytes"] == 4096 * 2 * 80 * 8 * 128 * 2
    assert [shard["file"] for shard in info["shards"]] == [f"consolidated.{i:02d}.pth" for i in range(8)]
    assert [device["largest_batch_size"] for device in info["devices"]] == [0, 0, 0, 0]
    assert not any(device["fits"] for device in info["devices"])
    assert [device["devices_for_one_sequence"] for device in info["devices"]] == [2, 4, None, 2]


def test_what_it_says_fits_does_and_one_more_does_not(
    build: Callable[..., Llama], ckpt_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same reckoning as loading's."""
    needed = memory.need(build().model.params, torch.float32, 1, 512)
    free = needed.weights + needed.workspace + 10 * 128 * needed.cache_per_token + 128
    monkeypatch.setattr(memory, "free_bytes", lambda device: free)
    for asked, fits in ((10, True), (11, False)):
        cpu = describe(ckpt_dir, 128, asked)["devices"][-1]
        assert (cpu["largest_batch_size"], cpu["fits"]) == (10, fits)
    build(max_seq_len=128, max_batch_size=10)


def test_shards_and_ignored_keys(tmp_path: Path) -> None:
    save(tmp_path, {**SMALL, "name": "small", "use_scaled_rope": False}, random_weights(SMALL), 2)
    info = describe(tmp_path, 16, 2)
    assert info["ignored_params"] == ["name", "use_scaled_rope"]
    assert info["shards"] == [
        {"file": name, "bytes": (tmp_path / name).stat().st_size}
        for name in ("consolidated.00.pth", "consolidated.01.pth")
    ]
    assert info["dtype"] == "float32" and info["processes"] == [1, 2, 4]


def test_it_converts_to_json_and_back() -> None:
    info = describe(DEMO, 512, 8)
    assert json.loads(json.dumps(info)) == info
    assert set(info) == set(Info.__annotations__)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_every_cuda_device_is_there() -> None:
    devices = describe(DEMO, 512, 8)["devices"]
    assert [device["device"] for device in devices][:-1] == [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    assert all(0 < device["free_bytes"] <= device["total_bytes"] for device in devices)


# ---------------------------------------------------------------------------------------------------------- errors


def test_errors_are_those_of_the_readers(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist: check ckpt_dir"):
        describe(tmp_path / "none", 512, 8)
    save(tmp_path, {**SMALL, "dim": 32}, random_weights(SMALL))
    with pytest.raises(CheckpointError, match=r"does not fit params\.json"):
        describe(tmp_path, 512, 8)
    (tmp_path / "params.json").write_text("{")
    with pytest.raises(CheckpointError, match="is not JSON"):
        describe(tmp_path, 512, 8)


@pytest.mark.parametrize(("sizes", "said"), [((0, 8), "max_seq_len=0"), ((512, 2.5), r"max_batch_size=2\.5")])
def test_sizes_that_are_none_are_refused(sizes: tuple, said: str) -> None:
    with pytest.raises(ParameterError, match=f"{said} is out of range: expected an integer, 1 or more"):
        describe(DEMO, *sizes)


# ------------------------------------------------------------------------------------------------------------ text

SEVENTY_TEXT = """\
checkpoint    FOLDER
files         8 shards of 1.50 kB
parameters    68,976,648,192 in bfloat16: 137.95 GB
layers        80 of dim 8192, hidden dim 28672
heads         64 of 128, 8 kv heads
vocabulary    32000 tokens
constants     norm_eps 1e-05, rope_theta 1000000
params.json   ignored: name
processes     1, 2, 4 or 8
KV cache      1.34 GB for 1 sequence of 4096 tokens

on this machine                 cuda:0     cuda:1        cpu
memory                       400.00 GB   30.00 GB  300.00 GB
free                         200.00 GB   15.00 GB  150.00 GB
runs in                       bfloat16   bfloat16    float32
weights                      137.95 GB  137.95 GB  275.91 GB
KV cache                       1.34 GB    1.34 GB    2.68 GB
workspace                      2.03 GB    2.03 GB  506.99 MB
fits                               yes         no         no
largest max_batch_size              44       none       none
such devices for 1 sequence          1  no number          2
"""


def test_the_text_reads_like_this(of_size: Callable, machine: Callable) -> None:
    machine(150 * 10**9, 200 * 10**9, 15 * 10**9)
    folder = of_size({**SEVENTY, "rope_theta": 1e6, "name": "70B"}, 28672, 1024, 8)
    assert text(describe(folder, 4096, 1)) + "\n" == SEVENTY_TEXT.replace("FOLDER", str(folder))


def test_the_text_leaves_out_what_does_not_apply() -> None:
    """No keys ignored, and every device holds a sequence."""
    said = text(describe(DEMO, 512, 8))
    assert "params.json" not in said and "such devices" not in said
    assert re.search(r"^files +1 shard of 3\.75 MB$", said, re.MULTILINE)
    assert re.search(r"^KV cache +6\.29 MB for 8 sequences of 512 tokens$", said, re.MULTILINE)


# ------------------------------------------------------------------------------------------------------- placement

PLACED_TEXT = """\
as placed, in bfloat16            weights   KV cache  workspace        limit
cuda:0: embeddings, layers 0-34  60.42 GB  587.20 MB    1.24 GB     63.00 GB
cuda:1: layers 35-53             32.51 GB  318.77 MB    1.24 GB     35.00 GB
cpu: layers 54-70                29.09 GB  285.21 MB    1.24 GB     35.00 GB
disk: layers 71-79, output       15.93 GB  150.99 MB    4.21 GB  that of cpu
fits: yes
"""


def placed_text(found: Info) -> str:
    return text(found).partition("as placed")[2]


def test_the_map_is_shown_before_anything_is_read(of_size: Callable, machine: Callable) -> None:
    """Also of devices that this machine does not have; a map by hand that does not fit says why."""
    machine(150 * 10**9)
    folder, limits = of_size(SEVENTY, 28672, 1024, 8), {"cuda:0": "63GB", "cuda:1": "35GB", "cpu": "35GB"}
    found = describe(folder, 4096, 1, limits)
    assert "as placed" + placed_text(found) + "\n" == PLACED_TEXT
    assert json.loads(json.dumps(found)) == found
    stages = found["placement"]["stages"]
    assert [(stage["device"], stage["layers"]) for stage in stages] == [
        ("cuda:0", 35), ("cuda:1", 19), ("cpu", 17), ("disk", 9)
    ]  # fmt: skip
    by_hand = describe(folder, 4096, 1, limits, {"layers.0-39": "cuda:0", "layers.40-79": "cuda:1"})
    assert not by_hand["placement"]["fits"] and by_hand["placement"]["reason"] in placed_text(by_hand)
    assert (
        placed_text(by_hand).splitlines()[-1].startswith("fits: no, not enough memory on cuda:0 for embeddings, layers")
    )
    assert describe(folder, 4096, 1)["placement"] is None and "as placed" not in text(describe(folder, 4096, 1))
