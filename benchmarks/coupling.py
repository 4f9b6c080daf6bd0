"""How often a draft and the model draw the same token, by one number or by one number for each token.

One number: inverse CDF, in the order of token ids, as the engine draws. One for each token: Gumbel noise; the largest
sum of log-probability and noise wins.

python benchmarks/coupling.py [--noise 0.05] [--draws 200]

The model is the bundled demo; the draft is the same with noise on its weights. Both read a text that the demo wrote.
"""

import fire
import torch
from report import header, table

from llama import Llama
from llama.model.step import Step
from llama.model.transformer import Transformer

TEMPERATURES = (0.6, 1.0)
LENGTH = 256


def main(noise: float = 0.05, draws: int = 200) -> None:
    """Print the share of equal draws, and the most that any coupling can reach: what the two distributions share."""
    llama, other = (Llama.build(device="cpu", dtype="float32", max_seq_len=LENGTH) for _ in range(2))
    generator = torch.Generator().manual_seed(0)
    for weight in other.model.parameters():
        if weight.dim() == 2:
            weight.add_(noise * weight.std() * torch.randn(weight.shape, generator=generator))
    tokens = llama.tokenizer.encode("Once upon a time", bos=True, eos=False)
    (row,), _ = llama.generate([tokens], temperature=1.0, top_p=1.0, max_gen_len=LENGTH - len(tokens) - 1)
    text = [*tokens, *row]
    logits = [logits_of(one.model, text) for one in (llama, other)]
    rows = []
    for temperature in TEMPERATURES:
        p, q = ((one / temperature).softmax(-1).double() for one in logits)
        u = torch.rand(draws, len(text), 1, generator=generator, dtype=torch.float64)
        inverse = [(one.cumsum(-1) < u).sum(-1) for one in (p, q)]
        same = (inverse[0] == inverse[1]).double().mean().item()
        wins = [0, 0]
        for _ in range(draws):
            gumbel = -torch.rand(p.shape, generator=generator, dtype=torch.float64).log().neg().log()
            a, b = ((one.log() + gumbel).argmax(-1) for one in (p, q))
            wins[0] += int((a == b).sum())
            wins[1] += len(text)
        most = torch.minimum(p, q).sum(-1).mean().item()
        rows.append([f"{temperature}", f"{same:.3f}", f"{wins[0] / wins[1]:.3f}", f"{most:.3f}"])
    print(f"{header()}\n\nnoise {noise}, {len(text)} places, {draws} draws of each\n")
    print(table(["temperature", "one number (inverse CDF)", "one for each token (Gumbel)", "the most"], rows))


@torch.inference_mode()
def logits_of(model: Transformer, text: list[int]) -> torch.Tensor:
    step = Step.pack([(0, 0, text)], list(range(len(text))), model.device)
    return model(step, model.new_cache(1, LENGTH))


if __name__ == "__main__":
    fire.Fire(main)
