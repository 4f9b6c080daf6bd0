"""Eight prompts of 16 to 384 tokens, 32 new tokens each, in one call: llama beside transformers' left-padded batch.

python benchmarks/ragged.py [--runs 3] [--dir FOLDER]
"""

import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import fire
from models import make_checkpoint
from peers import Transformers
from report import header, table

from llama import Llama, SamplingParams
from llama.engine.engine import Engine
from llama.request import Request

LENGTHS = (16, 32, 64, 96, 128, 192, 256, 384)
NEW_TOKENS = 32


def prompts_of(lengths: list[int], vocab: int) -> list[list[int]]:
    """A prompt of random tokens after BOS for each length; the same on every machine."""
    return [[1] + [random.Random(f"{i} {n}").randrange(3, vocab) for i in range(n - 1)] for n in lengths]


def main(runs: int = 3, dir: str | None = None) -> None:
    with TemporaryDirectory() as temporary:
        folder = make_checkpoint(Path(dir or temporary), "134M")
        llama = Llama.build(str(folder), str(folder / "tokenizer.model"), 512, len(LENGTHS))
        prompts = prompts_of(LENGTHS, llama.tokenizer.n_words)
        peer = Transformers(folder)
        times: dict[str, list[float]] = {"llama": [], peer.name: []}
        for run in range(runs + 1):
            for name, call in (("llama", lambda: run_greedy(llama.engine, prompts, [NEW_TOKENS] * len(prompts))),
                               (peer.name, lambda: peer.generate(prompts, NEW_TOKENS))):  # fmt: skip
                begin = time.perf_counter()
                rows = call()
                assert [len(row) for row in rows] == [NEW_TOKENS] * len(prompts)
                if run:  # the first is a warm-up
                    times[name].append(time.perf_counter() - begin)
    medians = {name: statistics.median(values) for name, values in times.items()}
    print(header())
    print(f"134M bf16, prompts of {LENGTHS} tokens, {NEW_TOKENS} new tokens each; median of {runs}\n")
    print(table(["runner", "seconds", "new tokens/s", "all runs"], [
        [name, f"{median:.2f}", f"{NEW_TOKENS * len(LENGTHS) / median:.0f}", ", ".join(f"{t:.2f}" for t in times[name])]
        for name, median in medians.items()
    ]))  # fmt: skip
    print(f"\nllama takes {medians['llama'] / medians[peer.name]:.2f} of {peer.name}' time (goal: at most 0.50)")


def run_greedy(engine: Engine, prompts: list[list[int]], new_tokens: Sequence[int]) -> list[list[int]]:
    """Exactly so many greedy tokens after each prompt: the requests have no end token."""
    requests = []
    for prompt, n in zip(prompts, new_tokens, strict=True):
        requests.append(Request(prompt, SamplingParams(temperature=0, max_gen_len=n), 0, frozenset()))
        engine.add(requests[-1])
    while not engine.idle:
        engine.step()
    return [request.tokens for request in requests]


if __name__ == "__main__":
    fire.Fire(main)
