"""What a .pth file may hold: an archive whose bytes can be mapped as they lie, and plain tensors that view them."""

import pickletools
import re
import struct
import sys
import zipfile
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llama.errors import CheckpointError

# The dtypes that weights, and the integers of our formats, are stored in.
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.uint8)
_PLAIN = (Tensor, nn.Parameter)
AGAIN = "download it again"
# PyTorch's unpickler calls these for any file, and they make memory of their own, of any size.
_MAKERS = re.compile(r"(__builtin__|builtins) bytearray|torch\._utils _rebuild_device_tensor_from_\w+")


def check_archive(path: Path) -> list[tuple[int, int]]:
    """(First byte, size) of each record that holds a tensor's bytes, in the order in which they lie in the file.

    Raises CheckpointError unless it is the archive of torch.save, uncompressed, in this machine's order of bytes.
    """
    try:
        if not zipfile.is_zipfile(path):
            raise CheckpointError(
                f"{path} ends early ({path.stat().st_size} bytes, its table of contents is missing): {AGAIN}"
            )
        with zipfile.ZipFile(path) as archive:
            records = sorted(archive.infolist(), key=lambda record: record.header_offset)
            if fault := _archive_fault(archive, records):
                raise CheckpointError(f"{path} {fault}")
            data = [record for record in records if record.filename.rpartition("/")[0].endswith("/data")]
            return [(_first_byte(archive, record), record.file_size) for record in data if record.file_size]
    except CheckpointError:
        raise
    except Exception as error:  # zipfile raises all sorts of things where the table is damaged
        raise CheckpointError(f"{path} has a damaged table of contents ({error!s:.100}): {AGAIN}") from None


def _first_byte(archive: zipfile.ZipFile, record: zipfile.ZipInfo) -> int:
    """Where a record's data begins: after its header, a name and an extra field, whose lengths stand at byte 26."""
    file = archive.fp
    assert file is not None  # it is open
    file.seek(record.header_offset + 26)
    name_length, extra_length = struct.unpack("<HH", file.read(4))
    return record.header_offset + 30 + int(name_length) + int(extra_length)


def _archive_fault(archive: zipfile.ZipFile, records: list[zipfile.ZipInfo]) -> str | None:
    by_name = {record.filename.rpartition("/")[2]: record for record in records}
    if "constants.pkl" in by_name:
        return "is a TorchScript archive, a program: refused unread; torch.save the state_dict() of its module"
    if any(record.compress_type != zipfile.ZIP_STORED for record in records):
        return "is compressed, so it cannot be memory-mapped: save it again with torch.save"
    # Whichever PyTorch takes: it does not tell capitals apart, and two records may have one name.
    tables = [archive.read(record) for record in records if record.filename.lower().endswith("data.pkl")]
    if made := next(filter(_MAKERS.fullmatch, chain.from_iterable(map(_globals, tables))), None):
        made = made.replace("__builtin__", "builtins").replace(" ", ".")
        return f"holds pickled code ({made}), not only tensors: refused, it is not Meta's file"
    order = archive.read(by_name["byteorder"]) if "byteorder" in by_name else b"little"
    if order != sys.byteorder.encode():
        return f"says byteorder={order!r:.20}, but this machine's is {sys.byteorder}: save it again on such a machine"
    return None


def _globals(table: bytes) -> list[str]:
    """What a pickled table of tensors names, each as "module name"; nothing is looked up."""
    return [str(argument) for operation, argument, _ in pickletools.genops(table) if operation.name == "GLOBAL"]


def plain_tensors(tables: Any, records: list[tuple[int, int]], path: Path) -> dict[str, Tensor]:
    """What torch.load found in a file with these records, if it is a flat table of plain tensors.

    A parameter, as people's own files have them, is its tensor. Raises CheckpointError naming what is none.
    """
    # A file can hang attributes on a table or tensor that stand before its methods: those called here are the class's.
    items: list[tuple[Any, Any]] = list(dict.items(tables)) if isinstance(tables, dict) else [(None, tables)]
    if not all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in items):
        raise CheckpointError(f"{path} does not hold a flat table of named tensors, as Meta's files do")
    tensors = {name: Tensor.detach(tensor) if type(tensor) in _PLAIN else tensor for name, tensor in items}
    for name, tensor in tensors.items():
        if fault := _fault(tensor):
            raise CheckpointError(
                f"{path} holds {name!r:.100}, which is {fault}: expected plain numbers on the CPU, in"
                f" {', '.join(map(_name, DTYPES[:-1]))} or {_name(DTYPES[-1])}; get the file that Meta ships"
            )
    _check_storages(tensors, records, path)
    return tensors


def _fault(tensor: Tensor) -> str | None:
    """What a tensor is, unless its numbers can be read where they lie in the file."""
    if type(tensor) is not Tensor:
        return f"a {type(tensor).__name__}"
    if tensor.is_nested:
        return "a nested tensor"
    if tensor.layout != torch.strided:
        return f"in the layout {_name(tensor.layout)}"
    if tensor.device.type != "cpu":
        return f"on the {tensor.device.type} device"
    if tensor.dtype not in DTYPES:
        return f"in {_name(tensor.dtype)}"
    if tensor.is_neg():
        return "a negated view of other numbers"
    return _storage_fault(tensor)


def _storage_fault(tensor: Tensor) -> str | None:
    """A tensor of shape (a, b) must have a · b numbers of its own, and its last one must lie in its storage."""
    stored, size = tensor.untyped_storage().nbytes(), tensor.element_size()
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    last = tensor.storage_offset() + sum((length - 1) * stride for length, stride in steps)
    if tensor.numel() and max(tensor.numel(), last + 1) * size > stored:
        return f"of shape {tuple(tensor.shape)!s:.100}, of which the file holds {stored // size} numbers"
    if tensor.numel() and not tensor.untyped_storage().data_ptr():
        return "without any numbers"
    return None


def _check_storages(tensors: dict[str, Tensor], records: list[tuple[int, int]], path: Path) -> None:
    """Raise CheckpointError unless the storages are the records: one might reach into the next, or lie elsewhere."""
    storages = [tensor.untyped_storage() for tensor in tensors.values()]
    used = sorted({(storage.data_ptr(), storage.nbytes()) for storage in storages if storage.nbytes()})
    begins = {place - first for (place, _), (first, _) in zip(used, records, strict=False)}  # of the file in memory
    too_long = any(length > size for (_, length), (_, size) in zip(used, records, strict=False))
    if len(used) != len(records) or len(begins) > 1 or too_long:
        raise CheckpointError(f"{path} is damaged: its records and the tensors that it lists do not match; {AGAIN}")


def _name(kind: torch.dtype | torch.layout) -> str:
    return str(kind).removeprefix("torch.")
