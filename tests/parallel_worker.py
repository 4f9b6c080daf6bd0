"""One process of a run that test_parallel.py starts: `parallel_worker.py JOB`.

JOB is a JSON file: "builds" (name → options of `Llama.build`, and "loop": whether decode steps run ahead of the
host, as on CUDA), "prompts" (tokens) and "out", a folder into which every process writes what it got as RANK.json.
"""

import json
import os
import sys
from pathlib import Path

import pytest
from emulation import emulate_flash_kernel

from llama import Llama, parallel
from llama.engine.decode_loop import DecodeLoop, as_it_is


def results(options: dict, prompts: list[list[int]]) -> dict:
    """Greedy completions with their log-probabilities, and sampled ones."""
    if options.pop("loop", False):
        with pytest.MonkeyPatch.context() as patch:
            emulate_flash_kernel(patch)
            return completions(Llama.build(**options), prompts, loop=True)
    return completions(Llama.build(**options), prompts)


def completions(llama: Llama, prompts: list[list[int]], loop: bool = False) -> dict:
    if loop:
        llama.engine.loop = DecodeLoop(llama.model, llama.engine.cache, capture=as_it_is)
    greedy, logprobs = llama.generate(prompts, 12, 0, logprobs=True, echo=True)
    sampled, _ = llama.generate(prompts, 12, 1.0, 0.95)
    done = {"seed": llama.seed, "greedy": greedy, "logprobs": logprobs, "sampled": sampled}
    return {**done, "ahead": llama.engine.loop._launches} if loop else done


def main(job: dict) -> None:
    done = {name: results(options, job["prompts"]) for name, options in job["builds"].items()}
    done["model_parallel"] = [parallel.model_parallel_rank(), parallel.model_parallel_size(), parallel.world_size()]
    (Path(job["out"]) / f"{os.environ.get('RANK', '0')}.json").write_text(json.dumps(done))
    parallel.leave()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
