"""This runner beside Hugging Face transformers and llama.cpp on a CPU, in bfloat16, int8 and int4: one command.

python cpu.py
python cpu.py --shapes 134M --runs 1 --only int8
python cpu.py --variant avx2              # our kernels' lesser instructions; the peers have all that there are
python cpu.py --shapes 7B --runs 1        # 50 GB of disk

Each figure is the median over rounds; in a round every runner loads in a process of its own, in turns. Decode is the
time from the first to the last of some new tokens after a prompt of 16; its limit is the rate at which memory is read,
measured before each runner, over the bytes of the weights that a token needs; prefill is the time to one token after
512, the median of three; the ragged batch has prompts of 16 to 384 tokens and 32 new ones each. The first token after
start is that of a prompt of 16, with the load, from files that are in memory. No runner ends a text. Quantised files
are made beforehand for every runner. The medians are drawn in cpu.png.
"""

import json
import math
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import fire
import torch
from gguf_files import PRECISIONS, make_gguf
from models import VOCABULARY, make_checkpoint
from report import header, table

from llama import ModelArgs
from llama.bench.peak import forget_peak
from llama.checkpoint.layout import expected_shapes
from llama.checkpoint.writer import quantize

RAGGED = (16, 32, 64, 96, 128, 192, 256, 384)
NEW = 32
FIGURES = {"decode1": "decode, batch 1 (tokens/s)", "decode8": "decode, batch 8 (tokens/s)",
           "prefill": "prefill of 512 (tokens/s)", "ragged": "ragged batch of 8 (tokens/s)",
           "load": "load (s)", "first": "first token after start (s)", "peak": "peak memory (MB)"}  # fmt: skip
GOALS = {  # of the better peer, on every processor
    "bf16": {"decode1": 1.1, "decode8": 1.3, "prefill": 1.1, "ragged": 1.5, "first": 0.67, "peak": 1.0},
    "int8": {"decode1": 1.0, "decode8": 1.3, "prefill": 1.2, "first": 0.67, "peak": 1.0},
    "int4": {"decode1": 1.0, "decode8": 1.3, "prefill": 1.2, "first": 0.67, "peak": 1.0},
}
BITS = {"bf16": 16, "int8": 8.5, "int4": 4.5}  # of a weight, with its share of a scale
LIMIT_GOAL = 0.85  # of the rate at which memory is read, where a model fits no cache
LOWER_IS_BETTER = {"load", "first", "peak"}


class Ours:
    def __init__(self, folder: Path, precision: str, max_seq_len: int, sequences: int, **options: Any) -> None:
        from llama import Llama

        stored = folder if precision == "bf16" else folder / precision
        paths = (str(stored), str(folder / "tokenizer.model"))
        self.llama = Llama.build(*paths, max_seq_len, sequences, device="cpu", **options)
        self.llama.end_ids = set()  # the peers end no text either, and masking the end would take time

    def generate(self, prompts: list[list[int]], new_tokens: int) -> None:
        from llama import SamplingParams

        self.llama.engine.clear_prefix_cache()
        self.llama.generate(prompts, params=SamplingParams(temperature=0, max_gen_len=new_tokens))


def build(runner: str, folder: Path, precision: str) -> Any:
    """A runner that has `generate(prompts, new tokens)`."""
    if runner == "llama":
        return Ours(folder, precision, 512 + NEW, 8)
    from peers import LlamaCpp, Transformers

    if runner == "transformers":
        return Transformers(folder)
    return LlamaCpp(folder / f"model-{precision}.gguf", torch.get_num_threads(), 512 + NEW, 8)


def work(runner: str, folder: str, precision: str) -> None:
    """In a process of its own: measure one runner, print its figures as JSON."""
    rate = read_rate()
    forget_peak(torch.device("cpu"))  # which was that of the rate's buffer
    read_files(Path(folder), runner, precision)
    begun = time.perf_counter()
    model = build(runner, Path(folder), precision)
    figures = {"load": time.perf_counter() - begun}
    generator = torch.Generator().manual_seed(1)

    def seconds(lengths: tuple[int, ...], new_tokens: int) -> float:
        prompts = [torch.randint(3, VOCABULARY // 40, (n,), generator=generator).tolist() for n in lengths]
        started = time.perf_counter()
        model.generate(prompts, new_tokens)
        return time.perf_counter() - started

    seconds((16,), 1)
    figures["first"] = time.perf_counter() - begun
    seconds((16,), 4)
    for rows in (1, 8):
        first = min(seconds((16,) * rows, 1) for _ in range(3))
        figures[f"decode{rows}"] = rows * NEW / (seconds((16,) * rows, NEW + 1) - first)
    figures["prefill"] = 512 / statistics.median(seconds((512,), 1) for _ in range(3))
    figures["ragged"] = len(RAGGED) * NEW / seconds(RAGGED, NEW)
    figures["peak"] = peak_megabytes()
    figures["rate"] = rate
    print(json.dumps(figures))


def read_files(folder: Path, runner: str, precision: str) -> None:
    """Have the files that a runner loads in memory."""
    stored = folder / precision if runner == "llama" and precision != "bf16" else folder
    for path in [folder / f"model-{precision}.gguf"] if runner == "llama.cpp" else stored.glob("*.pth"):
        with path.open("rb") as file:
            while file.read(1 << 24):
                pass


def read_rate() -> float:
    """The bytes that all threads together read from memory in a second: the best of five sums over half a gigabyte."""
    numbers = torch.ones(1 << 26, dtype=torch.int64)

    def seconds() -> float:
        begun = time.perf_counter()
        numbers.sum()
        return time.perf_counter() - begun

    return numbers.nbytes / min(seconds() for _ in range(5))


def bytes_of_token(folder: Path, precision: str) -> float:
    """Of the weights that one token needs: all but the table of embeddings."""
    shapes = expected_shapes(ModelArgs(**json.loads((folder / "params.json").read_text())))
    return sum(math.prod(shape) for name, shape in shapes.items() if "embeddings" not in name) * BITS[precision] / 8


def peak_megabytes() -> float:
    """The most memory that this process held, mapped files included, since the peak was forgotten."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) / 1024


def kernels() -> str:
    """The variant of our kernels that runs."""
    from llama.kernels.library import VARIANTS, load
    from llama.kernels.library import variant as number

    return VARIANTS[number()] if load()[0] else "none"


def runners() -> list[tuple[str, str]]:
    """(Runner, precision) for all that is installed."""
    found = [("llama", precision) for precision in PRECISIONS]
    for module, runner, precisions in (
        ("transformers", "transformers", ["bf16"]),
        ("llama_cpp", "llama.cpp", PRECISIONS),
    ):
        try:
            __import__(module)
        except ImportError:
            print(f"{runner} is not installed: left out", file=sys.stderr)
            continue
        found += [(runner, precision) for precision in precisions]
    return found


def main(
    shapes: str = "134M,1.1B", runs: int = 3, dir: str = "/tmp/llama-benchmarks", only: str | None = None,
    variant: str | None = None, picture: str = str(Path(__file__).parent / "cpu.png"),
) -> None:  # fmt: skip
    """Print figures, medians of `runs`, and ratios to the better peer; `only`: one precision. Draw `picture`."""
    if variant:
        os.environ["LLAMA_KERNELS"] = variant
    print(header())
    print(f"kernels: {kernels()}")
    medians = {shape: measure(make_checkpoint(Path(dir), shape), shape, runs, only) for shape in shapes.split(",")}
    try:
        from chart import draw
    except ImportError:
        print("matplotlib is not installed: nothing is drawn", file=sys.stderr)
    else:
        draw(medians, FIGURES, LOWER_IS_BETTER, Path(picture))


def measure(folder: Path, shape: str, runs: int, only: str | None) -> dict[tuple[str, str], dict[str, float]]:
    """(Runner, precision) → the medians of its figures, printed."""
    pairs = [(runner, precision) for runner, precision in runners() if only in (None, precision)]
    for runner, precision in pairs:
        if runner == "llama.cpp":
            make_gguf(folder, precision)
        elif precision != "bf16" and not (folder / precision).exists():
            quantize(folder, folder / precision, precision)
    results: dict[tuple[str, str], list[dict[str, float]]] = {pair: [] for pair in pairs}
    for _ in range(runs):
        for pair in pairs:
            words = [sys.executable, __file__, "work", pair[0], str(folder), pair[1]]
            done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
            results[pair].append(json.loads(done.stdout.splitlines()[-1]))
            last = {name: round(value, 2) for name, value in results[pair][-1].items()}
            print(*pair, last, file=sys.stderr, flush=True)
    medians = {
        pair: {name: statistics.median(one[name] for one in every) for name in (*FIGURES, "rate")}
        for pair, every in results.items()
    }
    print(f"\n{shape}, {torch.get_num_threads()} threads, median of {runs}\n")
    head = ["runner", "precision", *FIGURES.values()]
    print(table(head, [[*pair, *(f"{m[name]:.4g}" for name in FIGURES)] for pair, m in medians.items()]), "\n")
    print(table(["precision", "figure", "ratio to the better peer", "goal"], ratios(medians)), "\n")
    head = ["runner", "precision", "GB/s read", "limit (tokens/s)", "of the limit, batch 1", "goal"]
    print(table(head, limits(folder, medians)))
    return medians


def ratios(medians: dict[tuple[str, str], dict[str, float]]) -> list[list[str]]:
    """How many times better than the better peer of the same precision, above 1 where this runner is ahead."""
    rows = []
    for precision in PRECISIONS:
        ours = medians.get(("llama", precision))
        peers = [m for (runner, p), m in medians.items() if p == precision and runner != "llama"]
        for name in FIGURES if ours and peers else ():
            if name in LOWER_IS_BETTER:
                ratio = min(peer[name] for peer in peers) / ours[name]
            else:
                ratio = ours[name] / max(peer[name] for peer in peers)
            goal = GOALS[precision].get(name)
            rows.append([precision, FIGURES[name], f"{ratio:.2f}", "" if goal is None else f"{goal:.2g}"])
    return rows


def limits(folder: Path, medians: dict[tuple[str, str], dict[str, float]]) -> list[list[str]]:
    """How near decoding of one sequence comes to reading the weights once a token."""
    rows = []
    for (runner, precision), m in medians.items():
        limit = m["rate"] / bytes_of_token(folder, precision)
        goal = f"{LIMIT_GOAL}" if runner == "llama" and bytes_of_token(folder, "bf16") > 1 << 30 else ""
        rows.append([runner, precision, f"{m['rate'] / 1e9:.1f}", f"{limit:.4g}", f"{m['decode1'] / limit:.2f}", goal])
    return rows


if __name__ == "__main__":
    if sys.argv[1:2] == ["work"]:
        work(*sys.argv[2:])
    else:
        fire.Fire(main)
