"""The files of a checkpoint in Meta's layout: which there are, and the tensors of one, memory-mapped."""

import pickle
import re
import warnings
from pathlib import Path

import torch
from torch import Tensor

from llama.checkpoint import checklist
from llama.checkpoint.pth import check_archive, plain_tensors
from llama.errors import CheckpointError
from llama.paths import opened
from llama.wording import listed

AGAIN = "download it again"
OFFERED_BY = {"_io": "io", "posix": "os", "nt": "os"}  # the module by which users know what these hold


def find_shards(folder: Path) -> list[Path]:
    """consolidated.00.pth, consolidated.01.pth, … in order. Raises CheckpointError naming what is missing."""
    if not folder.exists():
        raise CheckpointError(f"checkpoint folder {folder} does not exist: check ckpt_dir")
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is a file: ckpt_dir is the folder that holds consolidated.00.pth")
    shards = {path.name: path for path in folder.glob("consolidated.*.pth")}
    if not shards:
        names = sorted(path.name for path in folder.iterdir())
        contents = f"it holds {listed(names)}" if names else "it is empty"
        raise CheckpointError(
            f"{folder} has no consolidated.*.pth; {contents}: ckpt_dir is the folder with the weights, or a .gguf file"
        )
    numbers = {int(m[1]) for name in shards if (m := re.fullmatch(r"consolidated\.(\d\d)\.pth", name))}
    wanted = [f"consolidated.{i:02d}.pth" for i in range(max(max(numbers, default=0) + 1, _listed_shards(folder)))]
    missing = [name for name in wanted if name not in shards]
    strange = sorted(set(shards) - set(wanted))
    if missing:
        raise CheckpointError(
            f"{folder} lacks {listed(missing)} of its {len(wanted)} shards: download them, all shards are needed"
        )
    if strange:
        raise CheckpointError(f"{folder} holds {listed(strange)} beside its {len(wanted)} shards: remove them")
    return [shards[name] for name in wanted]


def _listed_shards(folder: Path) -> int:
    """How many shards the checklist names; 0 without one that can be read."""
    try:
        names = checklist.read_checklist(folder)
    except CheckpointError:
        return 0
    return sum(name.startswith("consolidated.") for name in names)


def open_shard(path: Path) -> dict[str, Tensor]:
    """The tensors of one .pth file, memory-mapped; no code in it is ever run.

    Raises CheckpointError that says what the file is instead.
    """
    _check_file(path)
    records = check_archive(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of kinds of tensors that are refused below
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        reason = re.search(r"GLOBAL (\w+)([\w.]*)", str(error))
        named = f" ({OFFERED_BY.get(reason[1], reason[1])}{reason[2]})" if reason else ""
        raise CheckpointError(
            f"{path} holds pickled code{named}, not only tensors: refused, it is not Meta's file"
        ) from None
    except Exception as error:  # a damaged table of contents can raise anything
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path} cannot be read as a PyTorch file ({first:.200}): download it again") from None
    return plain_tensors(tensors, records, path)


def _check_file(path: Path) -> None:
    head, size = file_head(path)
    if not head.startswith(b"PK\x03\x04"):
        if head.startswith(b"\x80"):
            raise CheckpointError(
                f"{path} ({size} bytes) is a bare pickle, not the zip format that can be memory-mapped:"
                " refused unread; if you trust it, save it again with torch.save"
            )
        raise CheckpointError(f"{path} ({size} bytes) is not a PyTorch file: it begins with {head[:8]!r}; {AGAIN}")


def file_head(path: Path) -> tuple[bytes, int]:
    """The first bytes of a file of weights, and its size. Raises CheckpointError for what failed downloads leave."""
    try:
        with opened(path) as file:
            head = file.read(64)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    size = path.stat().st_size
    if size == 0:
        raise CheckpointError(f"{path} is empty (0 bytes): {AGAIN}")
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path} is a git-lfs pointer ({size} bytes), not the weights: run git lfs pull")
    if head.lstrip().startswith(b"<"):
        raise CheckpointError(f"{path} is an HTML page ({size} bytes), not weights: the download link failed; {AGAIN}")
    return head, size
