"""A .pth file holds plain tensors, and nothing else is let near native code: refused by name, with what it is."""

import io
import pickle
import re
import subprocess
import sys
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import SMALL, random_weights
from conftest import DEMO, ROOT
from torch import Tensor, nn

from llama.checkpoint.files import open_shard
from llama.errors import CheckpointError

PLACE = "layers.1.feed_forward.w3.weight"
NOT_PLAIN = {
    "meta": (lambda t: t.to("meta"), "on the meta device"),
    "sparse": (lambda t: t.to_sparse(), "in the layout sparse_coo"),
    "sparse rows": (lambda t: t.to_sparse_csr(), "in the layout sparse_csr"),
    "nested": (lambda t: torch.nested.nested_tensor([t[0], t[1, :5]]), "a nested tensor"),
    "jagged": (lambda t: torch.nested.nested_tensor([t[0], t[1, :5]], layout=torch.jagged), "a NestedTensor"),
    "quantised": (lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8), "in qint8"),
    "negated": (torch._neg_view, "a negated view"),
    "conjugate": (lambda t: torch.complex(t, t).conj(), "in complex64"),
    "row repeated": (lambda t: t[0].clone().expand(t.shape), "of shape (192, 64), of which the file holds 64 numbers"),
    **{
        name: (lambda t, name=name: t.to(getattr(torch, name)), f"in {name}")
        for name in (
            "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "complex64", "complex128", "bool",
            "int16", "int32", "int64", "uint16", "uint32", "uint64",
        )
    },
}  # fmt: skip


def shard(folder: Path, tensor: Tensor, params: dict = SMALL) -> Path:
    """A whole checkpoint file with this tensor in one place."""
    path = folder / "consolidated.00.pth"
    torch.save({**random_weights(params), PLACE: tensor}, path)
    return path


@pytest.mark.parametrize("kind", NOT_PLAIN)
@pytest.mark.filterwarnings("ignore")
def test_what_is_not_plain_is_refused_with_its_name(tmp_path: Path, kind: str) -> None:
    make, said = NOT_PLAIN[kind]
    path = shard(tmp_path, make(random_weights(SMALL)[PLACE]))
    with pytest.raises(CheckpointError, match=re.escape(f"{path} holds '{PLACE}', which is {said}")):
        open_shard(path)


def test_tensors_of_four_bits_are_refused(tmp_path: Path) -> None:
    """float4: made of bytes, since nothing can be converted to it."""
    if not hasattr(torch, "float4_e2m1fn_x2"):
        pytest.skip("this PyTorch has no float4")
    path = shard(tmp_path, torch.zeros(192, 32, dtype=torch.uint8).view(torch.float4_e2m1fn_x2))
    with pytest.raises(CheckpointError, match=f"'{PLACE}', which is in float4"):
        open_shard(path)


@pytest.mark.parametrize(
    "make",
    [
        nn.Parameter,
        lambda t: t.clone().requires_grad_(),
        lambda t: t.T.contiguous().T,
        lambda t: torch.cat((t, t))[len(t) :],
        lambda t: t.double(),
        lambda t: t[:0],
    ],
)
def test_numbers_are_read_however_they_lie(tmp_path: Path, make: Callable[[Tensor], Tensor]) -> None:
    """Parameters, as people's own files have them, transposed and cut-out tensors."""
    tensor = make(random_weights(SMALL)[PLACE])
    found = open_shard(shard(tmp_path, tensor))[PLACE]
    assert type(found) is Tensor and not found.requires_grad and found.dtype == tensor.dtype
    assert torch.equal(found, tensor)


def test_one_storage_may_have_two_names(tmp_path: Path, build: Callable, small: dict, weights: dict) -> None:
    """Tied tables: what has been read is let go of twice, and reads the same."""
    both = weights["output.weight"]
    results = []
    for name, tied in (("tied", both), ("apart", both.clone())):
        (tmp_path / name).mkdir()
        (tmp_path / name / "params.json").write_text(repr(small).replace("'", '"'))
        torch.save({**weights, "tok_embeddings.weight": tied}, tmp_path / name / "consolidated.00.pth")
        results.append(build(tmp_path / name).generate([[1, 5, 9]], 8, 0, logprobs=True))
    assert results[0] == results[1]


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_no_tensor_of_the_meta_device_reaches_native_code(tmp_path: Path, small: dict, quantize: str | None) -> None:
    """Through the command, in a process of its own: there it was a segmentation fault."""
    from llama.checkpoint import writer

    plain = tmp_path / "plain"
    plain.mkdir()
    torch.save(random_weights(small), plain / "consolidated.00.pth")
    (plain / "params.json").write_text(repr(small).replace("'", '"'))
    folder = plain
    if quantize:
        folder = tmp_path / quantize
        writer.quantize(plain, folder, quantize)
    tensors = torch.load(folder / "consolidated.00.pth")
    torch.save({**tensors, PLACE: tensors[PLACE].to("meta")}, folder / "consolidated.00.pth")
    words = ["complete", "a", "--ckpt_dir", str(folder), "--tokenizer_path", str(DEMO / "tokenizer.model")]
    done = subprocess.run([sys.executable, "-m", "llama", *words], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert f"holds '{PLACE}', which is on the meta device" in done.stderr


# -------------------------------------------------------------------------------------------------- what a table calls


class Call:
    """Pickled as a call of `function`, whose result gets `state`."""

    def __init__(self, function: Callable, *arguments: object, state: object = None) -> None:
        self.parts = function, arguments, state

    def __reduce__(self) -> tuple:
        return self.parts


class Pickler(pickle.Pickler):
    """Pickles a storage as .pth files do, by the number of its record."""

    def persistent_id(self, value: object) -> tuple | None:
        return ("storage", torch.FloatStorage, "0", "cpu", 4) if value is STORAGE else None


STORAGE = object()
ONES = Call(torch._utils._rebuild_tensor_v2, STORAGE, 0, (4,), (1,), False, OrderedDict())
ATTRIBUTES = dict.fromkeys(("numel", "detach", "untyped_storage", "stride", "is_neg", "items", "values"), 5)


def archive(folder: Path, table: object, records: int = 1) -> Path:
    """A .pth file with this table, and so many records of four ones."""
    buffer = io.BytesIO()
    Pickler(buffer, protocol=2).dump(table)
    path = folder / "consolidated.00.pth"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", buffer.getvalue())
        for number in range(records):
            file.writestr(f"archive/data/{number}", torch.ones(4).numpy().tobytes())
        file.writestr("archive/version", b"3\n")
    return path


@pytest.mark.parametrize(
    "table",
    [
        {"a": ONES},
        Call(OrderedDict, [["a", ONES]], state=ATTRIBUTES),
        {"a": Call(torch._tensor._rebuild_from_type_v2, ONES.parts[0], Tensor, ONES.parts[1], ATTRIBUTES)},
        {"a": Call(torch._utils._rebuild_parameter_with_state, ONES, True, OrderedDict(), ATTRIBUTES)},
    ],
)
def test_attributes_that_hide_methods_change_nothing(tmp_path: Path, table: object) -> None:
    """A file can give them to its table and to its tensors."""
    tensors = open_shard(archive(tmp_path, table))
    assert list(tensors) == ["a"] and torch.equal(tensors["a"], torch.ones(4)) and not vars(tensors["a"])


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (Call(bytearray, 1 << 50), r"builtins\.bytearray"),
        (Call(torch._utils._rebuild_device_tensor_from_cpu_tensor, ONES, torch.float64, "cpu", False), "_from_cpu"),
        (Call(print, "run"), "print"),
    ],
)
def test_what_a_table_calls_makes_no_memory_of_its_own(
    tmp_path: Path, made: Call, said: str, capfd: pytest.CaptureFixture
) -> None:
    """PyTorch's unpickler would call most of these for any file, with any size: they are refused before it runs."""
    with pytest.raises(CheckpointError, match=rf"holds pickled code \(.*{said}.*\), not only tensors: refused"):
        open_shard(archive(tmp_path, {"a": made}))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["archive/data.pkl", "archive/more/data.pkl"])
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_second_table_hides_nothing(tmp_path: Path, name: str) -> None:
    path = archive(tmp_path, {"a": Call(bytearray, 1 << 50)})
    with zipfile.ZipFile(path, "a") as file:
        file.writestr(name, b"N.")  # None
    with pytest.raises(CheckpointError, match=r"holds pickled code \(builtins\.bytearray\)"):
        open_shard(path)


def test_numbers_that_are_not_in_the_file_are_not_taken(tmp_path: Path) -> None:
    """A table may call for a tensor of what memory happens to hold; a record that no tensor has covers for it."""
    path = archive(tmp_path, {"a": ONES, "b": Call(Tensor, 4)}, records=2)
    with pytest.raises(CheckpointError, match="its records and the tensors that it lists do not match"):
        open_shard(path)


# -------------------------------------------------------------------------------------------------------- the archive


def rewritten(path: Path, change: Callable[[str, bytes], tuple[str, bytes] | None], method: int = 0) -> Path:
    """The archive written anew, with each record as `change` makes it."""
    with zipfile.ZipFile(path) as archive:
        records = [(name, archive.read(name)) for name in archive.namelist()]
    with zipfile.ZipFile(path, "w", method) as archive:
        for record in filter(None, (change(*record) for record in records)):
            archive.writestr(*record)
    return path


@pytest.mark.parametrize(
    ("change", "method", "said"),
    [
        (lambda name, data: (name, data), zipfile.ZIP_DEFLATED, "is compressed, so it cannot be memory-mapped"),
        (lambda name, data: (name, b"big" if name.endswith("byteorder") else data), 0, "says byteorder=b'big'"),
        (lambda name, data: (name, data[:-4] if name.endswith("data/3") else data), 0, "its records and the tensors"),
    ],
)
def test_an_archive_that_cannot_be_mapped_is_refused(tmp_path: Path, change: Callable, method: int, said: str) -> None:
    path = rewritten(shard(tmp_path, random_weights(SMALL)[PLACE]), change, method)
    with pytest.raises(CheckpointError, match=re.escape(said)) as error:
        open_shard(path)
    assert str(error.value).startswith(str(path))


def test_an_archive_that_another_program_wrote_is_read(tmp_path: Path) -> None:
    """What the table above changes is the reason why it is refused."""
    path = rewritten(shard(tmp_path, random_weights(SMALL)[PLACE]), lambda name, data: (name, data))
    assert open_shard(path).keys() == random_weights(SMALL).keys()


def test_a_program_is_refused_without_a_warning(tmp_path: Path) -> None:
    path = tmp_path / "consolidated.00.pth"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(nn.Linear(2, 2)).save(str(path))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(CheckpointError, match="is a TorchScript archive, a program: refused unread"):
            open_shard(path)


def test_every_flip_of_the_end_record_is_one_line(tmp_path: Path) -> None:
    """The last 22 bytes of a zip file, and what torch writes before them: numbers of disks, sizes, places."""
    buffer = io.BytesIO()
    torch.save({"a": torch.ones(4)}, buffer)
    path, data = tmp_path / "consolidated.00.pth", buffer.getvalue()
    refused = []
    for bit in range((len(data) - 98) * 8, len(data) * 8):
        path.write_bytes(data[: bit // 8] + bytes([data[bit // 8] ^ 1 << bit % 8]) + data[bit // 8 + 1 :])
        try:
            assert torch.equal(open_shard(path)["a"], torch.ones(4))
        except CheckpointError as error:
            refused.append(str(error))
    assert len(refused) > 100 and all(str(path) in said and "\n" not in said for said in refused)
