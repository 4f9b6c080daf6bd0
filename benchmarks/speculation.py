"""Decoding with speculate="lookup" beside decoding without it, on a CPU: tokens/s, and how many drafts were right.

python benchmarks/speculation.py [--shapes 134M,1.1B] [--precisions bf16,int8] [--batches 1,8] [--runs 3] [--tokens 96]

The weights are random, and such a model copies nothing. So what it chooses is computed, and then replaced by the next
word of a text that is given: all else, the products, the choice and the drafts, is as it is. A token is a word or a
sign of the pages in docs/, so drafts are right as often as they are in such texts:

- edit: the prompt is a passage, the completion the same passage with one word in twenty replaced.
- answer: the completion quotes the passage, 12 words at a time, with 6 words of another text before each quotation.
- other: the completion is a passage of another text, in which only pairs of words repeat now and then.
- new: no word of the completion was there before.

Each figure is the median over rounds, in which all ways take turns in one process; decoding is timed from the moment
at which every sequence has its first token.
"""

import json
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import fire
import torch
from models import VOCABULARY, make_checkpoint
from report import header, table

import llama.engine.engine as engine_module
from llama import Llama, SamplingParams
from llama.checkpoint.memory import STEP_TOKENS_CPU
from llama.engine.engine import Engine
from llama.engine.next_token import Place
from llama.loading import speculation
from llama.model.transformer import Transformer
from llama.options import RunOptions
from llama.request import Counts, Request

DOCS = Path(__file__).parent.parent / "docs"
PROMPT, REPLACED, OWN, QUOTED = 160, 20, 6, 12
TASKS = ("edit", "answer", "other", "new")
GOALS = {"edit": 1.8, "answer": 1.8, "other": 0.97, "new": 0.97}  # of batch 1
HEAD = ["precision", "batch", "task", "without (tokens/s)", "with (tokens/s)", "ratio", "goal", "drafts right",
        "tokens a step"]  # fmt: skip
Text = list[int]


def words_of(pages: Iterable[Path]) -> Text:
    """Their words and signs as numbers, equal ones alike."""
    numbers: dict[str, int] = {}
    words = [word for page in pages for word in re.findall(r"\w+|[^\w\s]", page.read_text(encoding="utf-8"))]
    return [numbers.setdefault(word, 3 + len(numbers)) for word in words]


def texts(task: str, count: int, tokens: int) -> list[tuple[Text, Text]]:
    """(Prompt, completion) for each sequence."""
    words, rng = words_of(sorted(DOCS.glob("*.md"))), random.Random(0)
    made = []
    for _ in range(count):
        passage, other = (words[at : at + max(PROMPT, tokens)] for at in rng.sample(range(len(words) // 2), 2))
        if task == "edit":
            told = [
                rng.randrange(VOCABULARY // 2, VOCABULARY) if n % REPLACED == 9 else w for n, w in enumerate(passage)
            ]
        elif task == "answer":
            starts = [rng.randrange(PROMPT - QUOTED) for _ in range(tokens)]
            told = [w for n, s in enumerate(starts) for w in (*other[n * OWN :][:OWN], *passage[s : s + QUOTED])]
        else:
            told = other if task == "other" else rng.sample(range(VOCABULARY // 2, VOCABULARY), tokens)
        made.append((passage[:PROMPT], told[:tokens]))
    return made


def decode(engine: Engine, told: list[tuple[Text, Text]]) -> tuple[float, Counts]:
    """Tokens/s of the texts, and what came of the drafts."""
    tokens, coming = len(told[0][1]), {tuple(prompt): text for prompt, text in told}
    params = SamplingParams(temperature=0, max_gen_len=tokens)
    requests = [Request(prompt, params, n, frozenset()) for n, (prompt, _) in enumerate(told)]
    times: list[float] = []
    choose, before = engine_module.next_tokens, replace(engine.counts)

    def next_tokens(places: Sequence[Place], logits: torch.Tensor, best: list[int]) -> list[int]:
        list(choose(places, logits, best))
        return [coming[tuple(place.request.prompt)][min(len(place.completion), tokens - 1)] for place in places]

    engine.clear_prefix_cache()
    for request in requests:
        engine.add(request, lambda _: times.append(time.perf_counter()))
    engine_module.next_tokens = next_tokens
    try:
        while not engine.idle:
            engine.step()
    finally:
        engine_module.next_tokens = choose
    assert [request.tokens for request in requests] == [text for _, text in told]
    begun = max(request.first_token for request in requests if request.first_token)
    after = [at for at in times if at > begun]
    return len(after) / (after[-1] - begun), engine.counts - before


def work(folder: str, precision: str, batches: str, runs: str, tokens: str) -> None:
    """In a process of its own: all tasks of one model, printed as JSON."""
    quantize = None if precision == "bf16" else precision
    sizes = [int(batch) for batch in batches.split(",")]
    paths, length = (folder, f"{folder}/tokenizer.model"), PROMPT + int(tokens) + 1
    model = Llama.build(*paths, length, max(sizes), device="cpu", quantize=quantize).model
    results = []
    for batch in sizes:
        engines = [engine_of(model, way, batch, length) for way in (None, "lookup")]
        for task in TASKS:
            results.append([batch, task, *measure(engines, texts(task, batch, int(tokens)), int(runs))])
            print(precision, results[-1], file=sys.stderr, flush=True)
    print(json.dumps(results))


def engine_of(model: Transformer, way: str | None, batch: int, length: int) -> Engine:
    options = RunOptions(max_seq_len=length, max_batch_size=batch, speculate=way)
    return Engine(model, batch, length, STEP_TOKENS_CPU, speculation(model, options, STEP_TOKENS_CPU))


def measure(
    engines: list[Engine], told: list[tuple[Text, Text]], runs: int
) -> tuple[float, float, float | None, float]:
    """Tokens/s of the engine without drafts and of the one with, the share of drafts that were right, tokens a step."""
    decode(engines[0], [(prompt, text[:4]) for prompt, text in told])
    rounds = [[decode(engine, told) for engine in engines] for _ in range(runs)]
    plain, drafting = (statistics.median(speed for speed, _ in way) for way in zip(*rounds, strict=True))
    counts = rounds[-1][-1][1]
    return plain, drafting, counts.accepted / counts.drafted if counts.drafted else None, counts.tokens_per_step


def main(
    shapes: Any = "134M,1.1B", precisions: Any = "bf16,int8", batches: Any = "1,8", runs: int = 3, tokens: int = 96,
    dir: str = "/tmp/llama-benchmarks",
) -> None:  # fmt: skip
    """Print a table for each shape."""
    print(header())
    for shape in listed(shapes):
        folder, rows = make_checkpoint(Path(dir), shape), []
        for precision in listed(precisions):
            words = [str(folder), precision, ",".join(listed(batches)), str(runs), str(tokens)]
            done = subprocess.run(
                [sys.executable, __file__, "work", *words], stdout=subprocess.PIPE, text=True, check=True
            )
            rows += [row_of(precision, *result) for result in json.loads(done.stdout.splitlines()[-1])]
        print(f"\n{shape}, {torch.get_num_threads()} threads, {tokens} tokens, median of {runs}\n")
        print(table(HEAD, rows), flush=True)


def listed(given: Any) -> list[str]:
    """What fire makes of values with commas between them."""
    return (
        given.split(",")
        if isinstance(given, str)
        else [str(one) for one in (given if isinstance(given, tuple) else [given])]
    )


def row_of(
    precision: str, batch: int, task: str, plain: float, drafting: float, share: float | None, per_step: float
) -> list[str]:  # fmt: skip
    goal, right = f"{GOALS[task]}" if batch == 1 else "", "" if share is None else f"{share:.2f}"
    speeds = [f"{plain:.4g}", f"{drafting:.4g}", f"{drafting / plain:.2f}"]
    return [precision, str(batch), task, *speeds, goal, right, f"{per_step:.2f}"]


if __name__ == "__main__":
    if sys.argv[1:2] == ["work"]:
        work(*sys.argv[2:])
    else:
        fire.Fire(main)
