"""Files of every format on a GPU: the model that a CPU makes of them in float32."""

from pathlib import Path

import pytest
import torch
from checkpoints import SMALL, random_weights, save
from conftest import DEMO
from near_ties import logits_of

from llama import Llama
from llama.checkpoint.convert import convert
from llama.checkpoint.writer import quantize

pytestmark = pytest.mark.cuda
TOKENS = torch.randint(3, 1024, (100,), generator=torch.Generator().manual_seed(0)).tolist()


def made(kind: str, folder: Path) -> Path:
    """The demo as a Hugging Face folder or a GGUF file; "biased": a random model with biases and scaled positions."""
    if kind == "hf":
        convert(DEMO, folder / "hf", "hf")
        return folder / "hf"
    if kind == "gguf":
        convert(DEMO, folder / "a.gguf", "gguf")
        return folder / "a.gguf"
    if kind in ("int8", "int4"):
        quantize(DEMO, folder / kind, kind)
        convert(folder / kind, folder / "q.gguf", "gguf")
        return folder / "q.gguf"
    scaling = {"kind": "llama3", "factor": 8.0, "original_max_position_embeddings": 32}
    params = {**SMALL, "vocab_size": 1024, "qkv_bias": True, "o_bias": True, "mlp_bias": True, "rope_scaling": scaling}
    weights, g = random_weights(params), torch.Generator().manual_seed(1)
    for name in [name for name in weights if ".attention.w" in name or ".feed_forward.w" in name]:
        weights[name.replace("weight", "bias")] = 0.2 * torch.randn(weights[name].shape[0], generator=g)
    save(folder / "biased", params, weights)
    (folder / "biased" / "tokenizer.model").write_bytes((DEMO / "tokenizer.model").read_bytes())
    return folder / "biased"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["hf", "gguf", "int8", "int4", "biased"])
def test_logits_are_those_of_a_cpu(kind: str, dtype: str, tmp_path: Path) -> None:
    """Of a prompt in one step, and of a completion token by token, through the decode loop."""
    path = made(kind, tmp_path)
    expected = logits_of(Llama.build(str(path), None, 128, 2, device="cpu", dtype="float32"))(TOKENS)
    llama = Llama.build(str(path), None, 128, 2, device="cuda", dtype=dtype)
    found = logits_of(llama)(TOKENS)
    most = {"float32": 2e-2 if kind.startswith("int") else 2e-3, "bfloat16": 4e-2}[dtype]
    assert (found - expected).norm() / expected.norm() < most
    tokens, logprobs = llama.generate([TOKENS[:20]], 40, temperature=0, logprobs=True)
    rows = logits_of(Llama.build(str(path), None, 128, 2, device="cpu", dtype="float32"))([*TOKENS[:20], *tokens[0]])
    said = rows[19:-1].log_softmax(-1).gather(1, torch.tensor(tokens[0])[:, None])[:, 0]
    assert (said - torch.tensor(logprobs[0])).abs().max() < (0.6 if dtype == "bfloat16" else 0.1)
