"""What two ways to the same tokens that round differently must agree in: not in tokens that are nearly equal.

Float32 paths differ by some 1e-5 in their logits: by the order of their sums, say, which depends on how many rows a
product has. Where the best two tokens are nearer to each other than that, another processor takes the other one, and
from there on the texts are different. Paths that run the same operations on the same shapes need none of this: they
are equal.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from llama import Llama
from llama.step import Step

FLOAT32 = 1e-3  # of logits: a hundred times what rounding was seen to move, a hundredth of what small mistakes do
QUANTIZED = 0.1  # where activations or keys are rounded to 8 bits: a rounding before may move one by a whole step
Rows = Sequence[Sequence[int]]  # of tokens
Logits = Callable[[list[int]], Tensor]  # tokens (T,) → logits (T, V)


def logits_of(llama: Llama) -> Logits:
    """What a model says of a sequence: in one step, and in a cache of its own."""

    def logits(tokens: list[int]) -> Tensor:
        step = Step.pack([(0, 0, tokens)], range(len(tokens)), llama.model.device)
        return llama.model(step, llama.model.new_cache(1, len(tokens))).cpu()

    return logits


def assert_follows(
    tokens: Rows, logprobs: Sequence[Sequence[float]], prompts: Rows, logits: Logits, length: int, tolerance: float
) -> None:
    """Greedy completions fed back whole: `logits` call each token nearly the best one, and as probable as was said.

    Stronger than to compare texts: no token is left out, however near to each other the best two are. One that has
    fewer than `length` tokens ended there; at least half of them must be there, or little would have been compared.
    """
    for own, said, prompt in zip(tokens, logprobs, prompts, strict=True):
        assert len(own) == len(said) <= length
        made = torch.tensor([*own, 2] if len(own) < length else own)
        rows = logits([*prompt, *own])[len(prompt) - 1 :][: len(made)].log_softmax(-1)
        chosen = rows.gather(1, made[:, None])[:, 0]
        assert (rows.amax(-1) - chosen).max() <= tolerance, "another token is more probable"
        torch.testing.assert_close(chosen[: len(own)], torch.tensor(said), atol=tolerance, rtol=0)
    assert 2 * sum(map(len, tokens)) >= length * len(prompts) > 0, f"{tokens} are too few to compare"
