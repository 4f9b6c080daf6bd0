"""One run of a figure, through `Llama.generate`, as any caller's."""

import random
import time
from dataclasses import replace

from llama import parallel
from llama.bench.figures import Figure, steps_within
from llama.generation import Llama
from llama.request import SamplingParams


def with_room(llama: Llama, slots: int) -> Llama:
    """The same model with room for `slots` sequences, none of which ends before its time."""
    llama.model.params = replace(llama.model.params, max_batch_size=slots)
    step_tokens = llama.engine.scheduler.max_step_tokens
    wide = Llama(llama.model, llama.tokenizer, seed=llama.seed, max_step_tokens=step_tokens)
    wide.end_ids = set()
    return wide


def prompt(llama: Llama, tokens: int, last: int = 0) -> list[int]:
    """Random tokens, the same each time but for the last one."""
    words = min(llama.tokenizer.n_words, llama.model.params.vocab_size)
    draw = random.Random(1)
    made = [draw.randrange(3, words) for _ in range(max(tokens, 1))]
    return [*made[:-1], 3 + (made[-1] + last) % (words - 3)]


def seconds(llama: Llama, prompts: list[list[int]], new_tokens: int) -> float:
    """Of a call, by the first process's clock."""
    begun = time.perf_counter()
    llama.generate(prompts, params=SamplingParams(temperature=0, max_gen_len=new_tokens))
    return float(parallel.broadcast(time.perf_counter() - begun, llama.model.device))


def run(llama: Llama, figure: Figure, estimate: float) -> float:
    """Seconds to the first token after a prompt, or of a decode step, which may take about `estimate`."""
    if not figure.batch:
        llama.engine.clear_prefix_cache()
        return seconds(llama, [prompt(llama, figure.tokens)], 1)
    prompts = [prompt(llama, figure.tokens, last) for last in range(figure.batch)]
    steps = steps_within(estimate)
    first = min(seconds(llama, prompts, 1) for _ in range(3))  # the first of them computes, or copies, the context
    total = seconds(llama, prompts, steps + 1)
    return (total - first) / steps if total > first else total / (steps + 1)
