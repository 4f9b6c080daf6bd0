"""A checkpoint folder in Meta's layout → verified weights in a `Transformer`, one tensor at a time."""

import ctypes
import math
import mmap
import pickle
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from llama import checklist, memory
from llama.errors import CheckpointError, DeviceError
from llama.kernels.quantized import LANES, can_pack, pack, pack_rows, pack_scales, quantize
from llama.model import ModelArgs, Transformer
from llama.parallel import choose_dtype, model_parallel_rank, model_parallel_size, rank
from llama.params_file import read_params
from llama.paths import opened
from llama.progress import bar_of_bytes
from llama.pth_file import check_archive, plain_tensors
from llama.resharding import either, plan, possible_sizes, split_axis
from llama.weight_format import FORMATS, check_groups, format_of, quantized_shapes, scales_of

# The matrices that are joined while they are read, in the order of their rows.
JOINED = {"wqkv": ("wq", "wk", "wv"), "w13": ("w1", "w3")}
IGNORED = {"rope.freqs"}  # old files carry the RoPE frequencies, which are computed here
LISTED = 5  # how many names an error lists
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
        listed = f"it holds {_listed(names)}" if names else "it is empty"
        raise CheckpointError(
            f"{folder} has no consolidated.*.pth; {listed}: ckpt_dir is the folder of Meta's .pth files"
        )
    numbers = {int(m[1]) for name in found if (m := re.fullmatch(r"consolidated\.(\d\d)\.pth", name))}
    wanted = [f"consolidated.{i:02d}.pth" for i in range(max(max(numbers, default=0) + 1, _listed_shards(folder)))]
    missing = [name for name in wanted if name not in found]
    strange = sorted(set(found) - set(wanted))
    if missing:
        raise CheckpointError(
            f"{folder} lacks {_listed(missing)} of its {len(wanted)} shards: download them, all shards are needed"
        )
    if strange:
        raise CheckpointError(f"{folder} holds {_listed(strange)} beside its {len(wanted)} shards: remove them")
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


def expected_shapes(args: ModelArgs) -> dict[str, tuple[int, ...]]:
    """Every parameter's name on disk and its whole shape, before any split."""
    q, kv = args.n_heads * args.head_dim, args.kv_heads * args.head_dim
    layer = {
        "attention.wq": (q, args.dim), "attention.wk": (kv, args.dim), "attention.wv": (kv, args.dim),
        "attention.wo": (args.dim, q), "feed_forward.w1": (args.hidden_dim, args.dim),
        "feed_forward.w2": (args.dim, args.hidden_dim), "feed_forward.w3": (args.hidden_dim, args.dim),
        "attention_norm": (args.dim,), "ffn_norm": (args.dim,),
    }  # fmt: skip
    shapes = {"tok_embeddings.weight": (args.vocab_size, args.dim), "norm.weight": (args.dim,),
              "output.weight": (args.vocab_size, args.dim)}  # fmt: skip
    for i in range(args.n_layers):
        shapes |= {f"layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    return shapes


def stored_shapes(args: ModelArgs) -> dict[str, tuple[int, ...]]:
    """Every tensor's name on disk and its whole shape: a quantised matrix is two, its integers and its scales."""
    return quantized_shapes(expected_shapes(args), args.quantize)


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
            raise CheckpointError(f"{path} does not fit params.json: {_listed(faults, '; ')}")


def _wrong_dtype(name: str, found: torch.dtype, quantize: str | None) -> str | None:
    """What a tensor should be instead, if its dtype is none that it may have."""
    form = format_of(name, quantize)
    if form and name.endswith(".weight"):
        wanted = FORMATS[form].dtype
        return None if str(found) == f"torch.{wanted}" else wanted
    return None if found.is_floating_point else "a floating-point tensor"


def shard_shape(name: str, whole: tuple[int, ...], shards: int) -> tuple[int, ...]:
    """What one of `shards` holds of a parameter of shape `whole`."""
    axis = split_axis(name)
    return tuple(length // shards if i == axis else length for i, length in enumerate(whole))


def process_counts(args: ModelArgs) -> list[int]:
    """The numbers of processes that the model can be split over, ascending."""
    return possible_sizes(*_split_lengths(args).values())


def _split_lengths(args: ModelArgs) -> dict[str, int]:
    return {"heads": args.n_heads, "kv heads": args.kv_heads, "dim": args.dim, "hidden dim": args.hidden_dim,
            "vocabulary": args.vocab_size}  # fmt: skip


def check_split(args: ModelArgs, shards: int, processes: int, do: str = "start") -> None:
    """Raise DeviceError, which says to `do` with the numbers that would do, unless the model splits so."""
    for name, length in _split_lengths(args).items():
        if length % processes:
            what = f"{length} {name}" if "heads" in name else f"the {name} of {length}"
            counted = f"{shards} shard{'s' if shards > 1 else ''}"
            ways = f"{do} {either(process_counts(args))}"
            raise DeviceError(f"{counted}, but {what} cannot be split over {processes} processes: {ways}")


def fill(
    model: Transformer, shards: list[dict[str, Tensor]], device: torch.device, dtype: torch.dtype,
    stored: str | None = None,
) -> None:  # fmt: skip
    """Give every parameter of a model on the meta device this rank's slices of the shards, converted on the way.

    The shards must be memory-mapped, as `open_shard` gives them: what has been read of them is let go. Matrices of a
    quantised model are quantised one by one, unless they are `stored` so. Matrices that our kernels read are packed.
    """
    shapes = quantized_shapes(expected_shapes(model.params), stored)
    # What a tensor needs beside itself is then gone before all is there.
    largest_first = sorted(model.named_parameters(), key=lambda item: -item[1].numel())
    sizes = {name: _stored_sizes(sources(name), shapes, shards) for name, _ in largest_first}
    doing = "loading" if stored == model.params.quantize else f"loading as {model.params.quantize}"
    count, of = 0, sum(map(len, sizes.values()))
    with bar_of_bytes(doing, sum(map(sum, sizes.values())), quiet=rank() > 0) as move:
        for name, _ in largest_first:
            names, (owner, _, leaf) = sources(name), name.rpartition(".")
            module = model.get_submodule(owner)
            if hasattr(module, "scales"):
                form = format_of(names[0], model.params.quantize)
                weight, module.scales = _matrix(names, shapes, shards, device, dtype, form, stored is not None)
            else:
                weight = _joined(names, shapes, shards, dtype, device)
            setattr(module, leaf, nn.Parameter(weight, requires_grad=False))
            del weight
            count += len(sizes[name])
            move(sum(sizes[name]), f"{count} of {of} tensors")
    _return_memory()


def _stored_sizes(names: list[str], shapes: dict[str, tuple[int, ...]], shards: list[dict[str, Tensor]]) -> list[int]:
    """The bytes that this rank reads of each tensor that a parameter is made of, its scales among them."""
    mp = model_parallel_size()
    stored = (name for name in (*names, *map(scales_of, names)) if name in shapes)
    return [math.prod(shard_shape(name, shapes[name], mp)) * shards[0][name].itemsize for name in stored]


def _matrix(
    names: list[str], shapes: dict[str, tuple[int, ...]], shards: list[dict[str, Tensor]], device: torch.device,
    dtype: torch.dtype, form: str | None, stored: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """A matrix of a model in `dtype`, and its scales: in `form`, which the files may have already; packed for a CPU."""
    if form and not stored:
        weight, scales = quantize(_joined(names, shapes, shards, stored_dtype(shards), device), form)
    else:
        held = getattr(torch, FORMATS[form].dtype) if form else dtype
        scales = _joined(list(map(scales_of, names)), shapes, shards, torch.float16, device) if form else None
        rows = _whole_rows(names, shapes, shards, held)
        if rows and device.type == "cpu" and can_pack(rows[0], dtype):
            weight = pack_rows(rows)  # straight from the files
            for part in rows:
                _release(part)
            return weight, None if scales is None else pack_scales(scales)
        weight = _joined(names, shapes, shards, held, device)
    return pack(weight, scales) if can_pack(weight, dtype) else (weight, scales)


def _whole_rows(
    names: list[str], shapes: dict[str, tuple[int, ...]], shards: list[dict[str, Tensor]], dtype: torch.dtype
) -> list[Tensor]:
    """This rank's slices of several tensors, one below the other, as they lie in the files.

    An empty list where they are not whole rows of `dtype`, or one but the last ends within a block of packed weights.
    """
    found: list[Tensor] = []
    for name in names:
        for _, part in _parts(name, shapes[name], shards, model_parallel_size(), model_parallel_rank()):
            if not part.is_contiguous() or part.dtype != dtype or part.shape[1] != shapes[name][1]:
                return []
            found.append(part)
    return found if not any(len(part) % LANES for part in found[:-1]) else []


def _joined(
    names: list[str], shapes: dict[str, tuple[int, ...]], shards: list[dict[str, Tensor]], dtype: torch.dtype,
    device: torch.device,
) -> Tensor:  # fmt: skip
    """This rank's slices of several tensors, one below the other, in `dtype` on `device`."""
    mp, rank = model_parallel_size(), model_parallel_rank()
    parts = [shard_shape(name, shapes[name], mp) for name in names]
    whole = torch.empty((sum(part[0] for part in parts), *parts[0][1:]), dtype=dtype, device=device)
    row = 0
    for name, (rows, *_) in zip(names, parts, strict=True):
        read_slice(whole[row : row + rows], name, shapes[name], shards, mp, rank)
        row += rows
    return whole


def sources(name: str) -> list[str]:
    """The names on disk that a parameter of the model is joined from, in the order of its rows."""
    for joined, parts in JOINED.items():
        if f".{joined}." in name:
            return [name.replace(joined, part) for part in parts]
    return [name]


def read_slice(
    into: Tensor, name: str, whole: tuple[int, ...], shards: list[dict[str, Tensor]], mp: int, rank: int
) -> None:
    """Copy what process `rank` of `mp` holds of a parameter of shape `whole`; lets go of the mapped pages it read."""
    for target, part in _parts(name, whole, shards, mp, rank):
        into[target].copy_(part)
        _release(part)


def _parts(
    name: str, whole: tuple[int, ...], shards: list[dict[str, Tensor]], mp: int, rank: int
) -> Iterator[tuple[tuple[slice, ...], Tensor]]:
    """(Where to, what) for each piece of a parameter that process `rank` of `mp` holds."""
    axis = split_axis(name)
    everything = [slice(0, length) for length in whole]
    if axis is None:
        yield tuple(everything), shards[0][name]
        return
    everything[axis] = slice(0, whole[axis] // mp)
    for piece in plan(whole[axis], len(shards), mp, rank):
        target = list(everything)
        target[axis] = slice(piece.offset, piece.offset + piece.stop - piece.start)
        yield tuple(target), shards[piece.shard][name].narrow(axis, piece.start, piece.stop - piece.start)


def _release(part: Tensor) -> None:
    """Let go of the mapped pages that a tensor was read from, so that they do not count as this process's memory."""
    if sys.platform != "linux":
        return
    page = mmap.PAGESIZE
    first = part.untyped_storage().data_ptr()
    begin, end = -(-first // page) * page, (first + part.untyped_storage().nbytes()) // page * page
    if end > begin:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), mmap.MADV_DONTNEED)


def _return_memory() -> None:
    """Give memory that the C library holds for later back to the system: loading leaves holes in it (glibc only)."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(ctypes.c_size_t(0))


def stored_dtype(shards: list[dict[str, Tensor]]) -> torch.dtype:
    """The dtype of the checkpoint: that of its embedding table."""
    return shards[0]["tok_embeddings.weight"].dtype


def _listed(names: list[str], separator: str = ", ") -> str:
    more = f"{separator}and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return separator.join(names[:LISTED]) + more


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


def load(
    folder: Path, shards: list[dict[str, Tensor]], args: ModelArgs, device: torch.device, dtype: torch.dtype | None,
    max_step_tokens: int, quantize: str | None = None,
) -> Transformer:  # fmt: skip
    """This rank's part of the model, in `dtype` (None: see `choose_dtype`), after all that can be checked first.

    `quantize` None holds the matrices as they are stored; `args.quantize` becomes how they are held. Raises
    CheckpointError where tensors do not fit `args`, DeviceError where the processes or the free memory do not allow it
    (the room for `args.max_batch_size` sequences of `args.max_seq_len` included).
    """
    check_tensors(shards, args, folder)
    stored, args.quantize = args.quantize, quantize or args.quantize
    if stored not in (None, args.quantize):
        raise CheckpointError(
            f"{folder} is quantised as {stored}, so quantize={quantize} cannot be had of it: leave quantize out, or use"
            " the checkpoint that it was made from"
        )
    mp = model_parallel_size()
    check_split(args, len(shards), mp)
    check_groups(expected_shapes(args), args.quantize, mp)
    dtype = dtype or choose_dtype(stored_dtype(shards), device)
    needed = memory.need(args, dtype, mp, max_step_tokens)
    memory.check_fits(needed, memory.free_bytes(device), args.max_seq_len, args.max_batch_size, device)
    model = Transformer(args)
    fill(model, shards, device, dtype, stored)
    return model.eval()
