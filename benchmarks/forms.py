"""What a form costs: decode steps of 8 texts that follow a JSON schema beside free ones; masks beside xgrammar's.

python forms.py [--shape 134M] [--dtype bfloat16] [--tokens 64] [--runs 5]
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fire
import numpy
import torch
from models import make_checkpoint
from report import header, table

from llama import Llama, SamplingParams
from llama.grammar import Forms
from llama.tokenizer import Tokenizer

ROWS = 8
SCHEMA = {
    "type": "array", "minItems": 100,
    "items": {
        "type": "object", "additionalProperties": False, "required": ["name", "age", "kind", "tags"],
        "properties": {
            "name": {"type": "string", "maxLength": 30}, "age": {"type": "integer", "minimum": 0, "maximum": 120},
            "kind": {"enum": ["person", "place", "thing"]},
            "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 4},
        },
    },
}  # fmt: skip


def step_times(llama: Llama, tokens: int, runs: int) -> dict[str, list[float]]:
    """Milliseconds of a decode step, free, with a penalty (which takes the host's road too), and with a schema."""
    kinds: dict[str, dict[str, Any]] = {
        "free": {}, "frequency_penalty": {"frequency_penalty": 0.1}, "json_schema": {"json_schema": SCHEMA},
    }  # fmt: skip
    prompts = [[1, *range(300, 316), 400 + row] for row in range(ROWS)]
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    for run in range(runs + 1):
        for kind, more in kinds.items():
            took = []
            for length in (1, 1 + tokens):
                params = SamplingParams(temperature=1, seed=1, max_gen_len=length, min_gen_len=0, **more)
                llama.end_ids = set() if kind != "json_schema" else {llama.tokenizer.eos_id}
                begun = time.perf_counter()
                made, _ = llama.generate(prompts, params=params)
                took.append(time.perf_counter() - begun)
                assert set(map(len, made)) == {length}
            if run:  # the first one compiles
                times[kind].append((took[1] - took[0]) / tokens * 1e3)
    return times


def masks(tokenizer: Tokenizer, text: str) -> dict[str, float]:
    """Microseconds of a mask and of taking the token behind it, median over a text's tokens."""
    tokens = tokenizer.encode(text, bos=False, eos=False)
    form = Forms(tokenizer, tokenizer.n_words).form("json_schema", SCHEMA, frozenset({tokenizer.eos_id}))
    found = {"llguidance": timed(lambda place: form.mask(tokens[:place]), len(tokens))}
    try:
        import xgrammar
    except ImportError:
        return found
    vocabulary = [surface(tokenizer, token) for token in range(tokenizer.n_words)]
    info = xgrammar.TokenizerInfo(vocabulary, vocab_size=len(vocabulary), stop_token_ids=[tokenizer.eos_id])
    compiled = xgrammar.GrammarCompiler(info).compile_json_schema(json.dumps(SCHEMA))
    matcher, mask = xgrammar.GrammarMatcher(compiled), xgrammar.allocate_token_bitmask(1, len(vocabulary))

    def ask(place: int) -> None:
        if place:
            assert matcher.accept_token(tokens[place - 1]), f"xgrammar refuses token {place - 1}"
        matcher.fill_next_token_bitmask(mask)

    tokens = tokenizer.encode_inside(text)
    found["xgrammar"] = timed(ask, len(tokens))
    return found


def surface(tokenizer: Tokenizer, token: int) -> bytes:
    """The bytes that a token adds within a text."""
    return tokenizer.token_bytes([tokenizer.encode("a", bos=False, eos=False)[0], token])[1]


def timed(ask: Callable[[int], object], count: int) -> float:
    times = []
    for place in range(count):
        begun = time.perf_counter()
        ask(place)
        times.append(time.perf_counter() - begun)
    print(f"  ({statistics.fmean(times) * 1e6:.0f} µs on average, {numpy.max(times) * 1e6:.0f} at most)")
    return statistics.median(times) * 1e6


def main(shape: str = "134M", dtype: str = "bfloat16", tokens: int = 64, runs: int = 5, dir: str | None = None) -> None:
    """Print both tables."""
    print(header())
    with tempfile.TemporaryDirectory() as temporary:
        folder = make_checkpoint(Path(dir or temporary), shape)
        llama = Llama.build(str(folder), str(folder / "tokenizer.model"), 512, ROWS, device="cpu", dtype=dtype)
        times = {kind: statistics.median(each) for kind, each in step_times(llama, tokens, runs).items()}
        print(f"{shape} {dtype}, {ROWS} texts, {torch.get_num_threads()} threads, medians of {runs}\n")
        rows = [[kind, f"{ms:.2f}", f"{100 * (ms / times['free'] - 1):+.1f} %"] for kind, ms in times.items()]
        print(table(["texts", "a step (ms)", "beside free"], rows))
        text = json.dumps(
            [{"name": "Tom is a cat", "age": n, "kind": "person", "tags": ["a b", "c"]} for n in range(20)]
        )
        alone = masks(llama.tokenizer, text)
    print()
    print(table(["library", "a mask and its token (µs)"], [[name, f"{us:.0f}"] for name, us in alone.items()]))


if __name__ == "__main__":
    fire.Fire(main)
