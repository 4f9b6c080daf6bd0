"""A model that is larger than the memory it may use: this runner with its layers on the disk, beside llama.cpp.

python larger_than_memory.py                          # 7B in bfloat16 within 4 GB; 30 GB of disk
python larger_than_memory.py --shape 1.1B --limit 1GB
python larger_than_memory.py --placed auto            # as many layers in memory as fit

Each runner has a process of its own in a control group (version 1 or 2) that limits its memory, page cache included;
where none can be made, that is said and nothing is limited. Files are dropped from the page cache before. Decode is the
time of some tokens of all sequences after their first; each sequence has a prompt of 16. The peak is what the process
held at most (VmHWM), beside the goal: the KV cache, two layers and half a gigabyte. The rate of the disk is that of
reads that pass the page cache, measured right before each runner; the rate reached is that of the steps, were each to
read all matrices.
"""

import json
import math
import mmap
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fire
import torch
from cpu import bytes_of_token, peak_megabytes
from gguf_files import make_gguf
from models import VOCABULARY, make_checkpoint
from report import header, table

from llama import ModelArgs
from llama.checkpoint.layout import expected_shapes
from llama.device_map import parse_size

PROMPT, LENGTH, BATCHES = 16, 64, (1, 8)
BESIDE = 5 * 10**8  # bytes that a process may hold beside its cache and two layers
GROUPS = Path("/sys/fs/cgroup")


def build(runner: str, folder: Path, placed: str, limit: int) -> Any:
    """A runner that has `generate(prompts, new tokens)`."""
    if runner == "llama.cpp":
        from peers import LlamaCpp

        return LlamaCpp(folder / "model-bf16.gguf", torch.get_num_threads(), LENGTH, max(BATCHES))
    from cpu import Ours

    if placed == "auto":
        options: dict[str, Any] = {"device_map": "auto", "max_memory": {"cpu": limit}}
    else:
        layers = json.loads((folder / "params.json").read_text())["n_layers"]
        parts = ("embeddings", f"layers.0-{layers - 1}", "output")
        options = {"device_map": dict.fromkeys(parts, "disk")}
    return Ours(folder, "bf16", LENGTH, max(BATCHES), **options)


def work(runner: str, folder: str, placed: str, limit: str, tokens: str, group: str) -> None:
    """In a process of its own: measure one runner within a control group, print its figures as JSON."""
    path, new = Path(folder), int(tokens)
    own = path / ("model-bf16.gguf" if runner == "llama.cpp" else "consolidated.00.pth")
    forget(own)
    figures = {"disk": disk_rate(own)}
    if group:
        (Path(group) / "cgroup.procs").write_text(str(os.getpid()))
    begun = time.perf_counter()
    model = build(runner, path, placed, int(limit))
    figures["load"] = time.perf_counter() - begun
    generator = torch.Generator().manual_seed(1)

    def seconds(rows: int, new_tokens: int) -> float:
        prompts = torch.randint(3, VOCABULARY // 40, (rows, PROMPT), generator=generator).tolist()
        started = time.perf_counter()
        model.generate(prompts, new_tokens)
        return time.perf_counter() - started

    for rows in BATCHES:
        first = seconds(rows, 1)
        figures[f"first{rows}"] = first
        figures[f"decode{rows}"] = rows * new / (seconds(rows, new + 1) - first)
    figures["peak"] = peak_megabytes()
    print(json.dumps(figures))


def forget(path: Path) -> None:
    """Have nothing of a file in the page cache."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def disk_rate(path: Path) -> float:
    """Bytes a second of a file's first gigabytes, read past the page cache."""
    size = min(2 << 30, path.stat().st_size) >> 23 << 23
    with mmap.mmap(-1, 8 << 20) as block:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
        begun = time.perf_counter()
        for start in range(0, size, len(block)):
            os.preadv(descriptor, [block], start)
        seconds = time.perf_counter() - begun
        os.close(descriptor)
    return size / seconds


@contextmanager
def limited(limit: int) -> Iterator[str]:
    """A control group whose processes have so many bytes, as its folder; "" where none can be made, which is said."""
    first = (GROUPS / "memory").is_dir()  # version 1
    group = (GROUPS / "memory" if first else GROUPS) / f"llama-{os.getpid()}"
    try:
        group.mkdir()
        (group / ("memory.limit_in_bytes" if first else "memory.max")).write_text(str(limit))
    except OSError as error:
        print(f"no limit: no control group can be made ({error})", file=sys.stderr)
    limits = (group / "cgroup.procs").exists()
    try:
        yield str(group) if limits else ""
    finally:
        if limits:
            group.rmdir()


def goal(folder: Path) -> float:
    """The bytes that a process should hold at most."""
    args = ModelArgs(**json.loads((folder / "params.json").read_text()))
    layer = sum(math.prod(shape) for name, shape in expected_shapes(args).items() if name.startswith("layers.0."))
    cache = 2 * args.n_layers * args.kv_heads * args.head_dim * LENGTH * max(BATCHES)
    return 2 * (cache + 2 * layer) + BESIDE


def main(
    shape: str = "7B", limit: str = "4GB", tokens: int = 4, placed: str = "disk", dir: str = "/tmp/llama-benchmarks",
    only: str | None = None,
) -> None:  # fmt: skip
    """Print the figures of each runner within `limit`; `placed`: all on the "disk", or "auto"; `only`: one runner."""
    most = parse_size(limit)
    assert most is not None, "limit: a size such as 4GB"
    print(header())
    folder, rows = make_checkpoint(Path(dir), shape), []
    needed = bytes_of_token(folder, "bf16")
    for runner in ["llama", "llama.cpp"] if only is None else [only]:
        if runner == "llama.cpp":
            try:
                __import__("llama_cpp")
            except ImportError:
                print("llama.cpp is not installed: left out", file=sys.stderr)
                continue
            make_gguf(folder, "bf16")
        with limited(most) as group:
            words = [sys.executable, __file__, "work", runner, str(folder), placed, str(most), str(tokens), group]
            done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        print(runner, {name: round(value, 3) for name, value in found.items()}, file=sys.stderr, flush=True)
        steps = [f"{needed * found[f'decode{n}'] / n / 1e9:.2f}" for n in BATCHES]
        cells = [f"{found[name]:.3g}" for name in ("first1", "decode1", "first8", "decode8")]
        held = [f"{found['peak']:.0f}", f"{found['load']:.1f}"]
        rows.append([runner, *held, *cells, *steps, f"{found['disk'] / 1e9:.2f}"])
    size = sum(path.stat().st_size for path in folder.glob("*.pth"))
    print(f"\n{shape}, {size / 1e9:.1f} GB of weights within {limit}, {torch.get_num_threads()} threads")
    print(f"goal: at most {goal(folder) / 2**20:.0f} MB held\n")
    head = ["runner", "peak memory (MB)", "load (s)", "first token (s)", "decode, batch 1 (tokens/s)",
            "first tokens of 8 (s)", "decode, batch 8 (tokens/s)", "GB/s of batch 1", "GB/s of batch 8",
            "GB/s of the disk"]  # fmt: skip
    print(table(head, rows))


if __name__ == "__main__":
    if sys.argv[1:2] == ["work"]:
        work(*sys.argv[2:])
    else:
        fire.Fire(main)
