"""Long contexts on a CPU, beside Hugging Face transformers and llama.cpp: decode behind 2,048 and 4,000 positions.

python long_context.py [--shape 134M] [--runs 3]

In a round every runner loads in a process of its own, in turns; a figure is the median over rounds. Decode is the time
from the first to the last of some new tokens of one sequence; prefill the time to one token after 4,000.
"""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import fire
import torch
from cpu import NEW, Ours
from gguf_files import make_gguf
from models import VOCABULARY, make_checkpoint
from report import header, table

CONTEXTS = (2048, 4000)
LONGEST = CONTEXTS[-1] + NEW
RUNNERS = {
    "ours": "",
    "ours, fp8 cache": "",
    "transformers": "transformers",
    "llama.cpp": "llama_cpp",
}  # what each needs


def main(shape: str = "134M", runs: int = 3, dir: str = "/tmp/llama-benchmarks") -> None:
    """Print tokens/s of each runner in bfloat16, and ours as a multiple of the better peer's."""
    folder = make_checkpoint(Path(dir), shape)
    found: dict[str, list[dict[str, float]]] = {name: [] for name, needed in RUNNERS.items() if installed(needed)}
    if "llama.cpp" in found:
        make_gguf(folder, "bf16")
    for _ in range(runs):
        for name in found:
            done = subprocess.run(
                [sys.executable, __file__, "work", name, str(folder)], stdout=-1, text=True, check=True
            )
            found[name].append(json.loads(done.stdout.splitlines()[-1]))
    medians = {
        name: {key: statistics.median(one[key] for one in every) for key in every[0]} for name, every in found.items()
    }
    print(f"{header()}\n\n{shape} in bfloat16, {torch.get_num_threads()} threads, tokens/s, median of {runs}\n")
    figures = list(medians["ours"])
    print(table(["runner", *figures], [[name, *(f"{m[f]:.4g}" for f in figures)] for name, m in medians.items()]), "\n")
    peers = [m for name, m in medians.items() if not name.startswith("ours")]
    if peers:
        ratios = [f"{medians['ours'][figure] / max(peer[figure] for peer in peers):.2f}" for figure in figures]
        print(table(["ours to the better peer", *figures], [["", *ratios]]))


def installed(module: str) -> bool:
    try:
        return not module or bool(__import__(module))
    except ImportError:
        print(f"{module} is not installed: left out", file=sys.stderr)
        return False


def build(name: str, folder: Path) -> Any:
    """A runner that has `generate(prompts, new tokens)`."""
    if name.startswith("ours"):
        return Ours(folder, "bf16", LONGEST, 1, kv_dtype="fp8" if "fp8" in name else None)
    from peers import LlamaCpp, Transformers

    if name == "transformers":
        return Transformers(folder)
    return LlamaCpp(folder / "model-bf16.gguf", torch.get_num_threads(), LONGEST, 1)


def work(name: str, folder: str) -> None:
    """In a process of its own: measure one runner, print its figures as JSON."""
    model, figures = build(name, Path(folder)), {}
    generator = torch.Generator().manual_seed(1)

    def seconds(length: int, new_tokens: int) -> float:
        prompt = torch.randint(3, VOCABULARY // 40, (length,), generator=generator).tolist()
        begun = time.perf_counter()
        model.generate([prompt], new_tokens)
        return time.perf_counter() - begun

    seconds(16, 4)
    for context in CONTEXTS:
        first = min(seconds(context, 1) for _ in range(2))
        figures[f"decode at {context}"] = NEW / max(seconds(context, NEW + 1) - first, 1e-9)
    figures[f"prefill of {context}"] = context / first
    print(json.dumps(figures))


if __name__ == "__main__":
    if sys.argv[1:2] == ["work"]:
        work(*sys.argv[2:])
    else:
        fire.Fire(main)
