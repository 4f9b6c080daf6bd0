"""Checkpoint folders in Meta's layout, written one tensor at a time: peak memory is a tensor, not a shard.

A .pth file is an uncompressed zip archive: `data.pkl` is the pickled table of its tensors, in which the bytes of each
go by a number; the record `data/<number>` is those bytes, from a multiple of 64 on, so that they can be memory-mapped.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path

import torch
from torch import Tensor

from llama.checkpoint.checklist import format_checklist, md5
from llama.checkpoint.layout import (
    SCALE_DTYPE,
    check_groups,
    check_split,
    expected_shapes,
    format_of,
    shard_shape,
    stored_dtype,
    stored_shapes,
)
from llama.checkpoint.new_folder import NEW, all_or_nothing, check_target, said_in_one_line
from llama.checkpoint.params import params_json
from llama.checkpoint.pth_writer import Tensors, write_shard
from llama.checkpoint.source import Source, open_checked, read_slice
from llama.errors import CheckpointError, ParameterError
from llama.kernels import quantized
from llama.model.args import ModelArgs
from llama.paths import read
from llama.progress import bar_of_bytes
from llama.quantization.formats import check_format
from llama.text.gguf_tokenizer import tokenizer_files

MOST_SHARDS = 100  # consolidated.00.pth … consolidated.99.pth
COPIED = (
    "params.json", "generation_config.json", "tokenizer.model", "tokenizer.json", "tokenizer_config.json",
    "added_tokens.json", "special_tokens_map.json", "chat_template.jinja",
)  # fmt: skip
_MOST_BYTES = 1 << 26  # of each of them


def reshard(folder: Path, out: Path, processes: int) -> list[Path]:
    """Write the checkpoint of `folder` anew in the folder `out`, in one shard for each process; returns their paths.

    Dtypes and params.json stay as they are; a tokenizer that lies in `folder` comes along. What can be checked is
    checked first. Raises CheckpointError where a file cannot be read or written, and leaves nothing then, DeviceError
    where the model cannot be split.
    """
    if type(processes) is not int or not 1 <= processes <= MOST_SHARDS:
        raise ParameterError(
            f"model_parallel_size={processes!r} is out of range: expected an integer from 1 to {MOST_SHARDS}"
        )
    source, args = open_checked(folder)
    check_split(args, source.shards, processes, "choose")
    source.check_dtypes()
    _check_other(out, folder)
    check_groups(expected_shapes(args), args.quantize, processes)
    layout = {
        name: torch.empty(shard_shape(name, whole, processes), dtype=source.dtype(name), device="meta")
        for name, whole in stored_shapes(args).items()
    }

    def contents(rank: int, name: str) -> Tensor:
        return _slice(source, name, processes, rank)

    return write_folder(out, [layout] * processes, contents, small_files(source, args))


def quantize(folder: Path, out: Path, weight_format: str) -> list[Path]:
    """Write the checkpoint of `folder` anew in the folder `out`, its matrices quantised.

    As many shards as before; params.json gets "quantize". Raises as `reshard` does, and ParameterError for no format.
    """
    check_format(weight_format)
    source, args = open_checked(folder)
    if args.quantize:
        raise CheckpointError(f"{folder} is quantised already, as {args.quantize}: quantise what it was made from")
    _check_other(out, folder)
    source.check_dtypes()
    shards = source.shards
    check_groups(expected_shapes(args), weight_format, shards)
    quantized_args = replace(args, quantize=weight_format)
    layout = {
        name: torch.empty(shard_shape(name, whole, shards), dtype=_dtype(name, weight_format, source), device="meta")
        for name, whole in stored_shapes(quantized_args).items()
    }

    @lru_cache(maxsize=1)  # a matrix's scales are asked for right after its integers
    def matrix(number: int, name: str, own_format: str) -> tuple[Tensor, Tensor]:
        return quantized.quantize(_slice(source, name, shards, number), own_format)

    def contents(number: int, name: str) -> Tensor:
        own_format = format_of(name, weight_format)
        if own_format is None:
            return _slice(source, name, shards, number)
        integers, scales = matrix(number, name.removesuffix("scales").removesuffix("weight") + "weight", own_format)
        return scales if name.endswith("scales") else integers

    files = small_files(source, args)
    files["params.json"] = json.dumps({**json.loads(files["params.json"]), "quantize": weight_format}).encode()
    return write_folder(out, [layout] * shards, contents, files)


def _slice(source: Source, name: str, processes: int, rank: int) -> Tensor:
    """What process `rank` of `processes` has of a tensor, in memory of its own."""
    tensor = torch.empty(shard_shape(name, source.shape(name), processes), dtype=source.dtype(name))
    read_slice(tensor, source, name, processes, rank)
    return tensor


def whole_tensor(source: Source, name: str) -> Tensor:
    """A tensor of a source, in memory of its own."""
    return _slice(source, name, 1, 0)


def text_files(source: Source) -> dict[str, bytes]:
    """What belongs to the tokenizer and to texts: name → bytes, as it lies beside the weights, or in them."""
    if source.folder.is_file():
        return tokenizer_files(source.folder)
    found = [name for name in COPIED if name != "params.json" and (source.folder / name).exists()]
    return {name: _read(source.folder / name) for name in found}


def small_files(source: Source, args: ModelArgs) -> dict[str, bytes]:
    """The small files that go into the new folder: as they are, or as Meta's layout has them."""
    params = source.folder / "params.json"
    files = ({"params.json": _read(params)} if params.exists() else {}) | text_files(source)
    if "params.json" not in files:
        files["params.json"] = params_json(args, padded=source.pads_vocabulary).encode()
        if source.end_ids:
            generation = json.loads(files.get("generation_config.json", b"{}"))
            generation["eos_token_id"] = list(source.end_ids)
            files["generation_config.json"] = json.dumps(generation).encode()
    return files


def _dtype(name: str, weight_format: str, source: Source) -> torch.dtype:
    """The dtype of a tensor of the quantised checkpoint."""
    if format_of(name, weight_format) is None:
        return source.dtype(name)
    return stored_dtype(name, weight_format) or SCALE_DTYPE


def _check_other(out: Path, folder: Path) -> None:
    if out.resolve() == folder.resolve():
        raise CheckpointError(f"{out} is the checkpoint to read: {NEW}")


def write_folder(
    out: Path,
    layouts: list[Tensors],
    contents: Callable[[int, str], Tensor],
    files: dict[str, bytes],
) -> list[Path]:
    """Write a shard for each of `layouts`, the small `files`, and checklist.chk with the sums of both: all, or nothing.

    `contents(number of the shard, name)` gives each tensor, as for `write_shard`. The folder must be new or empty.
    Returns the paths of the shards. Raises CheckpointError where the disk has no room, or refuses.
    """
    size = sum(like.nbytes for layout in layouts for like in layout.values()) + sum(map(len, files.values()))
    names = [f"consolidated.{number:02d}.pth" for number in range(len(layouts))]
    with said_in_one_line(out):
        check_target(out, size)
        # As long as consolidated.00.pth or params.json is missing, nobody takes the folder for a checkpoint.
        with (
            all_or_nothing(out, [*reversed(names), *files, "checklist.chk"]) as places,
            bar_of_bytes("writing", size) as move,
        ):
            sums = {}
            for number, (name, layout) in enumerate(zip(names, layouts, strict=True)):
                sums[name] = write_shard(places[name], layout, partial(contents, number), move)
            for name, data in files.items():
                places[name].write_bytes(data)
                sums[name] = md5(data).hexdigest()
                move(len(data), name)
            places["checklist.chk"].write_text(format_checklist(sums))
    return [out / name for name in names]


def _read(path: Path) -> bytes:
    try:
        return read(path, _MOST_BYTES)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
