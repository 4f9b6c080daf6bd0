"""The same model as files of each format: load time and peak memory, beside transformers and llama.cpp on those files.

python benchmarks/formats.py [--shape 1.1B] [--runs 3] [--dir FOLDER, where the files are kept and found again]

Every figure comes from a process of its own; in a round all take turns, with the files in the page cache. The time is
that of the call that loads, after the imports, with one token generated behind it, since what is mapped is read only
then. The peak is that of the process, from its start; transformers and llama.cpp load first where they are installed.
"""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import fire
import torch
from cpu import peak_megabytes
from models import make_checkpoint
from report import header, table

from llama.checkpoint.convert import convert
from llama.checkpoint.writer import quantize

MAX_SEQ_LEN, SLACK = 512, 500  # MB beside the weights and the cache: the interpreter, torch, one tensor
FILES = {
    "pth": "",
    "safetensors": "hf",
    "GGUF bf16": "bf16.gguf",
    "GGUF q4_0": "q4_0.gguf",
}  # in the checkpoint's folder
RUNNERS = {"llama": list(FILES), "transformers": ["safetensors"], "llama.cpp": ["GGUF bf16", "GGUF q4_0"]}
PACKAGES = {"transformers": "transformers", "llama.cpp": "llama_cpp"}


def make_files(folder: Path) -> None:
    """The checkpoint in every format; what is there already is kept."""
    if not (folder / "int4").exists():
        quantize(folder, folder / "int4", "int4")
    for source, name, kind in (("", "hf", "hf"), ("", "bf16.gguf", "gguf"), ("int4", "q4_0.gguf", "gguf")):
        if not (folder / name).exists():
            convert(folder / source, folder / name, kind)


def work(runner: str, path: str) -> None:
    """In a process of its own: load, generate one token, print the figures as JSON."""
    prompt, held = [1, 5, 6, 7], None
    if runner == "llama":
        from llama import Llama, SamplingParams

        begun = time.perf_counter()
        llama = Llama.build(path, None, MAX_SEQ_LEN, 1, device="cpu")
        llama.generate([prompt], params=SamplingParams(temperature=0, max_gen_len=1))
        tensors = [*llama.model.parameters(), *llama.model.buffers()]
        cache = [*llama.engine.cache.keys, *llama.engine.cache.values]
        held = sum(tensor.numel() * tensor.element_size() for tensor in tensors + cache) / 2**20
    elif runner == "transformers":
        from transformers import AutoModelForCausalLM

        begun = time.perf_counter()
        model = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
        model.generate(torch.tensor([prompt]), max_new_tokens=1, do_sample=False, pad_token_id=0)
    else:
        from peers import LlamaCpp

        begun = time.perf_counter()
        LlamaCpp(Path(path), torch.get_num_threads(), MAX_SEQ_LEN, 1).generate([prompt], 1)
    print(json.dumps({"load": time.perf_counter() - begun, "peak": peak_megabytes(), "held": held}))


def main(shape: str = "1.1B", runs: int = 3, dir: str = "/tmp/llama-benchmarks") -> None:
    folder = make_checkpoint(Path(dir), shape)
    make_files(folder)
    pairs = [(runner, kind) for runner, kinds in RUNNERS.items() if is_installed(runner) for kind in kinds]
    every: dict[tuple[str, str], list[dict[str, Any]]] = {pair: [] for pair in pairs}
    for round in range(runs + 1):  # the first brings the files into the page cache
        for runner, kind in pairs:
            words = [sys.executable, __file__, "work", runner, str(folder / FILES[kind])]
            done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
            if round:
                every[runner, kind].append(json.loads(done.stdout.splitlines()[-1]))
    medians = {pair: {name: statistics.median(one[name] for one in found) for name in ("load", "peak")}
               for pair, found in every.items()}  # fmt: skip
    print(header())
    print(f"\n{shape}, {torch.get_num_threads()} threads, median of {runs}\n")
    head = ["runner", "files", "load and a token (s)", "beside .pth (goal: 1.0)", "peak memory (MB)", "goal"]
    pth = medians["llama", "pth"]["load"]
    print(table(head, [
        [*pair, f"{m['load']:.2f}", f"{m['load'] / pth:.2f}" if pair[0] == "llama" else "", f"{m['peak']:.0f}",
         f"{every[pair][0]['held'] + SLACK:.0f}" if pair[0] == "llama" else ""]
        for pair, m in medians.items()
    ]))  # fmt: skip


def is_installed(runner: str) -> bool:
    try:
        __import__(PACKAGES.get(runner, "torch"))
    except ImportError:
        print(f"{runner} is not installed: left out", file=sys.stderr)
        return False
    return True


if __name__ == "__main__":
    if sys.argv[1:2] == ["work"]:
        work(*sys.argv[2:])
    else:
        fire.Fire(main)
