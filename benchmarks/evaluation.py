"""lm-evaluation-harness: requests a second of our model and of its own `hf` model.

python benchmarks/evaluation.py [--shape 134M] [--questions 20] [--header 600] [--dir FOLDER]

A multiple-choice task: questions behind one header of examples, with four choices of several tokens each, as the
harness asks for log-probabilities. Both have the same weights in bf16, in one process each, one after the other. Ours
holds 16 sequences at once (`batch_size=auto`). On a CPU the search of `hf` for its batch size (`auto`) ends at the
largest that it tries, 64, after five passes over so many rows: it is given 64 at once, and the search is not counted.
The time is that of `loglikelihood`, with tokenizing, without loading.
"""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import fire
from models import make_checkpoint
from report import header as machine
from report import table

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
WORDS = ["small", "fox", "lake", "kite", "red", "blue", "garden", "morning", "happy", "found", "old", "tree", "river"]
SETTINGS = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "bos_token": "<s>", "eos_token": "</s>"}
MODELS = {"llama_runner": ("ckpt_dir", "auto"), "hf": ("pretrained", 64)}  # where the folder goes, batch_size
GOAL = 3.0  # × hf


def main(shape: str = "134M", questions: int = 20, header: int = 600, dir: str = "/tmp/llama-benchmarks") -> None:
    """Print requests a second of each, and how far their answers are apart."""
    from llama.checkpoint.convert import convert

    folder = make_checkpoint(Path(dir), shape)
    theirs = folder / "hf"
    if not theirs.exists():
        convert(folder, theirs, "hf")
    (theirs / "tokenizer_config.json").write_text(json.dumps(SETTINGS))
    found = {
        name: measured(name, theirs if name == "hf" else folder, questions, header) for name in ("hf", "llama_runner")
    }
    tokens = found["hf"]["tokens"]
    rows = [
        [name, f"{one['seconds']:.1f}", f"{len(one['answers']) / one['seconds']:.2f}",
         f"{found['hf']['seconds'] / one['seconds']:.1f}"]
        for name, one in found.items()
    ]  # fmt: skip
    ours, hf = (found[name]["answers"] for name in ("llama_runner", "hf"))
    apart = max(abs(one - other) for one, other in zip(ours, hf, strict=True))
    chosen = [[best(answers[n : n + 4]) for n in range(0, len(answers), 4)] for answers in (ours, hf)]
    same = sum(one == other for one, other in zip(*chosen, strict=True))
    print(f"{machine()}\n\n{shape} bf16, {len(ours)} requests, {tokens} tokens in all; goal: {GOAL} × hf\n")
    print(table(["model", "seconds", "requests/s", "× hf"], rows))
    print(f"\nour engine computed {found['llama_runner']['computed']} tokens")
    print(f"log-probabilities: at most {apart:.3f} apart; {same} of {questions} choices alike")


def best(answers: list[float]) -> int:
    return answers.index(max(answers))


def measured(name: str, folder: Path, questions: int, header: int) -> dict:
    """What `work` prints, in a process of its own."""
    words = [sys.executable, __file__, "work", name, str(folder), str(questions), str(header)]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def work(name: str, folder: str, questions: int, header: int) -> None:
    """Measure one model."""
    import lm_eval.models  # noqa: F401
    from lm_eval.api.instance import Instance
    from lm_eval.api.registry import get_model

    import llama.integrations.lm_eval  # noqa: F401

    place, size = MODELS[name]
    model = get_model(name)(**{place: folder}, max_length=2048, dtype="bfloat16", device="cpu", batch_size=size)
    requests = [Instance("loglikelihood", {}, pair, n) for n, pair in enumerate(pairs(model, questions, header))]
    before = model.llama.engine.computed_tokens if name == "llama_runner" else 0
    begun = time.perf_counter()
    answers = model.loglikelihood(requests)
    seconds = time.perf_counter() - begun
    computed = model.llama.engine.computed_tokens - before if name == "llama_runner" else 0
    tokens = sum(len(model.tok_encode("".join(request.args))) for request in requests)
    print(json.dumps({
        "seconds": seconds, "answers": [logprob for logprob, _ in answers], "tokens": tokens, "computed": computed,
    }))  # fmt: skip


def pairs(model: object, questions: int, header: int) -> list[tuple[str, str]]:
    """(Context, choice): four for each question, all behind a header of about so many tokens."""
    rng = random.Random(0)

    def sentence(words: int) -> str:
        return " ".join(rng.choices(WORDS, k=words))

    head = ""
    while len(model.tok_encode(head)) < header:
        head += f"Question: {sentence(8)}?\nAnswer: {sentence(3)}\n\n"
    contexts = [f"{head}Question: {sentence(10)}?\nAnswer:" for _ in range(questions)]
    return [(context, f" {sentence(3)}") for context in contexts for _ in range(4)]


if __name__ == "__main__":
    fire.Fire({"work": work, "main": main} if sys.argv[1:2] == ["work"] else main)
