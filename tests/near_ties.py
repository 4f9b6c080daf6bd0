"""Two ways to the same tokens that round differently agree up to the first near-tie, where either may be right.

Float32 paths differ by some 1e-5 in their logits: by the order of their sums, say, which depends on how many rows a
product has. Where the best two tokens are nearer to each other than that, or a draw falls as near to the border of two,
another processor takes the other one, and from there on the texts are different. So tokens are compared up to there
(`assert_agree`), or log-probabilities instead (`assert_follows`), or nobody comes near a tie (`refuse_near_ties`); a
difference that rounding does not explain is a failure. Paths that run the same operations on the same shapes need none
of this: they are equal.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from reference import kept
from torch import Tensor

from llama import Llama, SamplingParams
from llama.engine.next_token import Place
from llama.engine.sampling import Behind, adjust, forbid, noise_key, uniform
from llama.model.step import Step
from llama.request import Request

# Of logits and of probabilities: a hundred times what rounding was seen to move, a hundredth of what small mistakes do.
FLOAT32 = 1e-3
QUANTIZED = 0.1  # where activations or keys are rounded to 8 bits: a rounding before may move one by a whole step
CLEAR = 1e-4  # what float32 texts that are compared whole must keep between the best two
CLEAR_DRAW = 1e-5  # and their draws between the noise and the border of two tokens
GREEDY = SamplingParams(temperature=0)
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


def assert_agree(
    found: Rows, expected: Rows, prompts: Rows, logits: Logits,
    params: SamplingParams | Sequence[SamplingParams] = GREEDY, tolerance: float = FLOAT32, at_least: float = 0.5,
) -> list[int]:  # fmt: skip
    """Completions of prompts, made under one noise, agree up to near-ties of `logits`; return how far each does.

    At least so large a part of all tokens must agree: a comparison that ends at once would compare nothing.
    """
    every = [params] * len(prompts) if isinstance(params, SamplingParams) else params
    agreed = []
    for own, other, prompt, its in zip(map(list, found), map(list, expected), prompts, every, strict=True):
        n = next((i for i, (a, b) in enumerate(zip(own, other, strict=False)) if a != b), min(len(own), len(other)))
        agreed.append(n)
        if own != other:
            stops = frozenset({2, *its.stop_token_ids})
            row = logits([*prompt, *own[:n]])[-1].clone()
            adjust(row[None], [Behind(its, prompt, own[:n], stops)])
            nexts = [tokens[n : n + 1] or stops for tokens in (own, other)]  # one that ended had an end token there
            near = any(is_near_tie(row, a, b, its, tolerance) for a in nexts[0] for b in nexts[1])
            assert near, f"{own} and {other} differ from place {n} on, by more than rounding"
    compared, total = sum(agreed), sum(map(len, expected))
    assert compared >= at_least * total, f"of {total} tokens only {compared} were compared"
    return agreed


def is_near_tie(row: Tensor, a: int, b: int, params: SamplingParams, tolerance: float = FLOAT32) -> bool:
    """Whether rounding of logits (V,) decides between two tokens: both are the best, or one noise may draw either.

    It may where next to nothing lies between them in the order of ids, with the filters as rounding may move them.
    """
    if params.temperature == 0:
        return bool(row[[a, b]].min() >= row.max() - tolerance)
    first, last = sorted((a, b))
    ways = [_kept(row, params, top_p) for top_p in _near(params.top_p, tolerance)]
    between = [[share for token, share in way.items() if first < token < last] for way in ways if {a, b} <= way.keys()]
    return any(sum(shares) <= tolerance for shares in between)


def refuse_near_ties(llama: Llama) -> None:
    """From here on a choice that hangs on rounding is an error, on every processor alike.

    For float32 texts that are compared whole: their prompts must be such that no rounding decides. Draws are looked at
    where their seed is given: the noise of others may depend on what ran before.
    """
    choose = llama.engine._choose

    def choose_clearly(places: list[Place], logits: Tensor, best: list[int]) -> Iterable[int | None]:
        for place, row in zip(places, logits, strict=True):
            request = place.request
            changed = row.clone()[None]
            adjust(changed, [place.behind])
            if place.mask is not None:
                forbid(changed, [0], [place.mask])
            clear = _is_clear(changed[0], request)
            assert clear, f"a near-tie after {request.prompt + request.tokens}: ask something else"
        return choose(places, logits, best)

    llama.engine._choose = choose_clearly


def _is_clear(row: Tensor, request: Request) -> bool:
    """Whether a request's next token is the same however its logits (V,) are rounded."""
    params = request.params
    if row.amax() == -torch.inf:  # no token is allowed, however its logits are rounded
        return True
    if params.temperature == 0:
        first, second = row.topk(2).values.tolist()
        return first - second > CLEAR
    if params.seed is None:
        return True
    noise = uniform(noise_key(request.seed, request.prompt), len(request.prompt) + len(request.tokens))
    ways = [_kept(row, params, top_p) for top_p in _near(params.top_p, CLEAR_DRAW)]
    return len({_drawn(way, noise + off) for way in ways for off in (-CLEAR_DRAW, CLEAR_DRAW)}) == 1


def _drawn(shares: dict[int, float], noise: float) -> int:
    """The token in whose share the noise falls."""
    *tokens, last = shares
    for token in tokens:
        noise -= shares[token]
        if noise < 0:
            return token
    return last


def _kept(row: Tensor, params: SamplingParams, top_p: float) -> dict[int, float]:
    return kept(row, params.temperature, top_p, params.top_k, params.min_p)


def _near(top_p: float, tolerance: float) -> set[float]:
    return {max(top_p - tolerance, 0.0), top_p, min(top_p + tolerance, 1.0)}
