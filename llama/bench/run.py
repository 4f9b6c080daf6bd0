"""A benchmark from its flags to its record: load, the machine's limits, the figures, peak memory, the limits again."""

import math
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from llama import log, parallel
from llama.bench import limits, measure, report, rounds
from llama.bench.figures import MOST_BATCH, STEPS, Figure, too_long, wanted
from llama.bench.peak import forget_peak, peak
from llama.checkpoint import memory
from llama.checkpoint.layout import expected_shapes
from llama.device import choose_device
from llama.generation import Llama
from llama.progress import bar_of_seconds

LOADS, LOAD_SHARE = 4, 0.05  # loaded so often where that takes no more of the time
END_SHARE = 0.02  # of the time is for the last measurement of the read rate


def bench(model: dict[str, Any], seconds: float) -> report.Report:
    """Build what the flags of a command say, several times, and measure it; the time begins with the first."""
    begun = time.perf_counter()
    asked = model["max_batch_size"]
    flags = {**model, "max_batch_size": asked or 1}
    free = memory.free_bytes(choose_device(model["device"]))
    llama, loads = _loaded(flags, seconds)
    device = llama.model.device

    def left() -> float:
        spent = time.perf_counter() - begun
        return float(parallel.broadcast((1 - END_SHARE) * seconds - spent, device))

    before = peak(device)
    read = [limits.read_rate(device)]
    matmul = limits.matmul_rate(device, llama.model.dtype)
    slots = asked or _slots(llama, free)
    forget_peak(device)
    llama = measure.with_room(llama, slots)
    figures = wanted(slots)
    impossible = too_long(figures, llama.model.params.max_seq_len)
    possible = [one for one in figures if one not in impossible]
    with bar_of_seconds("measuring", seconds) as move:
        samples = rounds.measure(
            lambda figure, estimate: measure.run(llama, figure, estimate), possible, seconds, left,
            lambda figure, _: move(time.perf_counter() - begun, figure.name),
        )  # fmt: skip
    held = {name: max(size, before[name]) for name, size in peak(device).items()}
    read.append(limits.read_rate(device))
    rates = limits.Rates(max(read), matmul)
    found = [report.measured("load", "s", loads)]
    found += [_measured(llama, rates, one, samples.runs[one]) for one in _in_order(figures) if one in samples.runs]
    noise = report.noise(read, found)
    found += [report.measured(name, "bytes", [float(size)]) for name, size in held.items()]
    missing = {one.name: (impossible | samples.missed)[one] for one in _in_order(figures) if one not in samples.runs}
    return report.Report(
        kind=report.KIND, run=_facts(llama, model), read_rates=read, matmul_rate=matmul, figures=found,
        missing=missing, noise=noise,
    )  # fmt: skip


def _loaded(flags: dict[str, Any], seconds: float) -> tuple[Llama, list[float]]:
    """The model, and how long loading it took each time; what is said of it is said once.

    The first, which also loads libraries, does not count where others follow.
    """
    llama, took = _timed(lambda: Llama.build(**flags))
    loads = [took]
    while len(loads) < LOADS and sum(loads) + took < LOAD_SHARE * seconds:
        del llama  # two at once might not fit
        with log.quiet():
            llama, took = _timed(lambda: Llama.build(**flags))
        loads.append(took)
    return llama, loads[1:] or loads


def _timed(build: Callable[[], Llama]) -> tuple[Llama, float]:
    begun = time.perf_counter()
    llama = build()
    return llama, float(parallel.broadcast(time.perf_counter() - begun, llama.model.device))


def _slots(llama: Llama, free: int) -> int:
    """How many sequences fit into what was free before the model, up to MOST_BATCH; on every process the same."""
    need = limits.need_of(llama.model, llama.engine.scheduler.max_step_tokens)
    most = need.room(free) // llama.model.params.max_seq_len
    return int(parallel.broadcast(max(1, min(MOST_BATCH, 1 << max(most, 1).bit_length() - 1)), llama.model.device))


def _measured(llama: Llama, rates: limits.Rates, figure: Figure, runs: list[float]) -> report.Measured:
    """Tokens/s."""
    if figure.batch:
        tokens, least = figure.batch, limits.decode_seconds(
            llama.model, rates, figure.batch, figure.tokens + STEPS // 2
        )  # fmt: skip
    else:
        tokens, least = figure.tokens, limits.prefill_seconds(llama.model, rates, figure.tokens)
    return report.measured(figure.name, "tokens/s", [tokens / took for took in runs], tokens / least)


def _in_order(figures: list[Figure]) -> list[Figure]:
    return sorted(figures, key=lambda one: (one.batch > 0, one.tokens, one.batch))


def _facts(llama: Llama, flags: dict[str, Any]) -> dict[str, Any]:
    """What was run, and where: what two runs that are compared should share."""
    model, device = llama.model, llama.model.device
    args = model.params
    return {
        "checkpoint": flags["ckpt_dir"] or os.environ.get("LLAMA_CKPT_DIR") or "the demo",
        "parameters": sum(math.prod(shape) for shape in expected_shapes(args).values()),
        "weights": model.weight_format or str(model.output.weight.dtype).removeprefix("torch."),
        "dtype": str(model.dtype).removeprefix("torch."),
        "max_seq_len": args.max_seq_len,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "processes": parallel.world_size(),
        "torch": str(torch.__version__),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
