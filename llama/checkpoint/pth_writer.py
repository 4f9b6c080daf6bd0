"""One .pth file, written tensor by tensor as torch.save would write it."""

import io
import os
import pickle
import struct
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor
from torch._utils import _rebuild_tensor_v2
from typing_extensions import Buffer

from llama.checkpoint.checklist import md5
from llama.progress import Move

ALIGNMENT = 64  # of a tensor's first byte in its file, as torch.save has it
# The classes that name a dtype in a .pth file.
STORAGES = {
    torch.float64: torch.DoubleStorage, torch.float32: torch.FloatStorage, torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage, torch.int8: torch.CharStorage, torch.uint8: torch.ByteStorage,
}  # fmt: skip
# Bytes of a zip record's header without its name: the fixed part, the head of an extra field, the field of long sizes.
_HEADER, _FIELD, _LONG_SIZES = 30, 4, 20
_PADDING = 0x4246  # the id of an extra field of nothing but zeros

Tensors = dict[str, Tensor]


def write_shard(path: Path, layout: Tensors, contents: Callable[[str], Tensor], move: Move) -> str:
    """Write a .pth file of tensors like those of `layout`, which are on the meta device; returns its MD5 sum.

    `contents(name)` gives each in turn, on the CPU; the next is asked for when it has been written and let go.
    `move(bytes, name of the file)` is called after each.
    """
    with open(path, "wb") as file:
        out = _Hashed(file)
        with zipfile.ZipFile(out, "w") as archive:
            _write_record(archive, out, "data.pkl", _pickled(layout))
            _write_record(archive, out, "byteorder", sys.byteorder.encode())
            for number, (name, like) in enumerate(layout.items()):
                _write_record(archive, out, f"data/{number}", _bytes(contents(name), like))
                move(like.nbytes, path.stem)
            _write_record(archive, out, "version", b"3\n")
        file.flush()
        os.fsync(file.fileno())  # some disks say only here that they are full
    return out.md5.hexdigest()


def _bytes(tensor: Tensor, like: Tensor) -> memoryview:
    assert (tensor.shape, tensor.dtype) == (like.shape, like.dtype)
    return tensor.reshape(-1).view(torch.uint8).numpy().data


class _Hashed(io.RawIOBase):
    """A file that is written from its beginning to its end, and the MD5 sum of what it has so far."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.md5 = md5()

    def write(self, data: Buffer) -> int:
        self.md5.update(data)
        return self.file.write(data)

    def tell(self) -> int:
        return self.file.tell()


def _write_record(archive: zipfile.ZipFile, out: _Hashed, name: str, data: bytes | memoryview) -> None:
    """Add a record to the archive that `out` becomes; zeros in its header move the data to a multiple of 64."""
    record = zipfile.ZipInfo(f"archive/{name}")
    padding = -(out.tell() + _HEADER + len(record.filename) + _FIELD + _LONG_SIZES) % ALIGNMENT
    record.extra = struct.pack("<HH", _PADDING, padding) + bytes(padding)
    with archive.open(record, "w", force_zip64=True) as writer:
        writer.write(data)


class _Storage(NamedTuple):
    """How data.pkl speaks of a tensor's bytes: they are the record data/`key`."""

    kind: str
    storage_class: type
    key: str
    location: str
    elements: int


class _Entry:
    """A tensor in the table: pickled as torch.save pickles one that is contiguous and has its storage to itself."""

    def __init__(self, number: int, like: Tensor) -> None:
        self.storage = _Storage("storage", STORAGES[like.dtype], str(number), "cpu", like.numel())
        self.shape, self.stride = tuple(like.shape), like.stride()

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild_tensor_v2, (self.storage, 0, self.shape, self.stride, False, OrderedDict())


class _Pickler(pickle.Pickler):
    def persistent_id(self, value: Any) -> tuple[Any, ...] | None:
        return tuple(value) if isinstance(value, _Storage) else None


def _pickled(layout: Tensors) -> bytes:
    buffer = io.BytesIO()
    table = {name: _Entry(number, like) for number, (name, like) in enumerate(layout.items())}
    _Pickler(buffer, protocol=2).dump(table)
    return buffer.getvalue()
