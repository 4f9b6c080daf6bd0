"""compile=True: the same answers through torch.compile, in a few graphs; one line where there is no compiler."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import DEMO, ROOT
from near_ties import FLOAT32, QUANTIZED, assert_follows, logits_of

from llama import Llama, SamplingParams

PROMPTS = [[1, 5, 9, 20, 17], [1, 7], [1, 33, 101, 44, 80, 80, 12, 9, 5]]
needs_compiler = pytest.mark.skipif(
    not shutil.which("g++") or " " in torch.__file__, reason="needs g++, and PyTorch in a path without spaces"
)


def build(**options: object) -> Llama:
    return Llama.build(str(DEMO), str(DEMO / "tokenizer.model"), 128, 3, device="cpu", dtype="float32", **options)


@needs_compiler
@pytest.mark.parametrize("quantize", [None, "int8"])
def test_compiled_layers_agree_in_a_few_graphs(quantize: str | None) -> None:
    """What it says is best to the plain model too; longer prompts, more sequences and lengths compile nothing anew."""
    from torch._dynamo.utils import counters

    params = SamplingParams(temperature=0, max_gen_len=20, logprobs=True)
    torch._dynamo.reset()
    compiled = build(quantize=quantize, compile=True)
    counters.clear()
    tokens, logprobs = compiled.generate(PROMPTS, params=params)
    plain = logits_of(build(quantize=quantize))
    assert_follows(tokens, logprobs, PROMPTS, plain, 20, QUANTIZED if quantize else FLOAT32)
    graphs = counters["stats"]["unique_graphs"]
    assert 2 <= graphs <= 4 and not counters["graph_break"]
    compiled.generate([[1] * n for n in (3, 9, 50, 1, 2)], params=params)
    assert counters["stats"]["unique_graphs"] == graphs


def test_a_missing_compiler_is_said_in_one_line() -> None:
    code = "from llama.cli.commands import main; main()"
    words = [sys.executable, "-c", code, "complete", "Once", "--compile", "--device", "cpu", "--max_gen_len", "1"]
    environment = {**os.environ, "CXX": "/nonexistent/g++", "PATH": "/nonexistent"}
    done = subprocess.run(words, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith(
        "llama: compile=True needs a compiler, and torch.compile has none that works (InvalidCxxCompiler: "
    )
    assert done.stderr.endswith("): install g++, or leave compile out\n") and "Traceback" not in done.stderr


def test_nothing_of_it_is_loaded_unasked() -> None:
    """torch.compile brings in hundreds of modules."""
    code = (
        "import sys; from llama.cli.commands import main\n"
        "sys.argv = ['llama', 'complete', 'Once', '--max_gen_len', '1', '--quiet', '--device', 'cpu']; main()\n"
        "unasked = ('torch._dynamo', 'torch._inductor', 'llama.model.compiled', 'llama.batch.run',"
        " 'llama.cli.chat.session', 'prompt_toolkit', 'llama.checkpoint.writer', 'llama.integrations', 'lm_eval',"
        " 'starlette', 'uvicorn', 'llguidance', 'llama.bench.run')\n"
        "print([module for module in unasked if module in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stderr == "[]\n"
