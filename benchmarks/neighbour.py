"""A busy neighbour: decoding on a CPU while another process spins on one of its cores, beside llama.cpp.

python neighbour.py [--shape 134M] [--runs 3]

Each runner loads in a process of its own, in turns: alone, then beside a process that does nothing but count. Ours runs
as the command does (threads that wait give up their core soon), and with the library's defaults.
"""

import contextlib
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import fire
import torch
from cpu import runners
from gguf_files import make_gguf
from models import make_checkpoint
from report import header, table

from llama.checkpoint.writer import quantize

WAYS = {"ours, as the command": {"GOMP_SPINCOUNT": "3000"}, "ours, as the library": {}, "llama.cpp": {}}
GOAL = 0.9  # of llama.cpp's


def spin() -> None:
    while True:
        pass


@contextlib.contextmanager
def busy(processes: int) -> Iterator[None]:
    """So many processes that never rest, meanwhile."""
    started = [multiprocessing.get_context("spawn").Process(target=spin, daemon=True) for _ in range(processes)]
    for process in started:
        process.start()
    try:
        yield
    finally:
        for process in started:
            process.kill()


def main(shape: str = "134M", runs: int = 3, dir: str = "/tmp/llama-benchmarks") -> None:
    """Print tokens/s at batch 1 and 8, alone and beside one busy process."""
    folder = make_checkpoint(Path(dir), shape)
    known = {runner for runner, _ in runners()}
    ways = [way for way in WAYS if way.startswith("ours") or way in known]
    rows = []
    for precision in ("bf16", "int8", "int4"):
        if precision != "bf16" and not (folder / precision).exists():
            quantize(folder, folder / precision, precision)
        if "llama.cpp" in ways:
            make_gguf(folder, precision)
        medians = {(way, n): measure(way, precision, folder, n, runs) for n in (0, 1) for way in ways}
        for (way, n), figures in medians.items():
            peer = medians.get(("llama.cpp", n))
            ratios = [f"{figures[key] / peer[key]:.2f}" if peer and "ours" in way else "" for key in figures]
            rows.append([precision, way, str(n), *(f"{value:.4g}" for value in figures.values()), *ratios])
    print(f"{header()}\n\n{shape}, {torch.get_num_threads()} threads, tokens/s, median of {runs}; goal {GOAL}\n")
    head = [
        "precision",
        "runner",
        "busy processes",
        "batch 1",
        "batch 8",
        "× llama.cpp, batch 1",
        "× llama.cpp, batch 8",
    ]
    print(table(head, rows))


def measure(way: str, precision: str, folder: Path, processes: int, runs: int) -> dict[str, float]:
    """The medians of tokens/s at batch 1 and 8, by cpu.py's own measurement."""
    words = [sys.executable, str(Path(__file__).with_name("cpu.py")), "work", way if way == "llama.cpp" else "llama"]
    found = []
    for _ in range(runs):
        with busy(processes):
            done = subprocess.run(
                [*words, str(folder), precision], stdout=-1, text=True, check=True, env={**os.environ, **WAYS[way]}
            )
        found.append(json.loads(done.stdout.splitlines()[-1]))
    return {key: statistics.median(one[key] for one in found) for key in ("decode1", "decode8")}


if __name__ == "__main__":
    fire.Fire(main)
