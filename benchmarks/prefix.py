"""64 prompts with a common header of 500 tokens and 20 tokens of their own, through 16 slots: tokens computed, time.

Beside them 64 prompts of the same lengths that have nothing in common. One new token each.

python benchmarks/prefix.py [--runs 3] [--dir FOLDER]
"""

import random
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import fire
from models import make_checkpoint
from ragged import run_greedy
from report import header, table

from llama import Llama

PROMPTS, HEADER, OWN, SLOTS = 64, 500, 20, 16


def main(runs: int = 3, dir: str | None = None) -> None:
    with TemporaryDirectory() as temporary:
        folder = make_checkpoint(Path(dir or temporary), "134M")
        runner = Llama.build(str(folder), str(folder / "tokenizer.model"), 768, SLOTS)
        rows = []
        for name in ("nothing in common", "a common header"):
            seconds, tokens = [], []
            for run in range(runs):
                prompts = make_prompts(name == "a common header", run, runner.tokenizer.n_words)
                before, begin = runner.engine.computed_tokens, time.perf_counter()
                run_greedy(runner.engine, prompts, [1] * PROMPTS)
                seconds.append(time.perf_counter() - begin)
                tokens.append(runner.engine.computed_tokens - before)
            runs_listed = ", ".join(f"{t:.2f}" for t in seconds)
            rows.append([name, str(statistics.median(tokens)), f"{statistics.median(seconds):.2f}", runs_listed])
    print(header())
    print(f"134M bf16, {PROMPTS} prompts of {HEADER} + {OWN} tokens, {SLOTS} slots; median of {runs}\n")
    print(table(["prompts", "tokens computed", "seconds", "all runs"], rows))


def make_prompts(common: bool, run: int, vocab: int) -> list[list[int]]:
    """Other tokens for each run, so that no run finds what an earlier one left in the cache."""
    rng = random.Random(f"{common} {run}")
    head = [1] + [rng.randrange(3, vocab) for _ in range(HEADER - 1)]
    heads = [head if common else [1] + [rng.randrange(3, vocab) for _ in range(HEADER - 1)] for _ in range(PROMPTS)]
    return [start + [rng.randrange(3, vocab) for _ in range(OWN)] for start in heads]


if __name__ == "__main__":
    fire.Fire(main)
