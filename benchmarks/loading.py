"""Load time and peak memory of `Llama.build` on a checkpoint of 1.1 billion parameters, beside a plain read of it.

Every figure comes from a process of its own, the two kinds taking turns, with the files in the page cache. The plain
read fills fresh memory with the bytes of the checkpoint. The time of a build is that of the call, after the imports.

python benchmarks/loading.py [--rounds 5] [--dir FOLDER, where the checkpoint is kept and found again]
"""

import json
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import fire
import torch
from models import make_checkpoint
from report import header, table

from llama import Llama

SLACK = 0.5e9  # bytes of peak memory beside weights and cache: the interpreter, torch, one tensor
MAX_SEQ_LEN, MAX_BATCH_SIZE = 512, 4
GOAL = 1.3  # times the plain read


def main(rounds: int = 5, dir: str | None = None) -> None:
    with TemporaryDirectory() as temporary:
        folder = make_checkpoint(Path(dir or temporary), "1.1B")
        in_own_process(plain_read, folder)  # the files are in the page cache now
        reads, builds = [], []
        for _ in range(rounds):
            reads.append(in_own_process(plain_read, folder))
            builds.append(in_own_process(build, folder))
    size = reads[0]["bytes"]
    kinds = {"plain read": reads, "Llama.build": builds}
    seconds = {name: [run["seconds"] for run in runs] for name, runs in kinds.items()}
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    peak = max(run["peak"] for run in builds)
    held = builds[0]["weights"] + builds[0]["cache"]
    print(header())
    print(f"1.1B bf16, {size / 1e9:.2f} GB, warm page cache; median of {rounds} processes each, in turns\n")
    print(table(["", "seconds", "GB/s", "all runs"], [
        [name, f"{median:.2f}", f"{size / median / 1e9:.2f}", ", ".join(f"{value:.2f}" for value in seconds[name])]
        for name, median in medians.items()
    ]))  # fmt: skip
    print(f"\nload / read: {medians['Llama.build'] / medians['plain read']:.2f} (goal: at most {GOAL})")
    print(
        f"peak resident memory: {peak / 1e9:.2f} GB; weights {builds[0]['weights'] / 1e9:.2f}"
        f" + cache {builds[0]['cache'] / 1e9:.2f} + {SLACK / 1e9} = {(held + SLACK) / 1e9:.2f} GB (goal: at most that)"
    )


def in_own_process(measure: Any, folder: Path) -> dict[str, Any]:
    """What `measure`(folder) returns in a fresh process."""
    code = f"import json, loading; print(json.dumps(loading.{measure.__name__}({str(folder.resolve())!r})))"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout)


def plain_read(folder: str) -> dict[str, Any]:
    """Read every shard into fresh memory of its own."""
    begin, total = time.perf_counter(), 0
    for path in sorted(Path(folder).glob("consolidated.*.pth")):
        view = memoryview(torch.empty(path.stat().st_size, dtype=torch.uint8).numpy())
        total += len(view)
        with open(path, "rb", buffering=0) as file:
            while n := file.readinto(view):
                view = view[n:]
    return {"seconds": time.perf_counter() - begin, "bytes": total}


def build(folder: str) -> dict[str, Any]:
    """Build, and look at this process's peak since it began."""
    begin = time.perf_counter()
    tokenizer = f"{folder}/tokenizer.model"
    llama = Llama.build(folder, tokenizer, MAX_SEQ_LEN, MAX_BATCH_SIZE, device="cpu", dtype="bfloat16")
    seconds = time.perf_counter() - begin
    peak = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    cache = llama.engine.cache
    return {
        "seconds": seconds,
        "peak": int(peak[1]) * 1024,
        "weights": sum(parameter.nbytes for parameter in llama.model.parameters()),
        "cache": sum(tensor.nbytes for tensor in (*cache.keys, *cache.values)),
    }


if __name__ == "__main__":
    fire.Fire(main)
