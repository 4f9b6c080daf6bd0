"""What int8 and int4 weights and an fp8 cache cost: perplexity and greedy agreement on the demo, random 1.1B logits.

python quality.py [--dir FOLDER]
"""

import math
from pathlib import Path

import fire
import torch
from models import make_checkpoint
from report import header, table

from llama import Llama
from llama.checkpoint.find import DEMO
from llama.model.step import Step

BEGINNINGS = ("Once upon a time there was a small fox named Tom.", "Ben wanted a red kite.", "One morning Mia went",
              "The old bear lived in a", "Vera had a green top.")  # fmt: skip
SAMPLES = 12
KINDS = {"int8": {"quantize": "int8"}, "int4": {"quantize": "int4"}, "bfloat16, KV cache in fp8": {"kv_dtype": "fp8"}}


def build(folder: Path, options: dict[str, str], max_seq_len: int, sequences: int) -> Llama:
    tokenizer = str(folder / "tokenizer.model")
    return Llama.build(str(folder), tokenizer, max_seq_len, sequences, device="cpu", **options)


def perplexity(llama: Llama, texts: list[str]) -> float:
    logprobs = [p for score in llama.score(texts) for p in score["logprobs"] if p is not None]
    return math.exp(-sum(logprobs) / len(logprobs))


def logits(llama: Llama) -> torch.Tensor:
    """Of every place of a prompt of 64 random tokens."""
    tokens = torch.randint(3, 700, (64,), generator=torch.Generator().manual_seed(0)).tolist()
    step = Step.pack([(0, 0, tokens)], range(64), llama.model.device)
    return llama.model(step, llama.engine.cache)


def main(dir: str = "/tmp/llama-benchmarks", large: bool = True) -> None:
    plain = build(DEMO, {}, 512, 8)
    texts = [r["generation"] for r in plain.text_completion(BEGINNINGS * SAMPLES, temperature=0.8, echo=True)]
    prompts = [text[: 20 + 7 * i % 60] for i, text in enumerate(texts)]
    expected = [r["generation"] for r in plain.text_completion(prompts, temperature=0, max_gen_len=16)]
    base = perplexity(plain, texts)
    folder = make_checkpoint(Path(dir), "1.1B") if large else None
    reference = logits(build(folder, {}, 64, 1)) if folder else None
    rows = [["bfloat16", f"{base:.4f}", "", "", ""]]
    for name, options in KINDS.items():
        llama = build(DEMO, options, 512, 8)
        found = [r["generation"] for r in llama.text_completion(prompts, temperature=0, max_gen_len=16)]
        same = sum(a == b for a, b in zip(found, expected, strict=True))
        value = perplexity(llama, texts)
        error = ""
        if reference is not None:
            error = f"{((logits(build(folder, options, 64, 1)) - reference).norm() / reference.norm()).item():.4f}"
        rows.append([name, f"{value:.4f}", f"{(value / base - 1) * 100:+.2f} %", f"{same} of {len(found)}", error])
    print(header())
    print(f"demo: {len(texts)} stories sampled from it; 16 greedy tokens after {len(prompts)} beginnings\n")
    head = ["weights", "perplexity", "change", "same greedy 16 tokens", "relative logit error, random 1.1B"]
    print(table(head, rows))


if __name__ == "__main__":
    fire.Fire(main)
