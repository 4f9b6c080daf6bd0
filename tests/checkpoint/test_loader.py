"""From a checkpoint folder to weights: resharding, what is refused and how it is said, memory."""

import hashlib
import io
import os
import re
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import SMALL, SPLIT, held, random_weights, save, unpacked
from conftest import DEMO
from near_ties import logits_of
from torch import Tensor

from llama import Llama, ModelArgs, Transformer
from llama.checkpoint import loader, memory
from llama.checkpoint.files import find_shards, open_shard
from llama.checkpoint.layout import check_split, expected_shapes
from llama.checkpoint.loader import load
from llama.checkpoint.meta_folder import MetaFolder
from llama.device import choose_dtype
from llama.errors import CheckpointError, DeviceError, TokenizerError
from llama.kernels import library, plain
from llama.model import linear as linear_file
from llama.model import transformer as model_file
from llama.options import RunOptions
from llama.parallel import initialize

CPU = torch.device("cpu")
# Six heads and three kv heads: two shards cut a kv head in the middle, three processes get one each.
SIX = {**SMALL, "dim": 48, "n_heads": 6, "n_kv_heads": 3, "vocab_size": 504, "multiple_of": 48}
JOINED = {"wqkv": ("wq", "wk", "wv"), "w13": ("w1", "w3")}


def load_folder(folder: Path, dtype: torch.dtype | None = torch.float32) -> Transformer:
    initialize(CPU, None)
    source = MetaFolder(folder)
    return load(source, source.args, RunOptions(max_seq_len=16, max_batch_size=2, max_step_tokens=64), CPU, dtype)


def expected_parameters(weights: dict[str, Tensor], processes: int, rank: int) -> dict[str, Tensor]:
    """What one process holds, by the model's names: its slice of each tensor, some then joined by rows."""
    local = {}
    for name, tensor in weights.items():
        axis = SPLIT.get(name.split(".")[-2])
        local[name] = tensor if axis is None else tensor.chunk(processes, axis)[rank]
    for i in range(1 + max(int(name.split(".")[1]) for name in weights if name.startswith("layers."))):
        for part, joined in (("attention", "wqkv"), ("feed_forward", "w13")):
            rows = [local.pop(f"layers.{i}.{part}.{one}.weight") for one in JOINED[joined]]
            local[f"layers.{i}.{part}.{joined}.weight"] = torch.cat(rows)
    return local


def assert_same(model: Transformer, expected: dict[str, Tensor]) -> None:
    """Bit for bit, names, shapes and dtypes included."""
    found = held(model)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        weight = unpacked(found[name]) if tensor.dim() == 2 else found[name]
        assert torch.equal(weight[: len(tensor)], tensor), name


# ----------------------------------------------------------------------------------------------------- resharding


@pytest.mark.parametrize("shards", [1, 2, 4, 8])
def test_any_number_of_shards_loads_into_one_process(build: Callable[..., Llama], small: dict, weights: dict,
                                                     tmp_path: Path, shards: int) -> None:  # fmt: skip
    """M → 1: the same weights bit for bit, so the same completions with the same log-probabilities."""
    resharded = build(save(tmp_path, small, weights, shards))
    assert_same(resharded.model, expected_parameters(weights, 1, 0))
    prompts = [[1, 5, 9, 200], [1, 7]]
    assert resharded.generate(prompts, 8, 0, logprobs=True) == build().generate(prompts, 8, 0, logprobs=True)


@pytest.mark.parametrize(
    ("params", "shards", "processes"),
    [(SMALL, m, n) for m, n in [(1, 2), (2, 1), (8, 1), (8, 2), (2, 4), (4, 2), (1, 4), (4, 4)]]
    + [(SIX, m, n) for m, n in [(2, 3), (1, 3), (6, 3), (3, 1)]],
)
def test_every_rank_gets_its_slices(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, params: dict, shards: int, processes: int
) -> None:
    """M → N: process r holds the r-th of N parts of every split tensor, whichever shards it lies in."""
    initialize(CPU, None)
    weights = random_weights(params)
    folder = save(tmp_path, params, weights, shards)
    for rank in range(processes):
        for file in (loader, model_file, linear_file):
            monkeypatch.setattr(file, "model_parallel_size", lambda: processes)
        monkeypatch.setattr(loader, "model_parallel_rank", lambda rank=rank: rank)
        model = Transformer(ModelArgs(**params))
        held = loader.Held(CPU, torch.float32, torch.float32)
        loader.fill(model, MetaFolder(folder), {name: held for name, _ in model.named_parameters()})
        assert_same(model, expected_parameters(weights, processes, rank))


@pytest.mark.parametrize(
    ("processes", "said"),
    [
        (3, "2 shards, but 8 heads cannot be split over 3 processes: start 1, 2 or 4"),
        (8, "2 shards, but 4 kv heads cannot be split over 8 processes: start 1, 2 or 4"),
        (16, "2 shards, but 8 heads cannot be split over 16 processes: start 1, 2 or 4"),
    ],
)
def test_a_world_that_divides_nothing_is_told_the_numbers_that_do(processes: int, said: str) -> None:
    with pytest.raises(DeviceError, match=re.escape(said)):
        check_split(ModelArgs(**SMALL), 2, processes)


@pytest.mark.parametrize(
    ("change", "processes", "said"),
    [
        ({"vocab_size": 511}, 2, "the vocabulary of 511 cannot be split over 2 processes: start 1"),
        ({"multiple_of": 171}, 2, "the hidden dim of 171 cannot be split over 2 processes: start 1"),
    ],
)
def test_sizes_that_are_no_heads_are_split_evenly_too(change: dict, processes: int, said: str) -> None:
    with pytest.raises(DeviceError, match=f"^1 shard, but {re.escape(said)}$"):
        check_split(ModelArgs(**{**SMALL, **change}), 1, processes)


# ---------------------------------------------------------------------------------------------------------- dtypes


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("wanted", [torch.bfloat16, torch.float16, torch.float32, None])
def test_weights_keep_their_dtype_or_are_converted(
    tmp_path: Path, stored: torch.dtype, wanted: torch.dtype | None
) -> None:
    """Asked for: rounded once, from what is stored. Not asked for: the stored dtype wherever the CPU is fast in it."""
    weights = random_weights(SMALL, stored)
    model = load_folder(save(tmp_path, SMALL, weights, 2), wanted)
    dtype = wanted or choose_dtype(stored, CPU)
    assert model.dtype == dtype and dtype in (stored, wanted, torch.float32)
    held = dtype if wanted else loader.held_dtype(stored, dtype, CPU)
    dtypes = {name: held if re.search(r"\.w[qkvo123]\.|output", name) else dtype for name in weights}
    assert dtypes["layers.0.attention.wq.weight"] == held and dtypes["layers.0.ffn_norm.weight"] == dtype
    assert_same(model, expected_parameters({name: tensor.to(dtypes[name]) for name, tensor in weights.items()}, 1, 0))


# ---------------------------------------------------------------------------------------- what does not fit params


def test_old_files_rope_frequencies_are_ignored(tmp_path: Path) -> None:
    weights = random_weights(SMALL)
    model = load_folder(save(tmp_path, SMALL, {**weights, "rope.freqs": torch.ones(4)}))
    assert_same(model, expected_parameters(weights, 1, 0))


def test_every_tensor_that_does_not_fit_is_listed(tmp_path: Path) -> None:
    """Missing, unexpected, of a wrong shape, of a wrong kind: all in one message, which names the file."""
    weights = random_weights(SMALL)
    del weights["layers.1.attention.wk.weight"]
    weights["layers.0.attention.wq.bias"] = torch.zeros(64)
    weights["norm.weight"] = torch.ones(63)
    weights["layers.0.ffn_norm.weight"] = torch.ones(64, dtype=torch.int8)
    with pytest.raises(CheckpointError) as error:
        load_folder(save(tmp_path, SMALL, weights))
    said = str(error.value)
    assert f"{tmp_path}/consolidated.00.pth does not fit params.json" in said
    assert "layers.1.attention.wk.weight is missing" in said
    assert "'layers.0.attention.wq.bias' is unexpected" in said
    assert "norm.weight has shape (63,) where params.json and 1 shards make it (64,)" in said
    assert "layers.0.ffn_norm.weight is torch.int8, not a floating-point tensor" in said


def test_a_long_list_of_faults_is_cut_and_counted(tmp_path: Path) -> None:
    """A checkpoint of fewer layers than params.json says: the first five, then how many more."""
    with pytest.raises(CheckpointError, match=r"layers\.2\.attention\.wq\.weight is missing; .*; and 4 more$"):
        load_folder(save(tmp_path, {**SMALL, "n_layers": 3}, random_weights(SMALL)))


def test_layers_that_no_file_holds_are_not_listed_one_by_one(tmp_path: Path) -> None:
    """A number of layers beyond that of all tensors is refused before anything grows with it."""
    with pytest.raises(
        CheckpointError, match=r"sets n_layers=2147483647, but consolidated\.00\.pth has only 21 tensors"
    ):
        load_folder(save(tmp_path, {**SMALL, "n_layers": 2147483647}, random_weights({**SMALL, "n_layers": 2})))


def test_the_shard_that_does_not_fit_is_the_one_named(tmp_path: Path) -> None:
    """A file of another checkpoint among the shards."""
    folder = save(tmp_path / "two", SMALL, random_weights(SMALL), 2)
    other = save(tmp_path / "four", SMALL, random_weights(SMALL), 4)
    (other / "consolidated.01.pth").replace(folder / "consolidated.01.pth")
    with pytest.raises(CheckpointError, match=r"consolidated\.01\.pth does not fit.*2 shards make it \(512, 32\)"):
        load_folder(folder)


@pytest.mark.parametrize("sizes", [{"vocab_size": 511}, {"multiple_of": 171}])
def test_what_shards_cannot_share_is_said(tmp_path: Path, sizes: dict) -> None:
    """Each shard has half of it, rounded down: a row or column lies in none."""
    params = {**SMALL, **sizes}
    even = {**SMALL, **{name: value - 1 for name, value in sizes.items()}}
    folder = save(tmp_path, even, random_weights(even), 2)
    for path in folder.glob("*.pth"):  # what every shard has whole is of the odd size
        whole = random_weights(params)
        torch.save({**torch.load(path), "tok_embeddings.weight": whole["tok_embeddings.weight"][:, :32].clone()}, path)
    (folder / "params.json").write_text(repr(params).replace("'", '"'))
    with pytest.raises(CheckpointError, match=r"has (511|171) rows or columns, which 2 shards cannot share"):
        load_folder(folder)


def test_a_file_without_an_embedding_is_no_llama(build: Callable[..., Llama], small: dict, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no tok_embeddings\.weight: it is not a Llama-2 model"):
        build(save(tmp_path, small, {"model.embed_tokens.weight": torch.ones(2, 2)}))


# --------------------------------------------------------------------------------------------------- finding shards


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).write_bytes(b"x")
    return folder


def test_shards_are_found_in_order(tmp_path: Path) -> None:
    touch(tmp_path, "consolidated.01.pth", "params.json", "consolidated.00.pth", "tokenizer.model")
    assert find_shards(tmp_path) == [tmp_path / "consolidated.00.pth", tmp_path / "consolidated.01.pth"]


def test_more_than_ten_shards_are_found_in_order(tmp_path: Path) -> None:
    names = [f"consolidated.{i:02d}.pth" for i in range(12)]
    touch(tmp_path, *reversed(names))
    assert [path.name for path in find_shards(tmp_path)] == names


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ((), "has no consolidated.*.pth; it is empty: ckpt_dir is the folder with the weights, or a .gguf file"),
        (("model.safetensors", "config.json"), "no consolidated.*.pth; it holds config.json, model.safetensors:"),
        (tuple("abcdefgh"), "it holds a, b, c, d, e, and 3 more:"),
        (("consolidated.00.pth", "consolidated.02.pth"), "lacks consolidated.01.pth of its 3 shards: download"),
        (("consolidated.01.pth",), "lacks consolidated.00.pth of its 2 shards: download"),
        (("consolidated.0.pth",), "lacks consolidated.00.pth of its 1 shards"),
        (("consolidated.00.pth", "consolidated.00 (1).pth"), "holds consolidated.00 (1).pth beside its 1 shards"),
        (("consolidated.00.pth", "consolidated.old.pth"), "holds consolidated.old.pth beside its 1 shards: remove"),
    ],
)
def test_what_is_wrong_with_a_folder_is_said(tmp_path: Path, names: tuple[str, ...], said: str) -> None:
    with pytest.raises(CheckpointError, match=re.escape(said)) as error:
        find_shards(touch(tmp_path, *names))
    assert str(tmp_path) in str(error.value)


def test_the_last_shard_missing_is_known_from_the_checklist(tmp_path: Path) -> None:
    """Nothing in the names 00 and 01 tells that there were four; checklist.chk does."""
    touch(tmp_path, "consolidated.00.pth", "consolidated.01.pth")
    lines = [f"{'0' * 32}  consolidated.{i:02d}.pth" for i in range(4)]
    (tmp_path / "checklist.chk").write_text("\n".join([*lines, f"{'0' * 32}  params.json"]) + "\n")
    with pytest.raises(CheckpointError, match=r"lacks consolidated\.02\.pth, consolidated\.03\.pth of its 4 shards"):
        find_shards(tmp_path)


def test_a_missing_folder_and_a_file_instead_of_one(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"checkpoint folder {tmp_path}/none does not exist: check ckpt_dir"):
        find_shards(tmp_path / "none")
    with pytest.raises(CheckpointError, match=f"{tmp_path}/file is a file: ckpt_dir is the folder that"):
        find_shards(touch(tmp_path, "file") / "file")


# --------------------------------------------------------------------------------------------------- opening a file


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    return save(tmp_path, SMALL, random_weights(SMALL)) / "consolidated.00.pth"


def refused(path: Path, data: bytes, said: str) -> None:
    """open_shard refuses a file of these bytes, and its message names the path, and says this."""
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=re.escape(said)) as error:
        open_shard(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_good_file_opens(shard: Path) -> None:
    tensors = open_shard(shard)
    assert all(torch.equal(tensors[name], tensor) for name, tensor in random_weights(SMALL).items())


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "is empty (0 bytes): download it again"),
        (b"\n<!DOCTYPE html><title>403</title>", "is an HTML page (34 bytes), not weights: the download link failed"),
        (b"<?xml version='1.0'?><Error/>", "is an HTML page (29 bytes)"),
        (b"version https://git-lfs.github.com/spec/v1\nsize 9\n", "is a git-lfs pointer (50 bytes), not the weights"),
        (b"\x00\x01garbage", "(9 bytes) is not a PyTorch file: it begins with b'\\x00\\x01garbag'; download"),
        (b"PK\x03\x04" + b"\0" * 99, "ends early (103 bytes, its table of contents is missing)"),
    ],
)
def test_a_file_that_holds_no_weights_is_named_for_what_it_is(tmp_path: Path, data: bytes, said: str) -> None:
    refused(tmp_path / "consolidated.00.pth", data, said)


@pytest.mark.parametrize("part", [0.1, 0.5, 0.999])
def test_a_download_that_stopped_is_said_with_its_size(shard: Path, part: float) -> None:
    data = shard.read_bytes()
    n = int(part * len(data))
    refused(shard, data[:n], f"ends early ({n} bytes, its table of contents is missing): download it again")


def test_the_old_format_of_torch_is_refused_unread(tmp_path: Path) -> None:
    """A bare pickle cannot be mapped; the message says how to convert it."""
    buffer = io.BytesIO()
    torch.save({"a": torch.ones(2)}, buffer, _use_new_zipfile_serialization=False)
    size = len(buffer.getvalue())
    refused(tmp_path / "a.pth", buffer.getvalue(), f"({size} bytes) is a bare pickle, not the zip format")


class Malicious:
    """Unpickling it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return open, (str(self.path), "w")


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path: Path, zipped: bool) -> None:
    proof = tmp_path / "executed"
    buffer = io.BytesIO()
    table = {"tok_embeddings.weight": torch.ones(2, 2), "x": Malicious(proof)}
    torch.save(table, buffer, _use_new_zipfile_serialization=zipped)
    path = tmp_path / "consolidated.00.pth"
    refused(path, buffer.getvalue(), "holds pickled code (io.open)" if zipped else "is a bare pickle")
    assert not proof.exists()
    torch.load(path, weights_only=False)["x"].close()  # the test can fail: here it is run
    assert proof.exists()


@pytest.mark.parametrize(
    ("written", "said"),
    [("io open", "io.open"), ("_io open", "io.open"), ("posix system", "os.system"), ("nt system", "os.system"),
     ("runpy run_path", "runpy.run_path")],
)  # fmt: skip
def test_code_in_a_pickle_is_called_what_users_call_it(tmp_path: Path, written: str, said: str) -> None:
    """Whatever the Python that wrote it does: its open is in io up to 3.11, in _io since."""
    path = tmp_path / "consolidated.00.pth"
    torch.save({"x": Malicious(tmp_path)}, path)
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, record in records.items():
            archive.writestr(name, re.sub(rb"c_?io\nopen\n", b"c%s\n%s\n" % tuple(written.encode().split()), record))
    refused(path, path.read_bytes(), f"holds pickled code ({said}), not only tensors")


@pytest.mark.parametrize(
    "content",
    [
        [torch.ones(2)],
        {"model": {"a": torch.ones(2)}},
        {"a": torch.ones(2), "step": 3},
        torch.ones(2),
        {1: torch.ones(2)},
    ],
)
def test_what_is_no_flat_table_of_tensors_is_refused(tmp_path: Path, content: object) -> None:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    refused(tmp_path / "a.pth", buffer.getvalue(), "does not hold a flat table of named tensors, as Meta's files do")


def test_a_zip_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("readme.txt", "the weights are elsewhere")
    refused(tmp_path / "a.pth", buffer.getvalue(), "cannot be read as a PyTorch file (")


def rewritten(shard: Path, change: Callable[[bytes], bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """The bytes of a .pth file with its data.pkl changed, all checksums of the zip right."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(shard) as old, zipfile.ZipFile(buffer, "w", compression) as new:
        for name in old.namelist():
            data = old.read(name)
            new.writestr(name, change(data) if name.endswith("/data.pkl") else data)
    return buffer.getvalue()


@pytest.mark.parametrize("kept", [0, 1, 7, 40, -1])
def test_a_damaged_table_is_refused(shard: Path, kept: int) -> None:
    """Whatever the unpickler trips over, the user reads one line."""
    refused(shard, rewritten(shard, lambda data: data[:kept]), str(shard))


def test_a_table_of_nonsense_is_refused(shard: Path) -> None:
    refused(shard, rewritten(shard, lambda data: data[:2] + b"0" * 20 + data[22:]), str(shard))


def test_a_compressed_zip_is_refused(shard: Path) -> None:
    """Repacked by hand, its tensors cannot be mapped: what is mapped would be compressed bytes, taken for weights."""
    refused(shard, rewritten(shard, lambda data: data, zipfile.ZIP_DEFLATED), str(shard))


@pytest.mark.parametrize("kind", ["a folder", "a broken link"])
def test_a_shard_that_is_no_readable_file_is_refused(tmp_path: Path, kind: str) -> None:
    """Such as the links that a download tool's cache leaves behind when it is moved."""
    path = tmp_path / "consolidated.00.pth"
    if kind == "a folder":
        path.mkdir()
    else:
        path.symlink_to(tmp_path / "moved away")
    with pytest.raises(CheckpointError, match=re.escape(str(path))):
        open_shard(path)


# ------------------------------------------------------------------------------------------------------- vocabulary


@pytest.mark.parametrize(
    ("declared", "weights_have", "error", "said"),
    [
        (None, -8, TokenizerError, "they do not belong together, and the tokenizer looks wrong"),
        ("weights", -8, TokenizerError, "the tokenizer looks wrong; use the one that came with these weights"),
        ("tokenizer", -8, CheckpointError, "the weights look wrong; use those that belong to this tokenizer"),
        (None, 32000, TokenizerError, "the tokenizer looks wrong; use the one that came with these weights"),
        ("tokenizer", 32000, CheckpointError, "the weights look wrong"),
        (7, 0, TokenizerError, "params.json says 7: they do not belong together"),
    ],
)
def test_a_vocabulary_that_does_not_fit_says_which_looks_wrong(
    build: Callable[..., Llama], small: dict, tmp_path: Path, declared: str | int | None, weights_have: int,
    error: type[Exception], said: str,
) -> None:  # fmt: skip
    """Of weights, tokenizer and params.json the odd one out; -1 in params.json (as Meta ships) leaves it to 32000."""
    words = small["vocab_size"]
    rows = weights_have if weights_have > 100 else words + weights_have
    params = {**small, "dim": 16, "n_heads": 2, "n_kv_heads": 1, "vocab_size": rows}
    sizes = {"weights": rows, "tokenizer": words, None: -1}
    weights = random_weights(params)
    folder = save(tmp_path, {**params, "vocab_size": sizes.get(declared, declared)}, weights)
    with pytest.raises(error, match=re.escape(said)) as raised:
        build(folder)
    assert f"the weights have {rows} tokens, the tokenizer {DEMO / 'tokenizer.model'} has {words}" in str(raised.value)


# ----------------------------------------------------------------------------------------------------------- memory


def test_too_little_memory_is_known_before_anything_is_allocated(
    build: Callable[..., Llama], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message has the numbers and sizes that fit: with them the model builds, with one more it does not."""
    args = build().model.params
    needed = memory.need(args, torch.float32, 1, 512)
    free = needed.weights + needed.workspace + 10 * 128 * needed.cache_per_token + 128
    monkeypatch.setattr(memory, "free_bytes", lambda device: free)
    with monkeypatch.context() as patch:
        patch.setattr(loader, "Transformer", lambda *_, **__: pytest.fail("allocated before the check"))
        with pytest.raises(DeviceError) as error:
            build(max_seq_len=128, max_batch_size=20)
    said = str(error.value)
    assert said.startswith("not enough memory on cpu: weights ") and memory.in_units(free) in said
    batch, length = re.search(r"max_batch_size=(\d+) at max_seq_len=128 or max_seq_len=(\d+) at", said).groups()
    assert (int(batch), int(length)) == (10, 64) and "max_seq_len × max_batch_size up to 1280 fits" in said
    build(max_seq_len=128, max_batch_size=10)
    build(max_seq_len=64, max_batch_size=20)
    for sizes in ((128, 11), (65, 20)):
        with pytest.raises(DeviceError, match="not enough memory"):
            build(max_seq_len=sizes[0], max_batch_size=sizes[1])


def test_weights_that_do_not_fit_at_all_are_said_so(
    build: Callable[..., Llama], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1000)
    with pytest.raises(DeviceError, match="the weights alone leave no room; run on more processes or a larger device"):
        build()


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_what_weights_and_cache_need_is_exact(processes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The estimate's weights and cache are the bytes that a model's parameters and a cache have."""
    initialize(CPU, None)
    for file in (model_file, linear_file):
        monkeypatch.setattr(file, "model_parallel_size", lambda: processes)
    args = ModelArgs(**SMALL)
    model = Transformer(args)
    needed = memory.need(args, torch.bfloat16, processes, 512)
    assert needed.weights == 2 * sum(parameter.numel() for parameter in model.parameters())
    cache = model.new_cache(3, 50)
    elements = sum(tensor.numel() for tensor in (*cache.keys, *cache.values))
    assert 150 * needed.cache_per_token == 2 * elements


def test_free_memory_is_shared_among_the_processes_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: type("Memory", (), {"available": 8000}))
    monkeypatch.setattr(memory, "_cgroup", lambda: (9000, 6000))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert memory.free_bytes(CPU) == 6000
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert memory.free_bytes(CPU) == 1500


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, 1 << 62),
        ({"memory.max": "max\n", "memory.current": "5\n"}, 1 << 62),
        ({"memory.max": "1000\n", "memory.current": "400\n", "memory.stat": "anon 400\ninactive_file 0\n"}, 600),
        ({"memory.max": "1000\n", "memory.current": "900\n", "memory.stat": "anon 400\ninactive_file 500\n"}, 600),
        ({"memory.max": "1000\n", "memory.current": "900\n", "memory.stat": "inactive_file 9\nactive_file 91\n"}, 200),
    ],
)
def test_a_containers_limit_counts_but_not_its_page_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, files: dict[str, str], free: int
) -> None:
    """A checkpoint just downloaded fills the page cache, which `memory.current` includes and the kernel gives back."""
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(memory, "Path", lambda path: tmp_path if path == "/sys/fs/cgroup" else Path(path))
    assert memory._cgroup()[1] == free


LOAD = """
import re, sys
from llama import Llama

def resident(which):  # "VmRSS" now, "VmHWM" at its peak; ru_maxrss would begin at the parent's
    return 1024 * int(re.search(which + r":\\s+(\\d+)", open("/proc/self/status").read())[1])

folder, tokenizer, stored = sys.argv[1:]
for dtype, size in (("bfloat16", int(stored)), ("float32", 2 * int(stored))):
    before = resident("VmRSS")
    model = Llama.build(folder, tokenizer, 512, 4, device="cpu", dtype=dtype)
    cache = sum(t.nbytes for t in (*model.engine.cache.keys, *model.engine.cache.values))
    print(dtype, resident("VmHWM") - before, size + cache)
    del model
"""


@pytest.mark.skipif(sys.platform != "linux", reason="mapped pages are let go on Linux only")
def test_loading_takes_no_second_copy(tmp_path: Path, small: dict) -> None:
    """Peak memory grows by the weights, the cache and less than 0.1 GB, kept in their dtype or converted."""
    params = {**small, "dim": 1024, "n_layers": 8, "multiple_of": 256}
    args = ModelArgs(**params)
    weights = {name: torch.ones(shape, dtype=torch.bfloat16) for name, shape in expected_shapes(args).items()}
    stored = sum(tensor.nbytes for tensor in weights.values())
    assert stored > 180e6
    save(tmp_path, params, weights, 2)
    arguments = [str(tmp_path), str(DEMO / "tokenizer.model"), str(stored)]
    done = subprocess.run([sys.executable, "-c", LOAD, *arguments], capture_output=True, text=True, check=True)
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [line[0] for line in lines] == ["bfloat16", "float32"]
    for _, growth, least in lines:
        assert int(growth) <= int(least) + 100e6  # half of the file


# ----------------------------------------------------------------------------------- checksums, ownership, side effects


@pytest.fixture
def checked(tmp_path: Path, small: dict, weights: dict) -> Path:
    """A checkpoint of two shards with its checklist.chk."""
    folder = save(tmp_path / "checked", small, weights, 2)
    sums = [f"{hashlib.md5(path.read_bytes()).hexdigest()}  {path.name}\n" for path in sorted(folder.iterdir())]
    (folder / "checklist.chk").write_text("".join(sums))
    return folder


def test_verify_accepts_an_intact_checkpoint(build: Callable[..., Llama], checked: Path) -> None:
    build(checked, verify=True)


@pytest.mark.parametrize("name", ["consolidated.00.pth", "consolidated.01.pth", "params.json"])
def test_verify_names_the_file_that_differs(build: Callable[..., Llama], checked: Path, name: str) -> None:
    """One byte that nothing else would notice: without verify the checkpoint loads."""
    path = checked / name
    data = bytearray(path.read_bytes())
    place = data.index(b" ") if name == "params.json" else len(data) // 2
    data[place] = data[place] ^ 1 if name != "params.json" else ord("\n")
    path.write_bytes(data)
    build(checked)
    with pytest.raises(CheckpointError, match=f"does not match its checklist.chk: {name} differs; download again"):
        build(checked, verify=True)


def test_verify_without_a_checklist_says_so(build: Callable[..., Llama]) -> None:
    with pytest.raises(CheckpointError, match=r"checklist\.chk is missing, so nothing can be verified"):
        build(verify=True)


def test_files_may_be_replaced_or_deleted_once_they_are_loaded(
    build: Callable[..., Llama], tmp_path: Path, small: dict, weights: dict
) -> None:
    """Where the model's memory is theirs, it keeps what it has opened."""
    path = save(tmp_path, small, weights) / "consolidated.00.pth"
    model = build(tmp_path).model
    (tmp_path / "new").write_bytes(b"\xff" * path.stat().st_size)
    (tmp_path / "new").replace(path)
    assert_same(model, expected_parameters(weights, 1, 0))
    path.unlink()
    assert_same(model, expected_parameters(weights, 1, 0))


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/smaps is of Linux")
@pytest.mark.skipif(library.load()[0] is None, reason="there are no kernels for it")
@pytest.mark.parametrize("shards", [1, 2])
def test_matrices_stay_in_the_files_where_our_kernels_read_them_there(
    build: Callable[..., Llama], tmp_path: Path, small: dict, weights: dict, shards: int
) -> None:
    """Of several shards those that are split by rows; as another dtype none, and none of them quantised."""
    folder = save(tmp_path, small, weights, shards)
    layer = build(folder).model.layers[0]
    assert len(layer.attention.wqkv.parts) == 3 * shards and not layer.attention.wqkv.weight.numel()
    assert is_mapped(layer.feed_forward.w13.parts[-1], folder) and is_mapped(layer.feed_forward.w13.parts[0], folder)
    assert is_mapped(layer.attention.wo.weight, folder) is (shards == 1)
    for other in (build(folder, dtype="bfloat16"), build(folder, quantize="int8")):
        assert not any(is_mapped(parameter, folder) for parameter in other.model.layers.parameters())


def is_mapped(tensor: Tensor, folder: Path) -> bool:
    """Whether a tensor's memory is that of a file in the folder."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, end = (int(part, 16) for part in line.split()[0].split("-"))
        if begin <= tensor.data_ptr() < end:
            return str(folder) in line
    return False


def test_build_leaves_no_trace_in_the_process(build: Callable[..., Llama]) -> None:
    """Default dtype and device, standard output, random state, threads: as before."""

    def state() -> tuple:
        return (
            torch.get_default_dtype(), torch.get_default_device(), sys.stdout, sys.stderr, torch.initial_seed(),
            torch.get_rng_state().tolist(), torch.get_num_threads(), torch.is_grad_enabled(), os.environ.copy(),
            os.getcwd(), warnings.filters[:],
        )  # fmt: skip

    torch.manual_seed(1234)
    before = state()
    build(dtype="bfloat16", seed=7).generate([[1, 5]], 2)
    assert state() == before


# ------------------------------------------------------------------------------------- 16 bits beside float32


@pytest.fixture
def halves(tmp_path: Path, small: dict, weights: dict[str, torch.Tensor]) -> Path:
    """The small model in float16, as many people's files of Llama-2 are."""
    return save(tmp_path / "half", small, {name: tensor.half() for name, tensor in weights.items()})


@pytest.mark.skipif(library.load()[0] is None, reason="there are no kernels for it")
@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
def test_matrices_keep_their_16_bits_beside_float32(
    build: Callable[..., Llama], small: dict, weights: dict[str, torch.Tensor], tmp_path: Path, stored: torch.dtype,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    """Where the processor cannot multiply in them: half of the memory, and the results of float32."""
    folder = save(tmp_path / "half", small, {name: tensor.to(stored) for name, tensor in weights.items()})
    monkeypatch.setattr(loader, "choose_dtype", lambda stored, device: torch.float32)
    llama, whole = build(folder), build(folder, dtype="float32")
    assert f"{str(stored)[6:]} weights, float32 on cpu" in capsys.readouterr().err
    assert llama.model.dtype == torch.float32 == whole.model.output.weight.dtype
    assert {llama.model.output.weight.dtype, llama.model.layers[0].attention.wqkv.weight.dtype} == {stored}
    own = sum(parameter.nbytes for parameter in llama.model.parameters())
    needed = memory.need(llama.model.params, torch.float32, 1, 512, held=stored)
    assert own == needed.weights < 0.7 * sum(parameter.nbytes for parameter in whole.model.parameters())
    tokens = torch.randint(3, 512, (60,), generator=torch.Generator().manual_seed(0)).tolist()
    torch.testing.assert_close(logits_of(llama)(tokens), logits_of(whole)(tokens), atol=1e-4, rtol=0)
    few = tokens[: plain.most_rows()]
    assert logits_of(llama)(few).equal(logits_of(whole)(few))  # the same numbers in the same order


def test_what_is_asked_for_is_held(build: Callable[..., Llama], halves: Path) -> None:
    """float32 is float32 then, for matrices too; torch.compile has none of our kernels."""
    assert build(halves, dtype="float32").model.output.weight.dtype == torch.float32
    assert loader.held_dtype(torch.float16, torch.float16, torch.device("cpu")) == torch.float16
    assert loader.held_dtype(torch.float32, torch.float32, torch.device("cpu")) == torch.float32
