"""Complete a file of prompts with Ray Data: for those who already run a Ray cluster (pip install "ray[data]").

python examples/ray_batch.py --prompts_file prompts.jsonl --output out/ --ckpt_dir llama-2-7b --replicas 4

The file has a JSON object with "prompt" a line. Each replica is an actor that builds the model once; Ray moves blocks
of prompts between machines. The checkpoint folder must be readable on each of them. Results are JSON lines in the
folder `output`. The seed of a line is derived from its text, so the noise of a result does not depend on its actor.
"""

import hashlib
from pathlib import Path
from typing import Any

import fire
import ray

from llama import Llama, SamplingParams
from llama.checkpoint.find import DEMO


class Completer:
    """One replica: built once in its actor, then called with blocks of prompts."""

    def __init__(self, ckpt_dir: str, tokenizer_path: str, max_seq_len: int, max_batch_size: int) -> None:
        self.llama = Llama.build(ckpt_dir, tokenizer_path, max_seq_len, max_batch_size)

    def __call__(self, block: dict[str, Any], max_gen_len: int | None, temperature: float) -> dict[str, Any]:
        """A block as columns: `prompt` in; `prompt`, `text`, `finish_reason` and `error` out."""
        prompts = [str(prompt) for prompt in block["prompt"]]
        params = [
            SamplingParams(temperature=temperature, max_gen_len=max_gen_len, seed=seed_of(prompt)) for prompt in prompts
        ]
        done = dict(self.llama.run_each(prompts, params))
        rows = [done[index] for index in range(len(prompts))]
        return {
            "prompt": prompts,
            "text": [row["generation"] if isinstance(row, dict) else "" for row in rows],
            "finish_reason": [row["finish_reason"] if isinstance(row, dict) else "error" for row in rows],
            "error": ["" if isinstance(row, dict) else str(row) for row in rows],
        }


def seed_of(prompt: str) -> int:
    return int.from_bytes(hashlib.blake2b(prompt.encode(), digest_size=7).digest(), "little")


def main(
    prompts_file: str,
    output: str,
    ckpt_dir: str = str(DEMO),
    tokenizer_path: str | None = None,
    replicas: int = 1,
    gpus_per_replica: float = 0,
    max_seq_len: int = 512,
    max_batch_size: int = 16,
    max_gen_len: int | None = None,
    temperature: float = 0.6,
) -> None:
    """Complete every prompt of a JSON-lines file.

    Args:
        prompts_file: a JSON object with "prompt" a line.
        output: folder of the results, written as JSON lines.
        ckpt_dir: folder with consolidated.00.pth and params.json.
        tokenizer_path: the tokenizer.model; in the folder if left out.
        replicas: how many actors hold a model each.
        gpus_per_replica: what Ray reserves for each of them.
        max_seq_len: the most tokens of one sequence.
        max_batch_size: sequences at once in each replica.
        max_gen_len: the most tokens of a completion.
        temperature: 0 always takes the most probable token.
    """
    tokenizer = tokenizer_path or str(Path(ckpt_dir) / "tokenizer.model")
    results = ray.data.read_json(prompts_file, lines=True).map_batches(
        Completer,
        fn_constructor_args=(ckpt_dir, tokenizer, max_seq_len, max_batch_size),
        fn_kwargs={"max_gen_len": max_gen_len, "temperature": temperature},
        batch_size=8 * max_batch_size,
        compute=ray.data.ActorPoolStrategy(size=replicas),
        num_gpus=gpus_per_replica,
    )  # fmt: skip
    results.write_json(output)


if __name__ == "__main__":
    fire.Fire(main)
