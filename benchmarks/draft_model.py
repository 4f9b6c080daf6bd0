"""Decoding with a draft model a tenth of the size, beside decoding without it, on a CPU: tokens/s of one sequence.

python benchmarks/draft_model.py [--shapes 134M,1.1B] [--precisions bf16,int8] [--runs 3] [--tokens 96]

The weights are random. The draft model is the first layer of the model that verifies, with its embeddings and output;
what the layers behind it add is scaled, by the factor at which the two choose the same token in about 7 of 10 places.
Both are greedy. A figure is the median over rounds, in which both ways take turns in one process.
"""

import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import fire
import torch
from models import VOCABULARY, make_checkpoint
from report import header, table
from speculation import listed

from llama import Llama, SamplingParams
from llama.checkpoint.memory import STEP_TOKENS_CPU
from llama.engine.draft_model import DraftModel
from llama.engine.drafts import Speculation
from llama.engine.engine import Engine
from llama.kernels.decode_step import rows_alike
from llama.model.transformer import Transformer
from llama.options import RunOptions
from llama.request import Request

GOAL, AGREEMENT = 1.5, 0.7
FACTORS = (0.3, 0.2, 0.15, 0.1, 0.07, 0.05, 0.03, 0.02, 0.01)  # tried from the left
PROMPT = 16
HEAD = ["shape", "precision", "draft's share of the bytes", "agrees", "without (tokens/s)", "with (tokens/s)", "ratio",
        "goal", "drafts right", "tokens a step"]  # fmt: skip


def main(
    shapes: Any = "134M,1.1B", precisions: Any = "bf16,int8", runs: int = 3, tokens: int = 96,
    dir: str = "/tmp/llama-benchmarks",
) -> None:  # fmt: skip
    """Print a table."""
    rows = [
        row(make_checkpoint(Path(dir), shape), shape, precision, runs, tokens)
        for shape in listed(shapes)
        for precision in listed(precisions)
    ]
    print(f"{header()}\n\n{torch.get_num_threads()} threads, {tokens} tokens, median of {runs}\n")
    print(table(HEAD, rows))


@torch.inference_mode()
def row(folder: Path, shape: str, precision: str, runs: int, tokens: int) -> list[str]:
    length = PROMPT + tokens + 1
    quantize = None if precision == "bf16" else precision
    model = Llama.build(str(folder), f"{folder}/tokenizer.model", length, 1, device="cpu", quantize=quantize).model
    small, cost, scaled = first_layer(model), 0.0, 1.0
    cost = bytes_of(small) / bytes_of(model)
    for factor in FACTORS:
        scale(model, factor / scaled)
        scaled = factor
        _, counts = decode(engine_of(model, small, cost, 1, length), 64)
        if (agrees := counts.accepted / max(1, counts.drafted)) >= AGREEMENT - 0.05:
            break
    plain, drafting = Engine(model, 1, length, STEP_TOKENS_CPU), engine_of(model, small, cost, 7, length)
    rounds = [[decode(engine, tokens) for engine in (plain, drafting)] for _ in range(runs)]
    without, with_drafts = (statistics.median(speed for speed, _ in way) for way in zip(*rounds, strict=True))
    counts = rounds[-1][1][1]
    return [
        shape, precision, f"{cost:.2f}", f"{agrees:.2f}", f"{without:.4g}", f"{with_drafts:.4g}",
        f"{with_drafts / without:.2f}", f"{GOAL}", f"{counts.accepted / max(1, counts.drafted):.2f}",
        f"{counts.tokens_per_step:.2f}",
    ]  # fmt: skip


def first_layer(model: Transformer) -> Transformer:
    """A model of its first layer, with the same weights in memory."""
    small = Transformer(
        replace(model.params, n_layers=1), weight_format=model.weight_format, batch_invariant=model.batch_invariant
    )
    small.tok_embeddings, small.norm, small.output = model.tok_embeddings, model.norm, model.output
    small.layers[0] = model.layers[0]
    return small.eval()


def scale(model: Transformer, factor: float) -> None:
    """What each layer but the first adds to its input."""
    for layer in list(model.layers)[1:]:
        for matrix in (layer.attention.wo, layer.feed_forward.w2):
            (matrix.weight if matrix.scales is None else matrix.scales).mul_(factor)


def bytes_of(model: Transformer) -> int:
    """Of the weights that a token needs."""
    scales = (m.scales for m in model.modules() if getattr(m, "scales", None) is not None)
    weights = (w for name, w in model.named_parameters() if not name.startswith("tok_embeddings"))
    return sum(tensor.nbytes for tensor in (*weights, *scales))


def engine_of(model: Transformer, small: Transformer, cost: float, most: int, length: int) -> Engine:
    drafter = DraftModel(small, 1, length, STEP_TOKENS_CPU, cost)
    options = RunOptions(draft_tokens=most)
    speculation = Speculation("model", drafter, options.draft_tokens, min(STEP_TOKENS_CPU, rows_alike(model)))
    return Engine(model, 1, length, STEP_TOKENS_CPU, speculation)


def decode(engine: Engine, tokens: int) -> tuple[float, Any]:
    """Tokens/s behind the first token, and what came of the drafts."""
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randint(3, VOCABULARY // 40, (PROMPT,), generator=generator).tolist()
    request = Request(prompt, SamplingParams(temperature=0, max_gen_len=tokens), 0, frozenset())
    before = replace(engine.counts)
    engine.clear_prefix_cache()
    engine.add(request)
    while not engine.idle:
        engine.step()
    assert request.first_token
    return (tokens - 1) / (request.finished - request.first_token), engine.counts - before


if __name__ == "__main__":
    fire.Fire(main)
