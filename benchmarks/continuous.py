"""256 requests, prompts of 16–512 and completions of 16–256 tokens, through 16 slots: llama beside transformers.

transformers runs them in batches of 16, left-padded, each until its longest completion ends. Tokens that were not
asked for do not count. Also shown: the time that llama spends outside the model's forward and the choice of tokens.

python benchmarks/continuous.py [--runs 3] [--peer_runs 3] [--requests 256] [--dir FOLDER]
"""

import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import fire
from models import make_checkpoint
from peers import Transformers
from ragged import prompts_of, run_greedy
from report import header, table

from llama import Llama
from llama.engine import engine
from llama.model.transformer import Transformer

SLOTS = 16


class Stopwatch:
    """Sums the time inside a function that it wraps."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.seconds = 0.0

    def __call__(self, *args: Any) -> Any:
        begin = time.perf_counter()
        try:
            return self.function(*args)
        finally:
            self.seconds += time.perf_counter() - begin


def main(runs: int = 3, requests: int = 256, dir: str | None = None, peer_runs: int | None = None) -> None:
    rng = random.Random(0)
    lengths = [rng.randint(16, 512) for _ in range(requests)]
    new_tokens = [rng.randint(16, 256) for _ in range(requests)]
    with TemporaryDirectory() as temporary:
        folder = make_checkpoint(Path(dir or temporary), "134M")
        runner = Llama.build(str(folder), str(folder / "tokenizer.model"), 768, SLOTS)
        prompts = prompts_of(lengths, runner.tokenizer.n_words)
        peer = Transformers(folder)
        peer.generate(prompts[:2], 4)
        times: dict[str, list[float]] = {"llama": [], peer.name: []}
        overheads = []
        for run in range(runs):
            seconds, overhead = time_llama(runner, prompts, new_tokens)
            times["llama"].append(seconds)
            overheads.append(overhead)
            if run < (runs if peer_runs is None else peer_runs):
                times[peer.name].append(time_transformers(peer, prompts, new_tokens))
            print({name: [round(t, 1) for t in values] for name, values in times.items()}, file=sys.stderr, flush=True)
    medians = {name: statistics.median(values) for name, values in times.items()}
    print(header())
    print(
        f"134M bf16, {requests} requests, {sum(lengths)} prompt and {sum(new_tokens)} new tokens, {SLOTS} slots;"
        " median of the runs listed\n"
    )
    print(table(["runner", "seconds", "new tokens/s", "all runs"], [
        [name, f"{median:.1f}", f"{sum(new_tokens) / median:.0f}", ", ".join(f"{t:.1f}" for t in times[name])]
        for name, median in medians.items()
    ]))  # fmt: skip
    print(f"\nllama has {medians[peer.name] / medians['llama']:.2f} × {peer.name}' throughput (goal: at least 2.50)")
    print(f"engine overhead {statistics.median(overheads):.1%} of llama's time (goal: under 3 %)")


def time_llama(runner: Llama, prompts: list[list[int]], new_tokens: list[int]) -> tuple[float, float]:
    """(Seconds, share of them outside forward and the choice of tokens)."""
    forward, choose = Stopwatch(Transformer.forward), Stopwatch(engine.next_tokens)
    Transformer.forward = lambda self, step, cache: forward(self, step, cache)
    engine.next_tokens = choose
    begin = time.perf_counter()
    rows = run_greedy(runner.engine, prompts, new_tokens)
    seconds = time.perf_counter() - begin
    Transformer.forward, engine.next_tokens = forward.function, choose.function
    assert [len(row) for row in rows] == new_tokens
    return seconds, 1 - (forward.seconds + choose.seconds) / seconds


def time_transformers(peer: Transformers, prompts: list[list[int]], new_tokens: list[int]) -> float:
    begin = time.perf_counter()
    for first in range(0, len(prompts), SLOTS):
        batch = slice(first, first + SLOTS)
        peer.generate(prompts[batch], max(new_tokens[batch]))
    return time.perf_counter() - begin


if __name__ == "__main__":
    fire.Fire(main)
