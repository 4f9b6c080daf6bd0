"""A checkpoint folder in Meta's layout → its sizes and its tensors, memory-mapped and found to fit each other."""

import pickle
import re
import warnings
from pathlib import Path

import torch
from torch import Tensor

from llama.checkpoint import checklist
from llama.checkpoint.layout import IGNORED, format_of, shard_shape, split_axis, stored_shapes
from llama.checkpoint.params import read_params
from llama.checkpoint.pth import check_archive, plain_tensors
from llama.errors import CheckpointError
from llama.model.args import ModelArgs
from llama.paths import opened
from llama.quantization.formats import FORMATS
from llama.wording import listed

OFFERED_BY = {"_io": "io", "posix": "os", "nt": "os"}  # the module by which users know what these hold


def find_shards(folder: Path) -> list[Path]:
    """consolidated.00.pth, consolidated.01.pth, … in order. Raises CheckpointError naming what is missing."""
    if not folder.exists():
        raise CheckpointError(f"checkpoint folder {folder} does not exist: check ckpt_dir")
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is a file: ckpt_dir is the folder that holds consolidated.00.pth")
    found = {path.name: path for path in folder.glob("consolidated.*.pth")}
    if not found:
        names = sorted(path.name for path in folder.iterdir())
        contents = f"it holds {listed(names)}" if names else "it is empty"
        raise CheckpointError(
            f"{folder} has no consolidated.*.pth; {contents}: ckpt_dir is the folder of Meta's .pth files"
        )
    numbers = {int(m[1]) for name in found if (m := re.fullmatch(r"consolidated\.(\d\d)\.pth", name))}
    wanted = [f"consolidated.{i:02d}.pth" for i in range(max(max(numbers, default=0) + 1, _listed_shards(folder)))]
    missing = [name for name in wanted if name not in found]
    strange = sorted(set(found) - set(wanted))
    if missing:
        raise CheckpointError(
            f"{folder} lacks {listed(missing)} of its {len(wanted)} shards: download them, all shards are needed"
        )
    if strange:
        raise CheckpointError(f"{folder} holds {listed(strange)} beside its {len(wanted)} shards: remove them")
    return [found[name] for name in wanted]


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
    try:
        with opened(path) as file:
            head = file.read(64)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    size = path.stat().st_size
    again = "download it again"
    if size == 0:
        raise CheckpointError(f"{path} is empty (0 bytes): {again}")
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path} is a git-lfs pointer ({size} bytes), not the weights: run git lfs pull")
    if head.lstrip().startswith(b"<"):
        raise CheckpointError(f"{path} is an HTML page ({size} bytes), not weights: the download link failed; {again}")
    if not head.startswith(b"PK\x03\x04"):
        if head.startswith(b"\x80"):
            raise CheckpointError(
                f"{path} ({size} bytes) is a bare pickle, not the zip format that can be memory-mapped:"
                " refused unread; if you trust it, save it again with torch.save"
            )
        raise CheckpointError(f"{path} ({size} bytes) is not a PyTorch file: it begins with {head[:8]!r}; {again}")


def check_tensors(shards: list[dict[str, Tensor]], args: ModelArgs, folder: Path) -> None:
    """Raise CheckpointError listing what is missing, unexpected, or of a wrong shape or dtype in any shard."""
    for number, tensors in enumerate(shards):
        if args.n_layers > len(tensors):  # before anything grows with it
            raise CheckpointError(
                f"{folder / 'params.json'} sets n_layers={args.n_layers}, but consolidated.{number:02d}.pth has only"
                f" {len(tensors)} tensors: one of them is of another model"
            )
    expected = stored_shapes(args)
    for number, tensors in enumerate(shards):
        faults = [f"{name} is missing" for name in expected if name not in tensors]
        faults += [f"{name!r:.100} is unexpected" for name in tensors if name not in expected and name not in IGNORED]
        for name, whole in expected.items():
            if name not in tensors:
                continue
            shape, found = shard_shape(name, whole, len(shards)), tuple(tensors[name].shape)
            if found != shape:
                faults.append(
                    f"{name} has shape {found!s:.100} where params.json and {len(shards)} shards make it {shape}"
                )
            elif (axis := split_axis(name)) is not None and whole[axis] % len(shards):
                faults.append(f"{name} has {whole[axis]} rows or columns, which {len(shards)} shards cannot share")
            elif fault := _wrong_dtype(name, tensors[name].dtype, args.quantize):
                faults.append(f"{name} is {tensors[name].dtype}, not {fault}")
        if faults:
            path = folder / f"consolidated.{number:02d}.pth"
            raise CheckpointError(f"{path} does not fit params.json: {listed(faults, '; ')}")


def _wrong_dtype(name: str, found: torch.dtype, quantize: str | None) -> str | None:
    """What a tensor should be instead, if its dtype is none that it may have."""
    form = format_of(name, quantize)
    if form and name.endswith(".weight"):
        wanted = FORMATS[form].dtype
        return None if str(found) == f"torch.{wanted}" else wanted
    return None if found.is_floating_point else "a floating-point tensor"


def stored_dtype(shards: list[dict[str, Tensor]]) -> torch.dtype:
    """The dtype of the checkpoint: that of its embedding table."""
    return shards[0]["tok_embeddings.weight"].dtype


def open_shards(folder: Path) -> list[dict[str, Tensor]]:
    """The tensors of every shard of a checkpoint folder, memory-mapped, in order."""
    return [open_shard(path) for path in find_shards(folder)]


def vocabulary(shards: list[dict[str, Tensor]], folder: Path) -> int:
    """How many tokens the weights know: the rows of the embedding table."""
    table = shards[0].get("tok_embeddings.weight")
    if table is None or table.dim() != 2:
        raise CheckpointError(
            f"{folder / 'consolidated.00.pth'} has no tok_embeddings.weight: it is not a Llama-2 model"
        )
    return table.shape[0]


def open_checkpoint(folder: Path) -> tuple[ModelArgs, list[str], list[dict[str, Tensor]]]:
    """A folder's sizes, the keys of params.json that were ignored, and its shards, found to fit each other.

    A vocabulary that params.json leaves open (−1) is that of the weights. Raises CheckpointError.
    """
    find_shards(folder)  # a missing file is said before what is in another
    args, ignored = read_params(folder)
    shards = open_shards(folder)
    if args.vocab_size == -1:
        args.vocab_size = vocabulary(shards, folder)
    check_tensors(shards, args, folder)
    return args, ignored, shards
