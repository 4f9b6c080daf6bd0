"""Checkpoints written anew: the same weights in any number of shards, all of them or none, a tensor at a time."""

import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import weakref
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from checkpoints import SMALL, held, random_weights, save
from conftest import DEMO, ROOT
from torch import Tensor

from llama import Llama, ModelArgs
from llama.checkpoint import source, writer
from llama.checkpoint.checklist import read_checklist, verify
from llama.checkpoint.files import open_shard
from llama.checkpoint.layout import expected_shapes
from llama.checkpoint.pth_writer import STORAGES, write_shard
from llama.checkpoint.source import open_checked
from llama.checkpoint.writer import reshard
from llama.errors import CheckpointError, DeviceError, ParameterError
from llama.wording import in_units


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Bit for bit, names, shapes and dtypes included."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


# ------------------------------------------------------------------------------------------------------ resharding


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shards", "processes"), [(1, 1), (1, 2), (2, 1), (2, 4), (4, 2)])
def test_shards_are_those_of_a_checkpoint_saved_so(
    tmp_path: Path, shards: int, processes: int, dtype: torch.dtype
) -> None:
    """M → N: each file holds what Meta's split of the same weights puts there; params.json is the same file."""
    weights = random_weights(SMALL, dtype)
    written = reshard(save(tmp_path / "in", SMALL, weights, shards), tmp_path / "out", processes)
    expected = save(tmp_path / "expected", SMALL, weights, processes)
    assert written == [tmp_path / "out" / f"consolidated.{rank:02d}.pth" for rank in range(processes)]
    for path in written:
        assert_equal(torch.load(path, weights_only=True), torch.load(expected / path.name, weights_only=True))
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {path.name for path in expected.iterdir()} | {"checklist.chk"}
    assert (tmp_path / "out" / "params.json").read_bytes() == (tmp_path / "in" / "params.json").read_bytes()


def test_there_and_back_gives_the_same_files(tmp_path: Path) -> None:
    """1 → 4 → 2 → 1 is 1 → 1, to the byte: nothing but the weights goes into a file, no time and no path."""
    folder = save(tmp_path / "in", SMALL, random_weights(SMALL))
    (once,) = reshard(folder, tmp_path / "once", 1)
    for processes in (4, 2, 1):
        reshard(folder, tmp_path / str(processes), processes)
        folder = tmp_path / str(processes)
    assert (folder / once.name).read_bytes() == once.read_bytes()


def test_the_demo_resharded_answers_as_before(demo: Llama, tmp_path: Path) -> None:
    """Its vocabulary is left to the weights, and its tokenizer lies in the folder: both still do."""
    reshard(DEMO, tmp_path, 4)
    assert (tmp_path / "tokenizer.model").read_bytes() == (DEMO / "tokenizer.model").read_bytes()
    resharded = Llama.build(
        str(tmp_path), str(tmp_path / "tokenizer.model"), 512, 8, device="cpu", dtype="float32", verify=True
    )
    found = held(resharded.model)
    for name, parameter in held(demo.model).items():
        assert torch.equal(parameter, found[name]), name


def test_the_checklist_names_every_file_and_is_right(tmp_path: Path) -> None:
    reshard(DEMO, tmp_path, 2)
    names = ["consolidated.00.pth", "consolidated.01.pth", "params.json", "tokenizer.model"]
    assert list(read_checklist(tmp_path)) == names
    assert verify(tmp_path) == 4
    with open(tmp_path / names[1], "r+b") as file:
        file.seek(100_000)
        file.write(b"\xff\xfe\xfd")
    with pytest.raises(CheckpointError, match=r"consolidated\.01\.pth differs"):
        verify(tmp_path)


def test_old_files_rope_frequencies_are_left_out(tmp_path: Path) -> None:
    weights = random_weights(SMALL)
    folder = save(tmp_path / "in", SMALL, {**weights, "rope.freqs": torch.ones(4)})
    (path,) = reshard(folder, tmp_path / "out", 1)
    assert_equal(torch.load(path, weights_only=True), weights)


def test_missing_folders_are_made_and_no_progress_is_silent(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = save(tmp_path / "in", SMALL, random_weights(SMALL))
    reshard(folder, tmp_path / "a" / "b" / "out", 2)
    assert len(open_checked(tmp_path / "a" / "b" / "out")[0].files) == 2
    assert capfd.readouterr() == ("", "")


# ------------------------------------------------------------------------------------------------------ one file


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    """A tensor of every dtype that can be written, of odd shapes."""
    g = torch.Generator().manual_seed(0)
    return {
        f"a.{number}": torch.randint(0, 100, (3 + number, 7), generator=g).to(dtype)
        for number, dtype in enumerate(STORAGES)
    } | {"vector": torch.arange(5.0), "scalar": torch.tensor(3.0)}


@pytest.fixture
def file(tmp_path: Path, tensors: dict[str, Tensor]) -> Path:
    layout = {name: tensor.to("meta") for name, tensor in tensors.items()}
    write_shard(tmp_path / "a.pth", layout, tensors.__getitem__, lambda count, said: None)
    return tmp_path / "a.pth"


@pytest.mark.parametrize("options", [{}, {"mmap": True}, {"weights_only": False}])
def test_a_file_loads_as_one_of_torch_save_does(file: Path, tensors: dict[str, Tensor], options: dict) -> None:
    loaded = torch.load(file, **{"weights_only": True, **options})
    assert_equal(loaded, tensors)
    assert type(loaded) is dict and all(tensor.is_contiguous() for tensor in loaded.values())
    assert_equal(open_shard(file), tensors)


def test_the_table_is_that_of_torch_save(file: Path, tensors: dict[str, Tensor], tmp_path: Path) -> None:
    """Byte for byte, so whatever loads the one loads the other."""
    torch.save(tensors, tmp_path / "b.pth")
    table, expected = zipfile.ZipFile(file).read("archive/data.pkl"), zipfile.ZipFile(tmp_path / "b.pth")
    assert table == expected.read("b/data.pkl")


def test_mapped_tensors_are_aligned(file: Path) -> None:
    """Kernels may read 64 bytes at a time; a file is mapped at a page's beginning."""
    assert {tensor.data_ptr() % 64 for tensor in open_shard(file).values()} == {0}


def test_a_damaged_file_is_noticed_by_any_zip_tool(file: Path, tensors: dict[str, Tensor]) -> None:
    """Its checksums are true."""
    assert zipfile.ZipFile(file).testzip() is None
    with open(file, "r+b") as opened:
        opened.seek(file.read_bytes().index(tensors["a.1"].numpy().tobytes()))
        opened.write(b"\xff")
    assert zipfile.ZipFile(file).testzip() == "archive/data/1"


def test_contents_are_asked_for_in_order_one_at_a_time(tmp_path: Path) -> None:
    """What was given before has been let go by then."""
    given: list[weakref.ref] = []

    def contents(name: str) -> Tensor:
        assert name == "abc"[len(given)]
        assert all(ref() is None for ref in given)
        tensor = torch.ones(100)
        given.append(weakref.ref(tensor))
        return tensor

    layout = {name: torch.ones(100, device="meta") for name in "abc"}
    write_shard(tmp_path / "a.pth", layout, contents, lambda count, said: None)
    assert len(given) == 3


# -------------------------------------------------------------------------------------------------------- refusals


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(tmp_path / "in", SMALL, random_weights(SMALL), 2)


def refused(error: type[Exception], said: str, folder: Path, out: Path, processes: int = 1) -> None:
    """reshard says so in one line, and leaves OUT as it was."""
    before = sorted(out.rglob("*")) if out.exists() else None
    with pytest.raises(error, match=re.escape(said)) as raised:
        reshard(folder, out, processes)
    assert "\n" not in str(raised.value)
    assert (sorted(out.rglob("*")) if out.exists() else None) == before


@pytest.mark.parametrize("processes", [0, -1, 101, 1.0, True, "2"])
def test_numbers_that_are_none_are_refused(folder: Path, tmp_path: Path, processes: object) -> None:
    said = f"model_parallel_size={processes!r} is out of range: expected an integer from 1 to 100"
    refused(ParameterError, said, folder, tmp_path / "out", processes)


def test_a_split_that_is_not_possible_says_which_are(folder: Path, tmp_path: Path) -> None:
    said = "2 shards, but 8 heads cannot be split over 3 processes: choose 1, 2 or 4"
    refused(DeviceError, said, folder, tmp_path / "out", 3)


def test_the_target_must_be_new_or_empty(folder: Path, tmp_path: Path) -> None:
    new = "choose a folder that is new or empty"
    refused(CheckpointError, f"{folder} is the checkpoint to read: {new}", folder, folder)
    around = tmp_path / "x" / ".." / "in"
    (tmp_path / "x").mkdir()
    refused(CheckpointError, f"{around} is the checkpoint to read: {new}", folder, around)
    (tmp_path / "x" / "notes").write_text("mine")
    refused(CheckpointError, f"{tmp_path / 'x'} is not empty, it holds notes: {new}", folder, tmp_path / "x")
    file = tmp_path / "x" / "notes"
    refused(CheckpointError, f"{file} is a file: {new}", folder, file)
    refused(CheckpointError, f"{file / 'out'} could not be written ({file / 'out'}: ", folder, file / "out")
    (tmp_path / "empty").mkdir()
    assert len(reshard(folder, tmp_path / "empty", 1)) == 1


def test_a_checkpoint_that_would_not_load_is_not_written(folder: Path, tmp_path: Path) -> None:
    (folder / "consolidated.01.pth").unlink()
    shutil.copy(folder / "consolidated.00.pth", folder / "consolidated.02.pth")
    refused(CheckpointError, "lacks consolidated.01.pth of its 3 shards", folder, tmp_path / "out")
    refused(CheckpointError, "does not exist: check ckpt_dir", tmp_path / "none", tmp_path / "out")
    (folder / "consolidated.02.pth").rename(folder / "consolidated.01.pth")
    (folder / "tokenizer.model").mkdir()
    refused(CheckpointError, "tokenizer.model cannot be read: Is a directory", folder, tmp_path / "out")
    other = save(tmp_path / "other", {**SMALL, "n_layers": 3}, random_weights(SMALL))
    refused(CheckpointError, "does not fit params.json: layers.2", other, tmp_path / "out")


def test_shards_of_two_dtypes_are_refused(folder: Path, tmp_path: Path) -> None:
    """One of them would be converted without a word."""
    halves = save(tmp_path / "half", SMALL, random_weights(SMALL, torch.bfloat16), 2)
    shutil.copy(halves / "consolidated.01.pth", folder)
    said = "consolidated.01.pth has tok_embeddings.weight in torch.bfloat16, consolidated.00.pth in torch.float32"
    refused(CheckpointError, said, folder, tmp_path / "out")


def test_a_disk_that_is_too_small_is_known_before(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two shards hold every norm twice."""
    weights = random_weights(SMALL)
    size = sum(tensor.nbytes * (2 if "norm" in name else 1) for name, tensor in weights.items())
    size += (folder / "params.json").stat().st_size
    asked = []

    def usage(free: int) -> Callable[[Path], object]:
        return lambda path: asked.append(path) or type("Usage", (), {"free": free})

    out = tmp_path / "new" / "out"
    monkeypatch.setattr(shutil, "disk_usage", usage(size - 1))
    need = in_units(size)  # less by one byte is said alike
    refused(CheckpointError, f"{out} needs {need}, but {need} is free on its disk: make room", folder, out, 2)
    assert asked == [tmp_path]
    monkeypatch.setattr(shutil, "disk_usage", usage(size))
    reshard(folder, out, 2)


# ------------------------------------------------------------------------------------------ what fails on the way


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """The system refuses to write beyond `size` bytes of a file, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [10, 1000, 100_000, 200_000])
@pytest.mark.parametrize("made", [True, False])
def test_a_full_disk_is_said_in_one_line_and_left_clean(folder: Path, tmp_path: Path, size: int, made: bool) -> None:
    """Wherever it fills up. A folder that was there stays, one that was made goes."""
    out = tmp_path / "new" / "out"
    if made:
        out.mkdir(parents=True)
    with largest_file(size):
        refused(CheckpointError, f"{out} could not be written (File too large), nothing is left", folder, out)
    assert (tmp_path / "new").exists() == made


@pytest.mark.parametrize("place", [1, 20, 40])
def test_an_interruption_leaves_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: int
) -> None:
    """Ctrl-C in the first or the second shard; the same call works afterwards."""
    calls = []

    def interrupted(*arguments: object) -> None:
        calls.append(1)
        if len(calls) == place:
            raise KeyboardInterrupt
        source.read_slice(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(writer, "read_slice", interrupted)
        with pytest.raises(KeyboardInterrupt):
            reshard(folder, tmp_path / "out", 2)
    assert not (tmp_path / "out").exists()
    reshard(folder, tmp_path / "out", 2)


def test_at_no_moment_does_a_part_look_like_the_whole(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped dead before any of the renames, the folder is refused, up to the one that leaves only the checklist."""
    out, refusals = tmp_path / "out", []
    rename = Path.rename

    def watched(path: Path, target: Path) -> None:
        try:
            open_checked(out)
        except CheckpointError as error:
            refusals.append(str(error))
        else:
            assert {path.name for path in out.glob("*.partial")} == {"checklist.chk.partial"}
        rename(path, target)

    monkeypatch.setattr(Path, "rename", watched)
    reshard(folder, out, 4)
    assert len(refusals) == 5
    assert "has no consolidated.*.pth" in refusals[0] and "lacks consolidated.00.pth" in refusals[3]
    assert "params.json is missing" in refusals[4]
    assert verify(out) == 5


KILLED = """
import os, signal, sys
from pathlib import Path
from llama.checkpoint import source, writer

read, calls = writer.read_slice, []

def killed(*arguments):
    calls.append(1)
    if len(calls) == 30:
        os.kill(os.getpid(), signal.SIGKILL)
    read(*arguments)

writer.read_slice = killed
writer.reshard(Path(sys.argv[1]), Path(sys.argv[2]), 2)
"""


def test_a_killed_process_leaves_nothing_that_looks_complete(folder: Path, tmp_path: Path) -> None:
    """Thirty tensors are more than a shard has; what lies there is named by the next attempt."""
    out = tmp_path / "out"
    done = subprocess.run([sys.executable, "-c", KILLED, str(folder), str(out)], cwd=ROOT)
    assert done.returncode == -signal.SIGKILL
    assert sorted(os.listdir(out)) == ["consolidated.00.pth.partial", "consolidated.01.pth.partial"]
    with pytest.raises(CheckpointError, match=r"has no consolidated\.\*\.pth; it holds consolidated\.00\.pth\.partial"):
        open_checked(out)
    refused(CheckpointError, f"{out} is not empty, it holds consolidated.00.pth.partial: choose", folder, out)


# ----------------------------------------------------------------------------------------------------------- memory

WRITE = """
import re, sys
from pathlib import Path
from llama.checkpoint.writer import reshard

def resident(which):  # "VmRSS" now, "VmHWM" at its peak; ru_maxrss would begin at the parent's
    return 1024 * int(re.search(which + r":\\s+(\\d+)", open("/proc/self/status").read())[1])

small, folder, out, processes = sys.argv[1:]
reshard(Path(small), Path(small, "out"), 1)  # what a first call loads
before = resident("VmRSS")
reshard(Path(folder), Path(out), int(processes))
print(resident("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="mapped pages are let go on Linux only")
@pytest.mark.parametrize(("shards", "processes"), [(1, 2), (2, 1)])
def test_writing_takes_the_memory_of_a_few_tensors(tmp_path: Path, shards: int, processes: int) -> None:
    """The largest tensor has 6 MB of 190: at most one is read while one is made, and the allocator keeps some."""
    params = {**SMALL, "dim": 1024, "n_layers": 8, "multiple_of": 256}
    shapes = expected_shapes(ModelArgs(**params))
    weights = {name: torch.ones(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    assert sum(tensor.nbytes for tensor in weights.values()) > 180e6
    save(tmp_path / "in", params, weights, shards)
    small = save(tmp_path / "small", SMALL, random_weights(SMALL))
    arguments = [str(small), str(tmp_path / "in"), str(tmp_path / "out"), str(processes)]
    done = subprocess.run([sys.executable, "-c", WRITE, *arguments], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 60e6
