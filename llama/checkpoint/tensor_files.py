"""The files of a Hugging Face folder that hold tensors: which there are, and the tensors in them, memory-mapped.

Formats: https://huggingface.co/docs/safetensors; pytorch_model*.bin are PyTorch files, under the rules of .pth files.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from llama.checkpoint.files import AGAIN, file_head, open_shard
from llama.checkpoint.json_object import read_object
from llama.errors import CheckpointError
from llama.wording import listed

KINDS = ("model.safetensors", "pytorch_model.bin")  # the first that is there counts
_MOST_BYTES = 1 << 25  # of an index; that of a model of 70 billion numbers has a fiftieth


def find_tensor_files(folder: Path) -> tuple[list[Path], Mapping[str, str] | None]:
    """The files in order, and the index, name of a tensor → name of its file, where there is one.

    Raises CheckpointError, which names what is missing.
    """
    for whole in KINDS:
        index = folder / f"{whole}.index.json"
        if index.is_file():
            return _indexed(folder, index)
        if (folder / whole).is_file():
            return [folder / whole], None
        stem, suffix = whole.split(".")
        if parts := sorted(folder.glob(f"{stem}-*-of-*.{suffix}")):
            raise CheckpointError(f"{folder} has {parts[0].name}, but no {index.name}: download it too")
    raise CheckpointError(
        f"{folder} has a config.json, but none of {listed(list(KINDS))} beside it: download the weights"
    )


def _indexed(folder: Path, index: Path) -> tuple[list[Path], Mapping[str, str]]:
    named = read_object(index, AGAIN, _MOST_BYTES).get("weight_map")
    if not isinstance(named, dict) or not named or not all(isinstance(file, str) for file in named.values()):
        raise CheckpointError(f"{index} has no weight_map of names of tensors and files: {AGAIN}")
    files = sorted(set(named.values()))
    if strange := [file for file in files if not re.fullmatch(r"[\w.-]+", file) or file.startswith(".")]:
        raise CheckpointError(f"{index} names {strange[0]!r:.60}, which is no file of this folder: {AGAIN}")
    if missing := [file for file in files if not (folder / file).is_file()]:
        raise CheckpointError(f"{folder} lacks {listed(missing)} of its {len(files)} files of weights: download them")
    return [folder / file for file in files], named


def open_tensors(files: Sequence[Path], index: Mapping[str, str] | None) -> dict[str, Tensor]:
    """All tensors, memory-mapped. Raises CheckpointError where a file cannot be read, or holds others than indexed."""
    tensors: dict[str, Tensor] = {}
    for path in files:
        own = _open_safetensors(path) if path.suffix == ".safetensors" else open_shard(path)
        if index is not None:
            expected = {name for name, file in index.items() if file == path.name}
            if lost := sorted(expected - own.keys()):
                raise CheckpointError(
                    f"{path} lacks {listed([one[:100] for one in lost])}, which the index says it has"
                )
            if more := sorted(own.keys() - expected):
                raise CheckpointError(f"{path} holds {more[0]!r:.100}, which the index does not place there: {AGAIN}")
        tensors |= own
    return tensors


def _open_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import safe_open

    file_head(path)
    try:
        file: Any = safe_open(path, framework="pt")  # it checks that the header fits the file, and maps the file
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no dict
    except Exception as error:  # of a damaged header: of the library's own class, or of PyTorch's making
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path} cannot be read as a safetensors file ({first:.200}): {AGAIN}") from None
