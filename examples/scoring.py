"""How probable a model finds texts, and which of several endings it prefers.

python examples/scoring.py
"""

import fire

from llama import Llama, in_a_shell, show

BEGINNING = "The dog ran after the"
ENDINGS = (" ball.", " moon of the king and never was.", " xylophone.")


def main() -> None:
    """Print each text's perplexity, then the log-probability of each ending."""
    llama = Llama.build(max_seq_len=256)
    known = len(llama.tokenizer.encode(BEGINNING, bos=True, eos=False))
    for ending, score in zip(ENDINGS, llama.score([BEGINNING + ending for ending in ENDINGS]), strict=True):
        logprob = sum(score["logprobs"][known:])
        show(f"perplexity {score['perplexity']:8.2f}, log p of the ending {logprob:8.2f}: {BEGINNING}{ending}")


if __name__ == "__main__":
    with in_a_shell():
        fire.Fire(main)
