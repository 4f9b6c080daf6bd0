"""What decides the next token: the sampling parameters, one by one.

python examples/sampling.py
"""

from dataclasses import replace

import fire

from llama import Llama, SamplingParams, in_a_shell, show

PROMPT = "Ben wanted a red kite."
WAYS = {
    "always the most probable": SamplingParams(temperature=0),
    "varied, and the same again with the same seed": SamplingParams(temperature=1, top_p=0.95, seed=7),
    "from the 5 most probable": SamplingParams(temperature=1, top_k=5, seed=7),
    "no word twice, if it can be helped": SamplingParams(temperature=0, presence_penalty=1.5),
    "up to the first full stop": SamplingParams(temperature=0, stop=["."]),
    "the best of 4 beams": SamplingParams(num_beams=4),
}


def main(max_gen_len: int = 16) -> None:
    """Complete one text in each way, all in one batch; then show what else a token could have been."""
    llama = Llama.build(max_seq_len=256)
    params = [replace(way, max_gen_len=max_gen_len) for way in WAYS.values()]
    for name, result in zip(WAYS, llama.text_completion([PROMPT] * len(WAYS), params=params), strict=True):
        show(f"{name}:\n  {PROMPT} {result['generation']}")
    first = llama.text_completion([PROMPT], temperature=0, max_gen_len=1, top_logprobs=3)[0]
    for other in first["top_logprobs"][0]:
        show(f"{other['logprob']:8.3f}  {other['piece']!r}")


if __name__ == "__main__":
    with in_a_shell():
        fire.Fire(main)
