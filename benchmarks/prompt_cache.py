"""Time to the first token of a prompt whose beginning of 2,000 tokens is computed, or loaded from a prompt cache.

python benchmarks/prompt_cache.py [--shapes 134M,1.1B] [--tokens 2000] [--runs 5] [--dir FOLDER]

Beside them the time to read the file alone, from the system's cache of files, and to find which checkpoint it is.
Loading checks all of the file (its CRC-32), and copies it into the KV cache. Medians; a run of each way takes turns.
"""

import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import fire
from models import make_checkpoint
from report import header, table

from llama import Llama
from llama.checkpoint.fingerprint import fingerprint_of

OWN = 8  # tokens of the prompt behind its beginning
HEAD = ["model", "file (MB)", "computed (s)", "loaded (s)", "of it load_prefix (s)", "reading the file alone (s)",
        "computed / loaded", "fingerprint (ms)"]  # fmt: skip


def main(
    shapes: str | tuple[str, ...] = "134M,1.1B", tokens: int = 2000, runs: int = 5, dir: str | None = None
) -> None:
    names = shapes.split(",") if isinstance(shapes, str) else shapes
    with TemporaryDirectory() as temporary:
        rows = [measure(Path(dir or temporary), Path(temporary), name, tokens, runs) for name in names]
    print(header())
    print(f"bf16, a beginning of {tokens} tokens and {OWN} of its own, one new token; median of {runs}\n")
    print(table(HEAD, rows))


def measure(models: Path, place: Path, shape: str, tokens: int, runs: int) -> list[str]:
    folder = make_checkpoint(models, shape)
    llama = Llama.build(str(folder), str(folder / "tokenizer.model"), tokens + 64, 1)
    rng = random.Random(0)
    prompt = [1] + [rng.randrange(3, llama.tokenizer.n_words) for _ in range(tokens + OWN - 1)]
    file = place / f"{shape}.cache"
    llama.save_prefix(prompt[:tokens], file)
    times: list[tuple[float, float, float, float, float]] = []
    for _ in range(runs):
        llama.engine.clear_prefix_cache()
        computed = seconds(lambda: llama.generate([prompt], max_gen_len=1, temperature=0))
        llama.engine.clear_prefix_cache()
        load = seconds(lambda: llama.load_prefix(file))
        first = seconds(lambda: llama.generate([prompt], max_gen_len=1, temperature=0))
        alone = seconds(file.read_bytes)
        found = seconds(fingerprint_of([folder / "consolidated.00.pth"]))
        times.append((computed, load + first, load, alone, found))
    computed, loaded, load, alone, found = (statistics.median(column) for column in zip(*times, strict=True))
    return [
        shape, f"{file.stat().st_size / 1e6:.0f}", f"{computed:.2f}", f"{loaded:.3f}", f"{load:.3f}", f"{alone:.3f}",
        f"{computed / loaded:.0f} ×", f"{found * 1000:.1f}",
    ]  # fmt: skip


def seconds(run: Callable[[], object]) -> float:
    begun = time.perf_counter()
    run()
    return time.perf_counter() - begun


if __name__ == "__main__":
    fire.Fire(main)
