"""Many prompts at once from Python: each result when it is finished, and errors in the places of those that fail.

python examples/batch.py
"""

import fire

from llama import Llama, LlamaError, SamplingParams, in_a_shell, show

PROMPTS = ["Once upon a time", "Ben wanted a red kite.", "Tom " * 400, "Mia went to the lake."]


def main(max_gen_len: int = 16, max_batch_size: int = 2) -> None:
    """Complete all prompts; more than max_batch_size of them take turns in the same batch."""
    llama = Llama.build(max_seq_len=256, max_batch_size=max_batch_size)
    params = [SamplingParams(temperature=0.6, max_gen_len=max_gen_len, seed=number) for number in range(len(PROMPTS))]
    for index, result in llama.run_each(PROMPTS, params):
        if isinstance(result, LlamaError):
            show(f"{index} failed: {result}")
        else:
            show(f"{index}: {result['generation']!r}")


if __name__ == "__main__":
    with in_a_shell():
        fire.Fire(main)
