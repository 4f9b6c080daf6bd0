"""What every benchmark prints beside its figures: the machine, the versions, the date."""

import datetime
import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path


def header() -> str:
    """Machine, versions and date in three lines."""
    packages = ("torch", "transformers", "fairscale", "sentencepiece")
    found = []
    for name in packages:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{name} not installed")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return (
        f"machine: {cpu()}, {cores} cores, {platform.system()} {platform.release()}\n"
        f"versions: Python {platform.python_version()}, {', '.join(found)}\n"
        f"date: {datetime.date.today()}"
    )


def cpu() -> str:
    """The processor's name, and those of its instructions that decide speed."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    facts = dict(line.split(":", 1) for line in lines if ":" in line)
    facts = {key.strip(): value.strip() for key, value in facts.items()}
    known = ("avx2", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
    has = [name for name in known if name in facts.get("flags", "").split()]
    return f"{facts.get('model name', platform.machine())} ({', '.join(has) or 'no vector extensions listed'})"


def median_seconds(run: Callable[[int], object], repeats: int, warm_up: int) -> float:
    """The median time of a call, after some that do not count; each is given its number."""
    times = []
    for number in range(warm_up + repeats):
        begun = time.perf_counter()
        run(number)
        times.append(time.perf_counter() - begun)
    return statistics.median(times[warm_up:])


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
