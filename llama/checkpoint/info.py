"""What a checkpoint is, and what of it fits on this machine; its weights stay unread on the disk."""

import math
from dataclasses import replace
from pathlib import Path
from typing import TypedDict

import torch

from llama.checkpoint import memory, placing
from llama.checkpoint.layout import expected_shapes, process_counts
from llama.checkpoint.source import Source, checkpoint_dtype, open_checked
from llama.device import choose_dtype
from llama.errors import DeviceError
from llama.gate import one_line
from llama.kernels.plain import held_dtype
from llama.model.args import ModelArgs
from llama.options import RunOptions
from llama.wording import either, in_units


class ShardInfo(TypedDict):
    file: str
    bytes: int


class DeviceInfo(TypedDict):
    """What one device has, and what one process would need on it, in the dtype it would run in."""

    device: str
    total_bytes: int
    free_bytes: int
    dtype: str
    weights_bytes: int
    cache_bytes: int
    workspace_bytes: int
    fits: bool
    largest_batch_size: int  # with sequences of max_seq_len; 0: not even one fits
    devices_for_one_sequence: int | None  # so many like it hold one together; None: no split is fine enough


class StageInfo(TypedDict):
    """What one device would have of the model."""

    device: str
    parts: str
    layers: int
    weights_bytes: int  # of the disk: those in the files
    cache_bytes: int
    workspace_bytes: int
    memory_of: str  # the device whose memory that is
    limit_bytes: int


class PlacementInfo(TypedDict):
    """Where max_memory and device_map place the model."""

    dtype: str
    stages: list[StageInfo]
    fits: bool
    reason: str | None  # why it does not


class Info(TypedDict):
    """A checkpoint in numbers; bytes outside `devices` are those of the stored dtype."""

    folder: str
    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    hidden_dim: int
    vocab_size: int
    norm_eps: float
    rope_theta: float
    ignored_params: list[str]
    parameters: int
    dtype: str
    quantize: str | None
    shards: list[ShardInfo]
    processes: list[int]  # the numbers that it can be split over
    max_seq_len: int
    max_batch_size: int
    weights_bytes: int
    cache_bytes: int
    more: dict[str, str]  # what else the format of the files says
    devices: list[DeviceInfo]
    placement: PlacementInfo | None  # where that was asked for


def describe(
    folder: Path, max_seq_len: int, max_batch_size: int,
    max_memory: dict[str, int | str] | None = None, device_map: str | dict[str, str] | None = None,
) -> Info:  # fmt: skip
    """What the files of `folder` say, and what of it fits on each device of this machine, or on those that are named;
    nothing is loaded.

    Raises ParameterError for sizes below 1 and maps that are none, CheckpointError as loading would.
    """
    options = RunOptions(
        max_seq_len=max_seq_len, max_batch_size=max_batch_size, max_memory=max_memory, device_map=device_map
    )
    source, args = open_checked(folder)
    stored = checkpoint_dtype(source)
    needed = memory.need(args, stored, 1, memory.STEP_TOKENS, weight_format=args.quantize)
    return Info(
        folder=str(folder),
        dim=args.dim,
        n_layers=args.n_layers,
        n_heads=args.n_heads,
        n_kv_heads=args.kv_heads,
        head_dim=args.head_dim,
        hidden_dim=args.hidden_dim,
        vocab_size=args.vocab_size,
        norm_eps=args.norm_eps,
        rope_theta=args.rope_theta,
        ignored_params=list(source.ignored),
        parameters=sum(math.prod(shape) for shape in expected_shapes(args).values()),
        dtype=_name(stored),
        quantize=args.quantize,
        shards=[ShardInfo(file=path.name, bytes=path.stat().st_size) for path in source.files],
        processes=process_counts(args),
        max_seq_len=max_seq_len,
        max_batch_size=max_batch_size,
        weights_bytes=needed.weights,
        cache_bytes=needed.cache_per_token * max_seq_len * max_batch_size,
        more={name: fact for name, fact in source.facts.items() if fact},
        devices=[_on(device, args, stored, max_seq_len, max_batch_size) for device in _devices()],
        placement=_placed(source, args, options) if options.places else None,
    )


def _placed(source: Source, args: ModelArgs, options: RunOptions) -> PlacementInfo:
    args = replace(args, max_seq_len=options.max_seq_len, max_batch_size=options.max_batch_size)
    plan = placing.plan(args, options, source, torch.device(placing.main_device(options)), None)
    reason = None
    try:
        plan.check()
    except DeviceError as error:
        reason = str(error)
    stages = [
        StageInfo(
            device=share.device, parts=share.parts, layers=share.layers, weights_bytes=share.weights,
            cache_bytes=share.cache, workspace_bytes=share.workspace, memory_of=share.memory_of,
            limit_bytes=plan.limits[share.memory_of],
        )
        for share in plan.shares
    ]  # fmt: skip
    return PlacementInfo(dtype=_name(plan.dtype), stages=stages, fits=reason is None, reason=reason)


def _devices() -> list[torch.device]:
    gpus = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        gpus.append(torch.device("mps"))
    return [*gpus, torch.device("cpu")]


def _on(
    device: torch.device, args: ModelArgs, stored: torch.dtype, max_seq_len: int, max_batch_size: int
) -> DeviceInfo:
    free, dtype, step = memory.free_bytes(device), choose_dtype(stored, device), memory.step_tokens(device)

    def need(processes: int) -> memory.Need:
        held = held_dtype(stored, dtype, device)
        return memory.need(args, dtype, processes, step, weight_format=args.quantize, held=held)

    needed = need(1)
    enough = (processes for processes in process_counts(args) if need(processes).room(free) >= max_seq_len)
    largest = max(0, needed.room(free) // max_seq_len)
    return DeviceInfo(
        device=str(device),
        total_bytes=memory.total_bytes(device),
        free_bytes=free,
        dtype=_name(dtype),
        weights_bytes=needed.weights,
        cache_bytes=needed.cache_per_token * max_seq_len * max_batch_size,
        workspace_bytes=needed.workspace,
        fits=largest >= max_batch_size,
        largest_batch_size=largest,
        devices_for_one_sequence=next(enough, None),
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ------------------------------------------------------------------------------------------------------ for people


def text(info: Info) -> str:
    """The same for people: the checkpoint, a line for each fact, then a table with a column for each device."""
    sequences = "1 sequence" if info["max_batch_size"] == 1 else f"{info['max_batch_size']} sequences"
    facts = {
        "checkpoint": info["folder"],
        "files": _files(info["shards"]),
        "parameters": f"{info['parameters']:,} in {_stored(info)}: {in_units(info['weights_bytes'])}",
        "layers": f"{info['n_layers']} of dim {info['dim']}, hidden dim {info['hidden_dim']}",
        "heads": f"{info['n_heads']} of {info['head_dim']}, {info['n_kv_heads']} kv heads",
        "vocabulary": f"{info['vocab_size']} tokens",
        "constants": f"norm_eps {info['norm_eps']:g}, rope_theta {info['rope_theta']:.10g}",
        **info["more"],
        "params.json": f"ignored: {', '.join(info['ignored_params'])}" if info["ignored_params"] else "",
        "processes": either(info["processes"]),
        "KV cache": f"{in_units(info['cache_bytes'])} for {sequences} of {info['max_seq_len']} tokens",
    }
    lines = [f"{name:<12}  {one_line(fact)}" for name, fact in facts.items() if fact]
    placed = ["", *_map(info["placement"])] if info["placement"] else []
    return "\n".join([*lines, "", *_table(info["devices"]), *placed])


def _stored(info: Info) -> str:
    return f"{info['quantize']} and {info['dtype']}" if info["quantize"] else info["dtype"]


def _files(shards: list[ShardInfo]) -> str:
    sizes = dict.fromkeys(in_units(shard["bytes"]) for shard in shards)
    return f"{len(shards)} shard{'s' if len(shards) > 1 else ''} of {' or '.join(sizes)}"


def _table(devices: list[DeviceInfo]) -> list[str]:
    """A row for each fact, as wide as the widest of its column."""
    rows = [
        ("on this machine", [device["device"] for device in devices]),
        ("memory", [in_units(device["total_bytes"]) for device in devices]),
        ("free", [in_units(device["free_bytes"]) for device in devices]),
        ("runs in", [device["dtype"] for device in devices]),
        ("weights", [in_units(device["weights_bytes"]) for device in devices]),
        ("KV cache", [in_units(device["cache_bytes"]) for device in devices]),
        ("workspace", [in_units(device["workspace_bytes"]) for device in devices]),
        ("fits", ["yes" if device["fits"] else "no" for device in devices]),
        ("largest max_batch_size", [str(device["largest_batch_size"] or "none") for device in devices]),
    ]
    if not all(device["largest_batch_size"] for device in devices):
        needed = [device["devices_for_one_sequence"] for device in devices]
        rows.append(("such devices for 1 sequence", [str(n or "no number") for n in needed]))
    return _aligned(rows)


def _map(placement: PlacementInfo) -> list[str]:
    """A row for each stage, and whether they fit."""
    rows = [(f"as placed, in {placement['dtype']}", ["weights", "KV cache", "workspace", "limit"])]
    for stage in placement["stages"]:
        sizes = [in_units(size) for size in (stage["weights_bytes"], stage["cache_bytes"], stage["workspace_bytes"])]
        own = stage["memory_of"] == stage["device"]
        limit = in_units(stage["limit_bytes"]) if own else f"that of {stage['memory_of']}"
        rows.append((f"{stage['device']}: {stage['parts']}", [*sizes, limit]))
    return [*_aligned(rows), "fits: yes" if placement["fits"] else f"fits: no, {placement['reason']}"]


def _aligned(rows: list[tuple[str, list[str]]]) -> list[str]:
    first = max(len(name) for name, _ in rows)
    widths = [max(map(len, column)) for column in zip(*(cells for _, cells in rows), strict=True)]
    return [
        f"{name:<{first}}  " + "  ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
        for name, cells in rows
    ]
