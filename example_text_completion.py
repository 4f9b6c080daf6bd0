"""Complete texts: the beginnings below, or those of a file with one prompt a line.

python example_text_completion.py
torchrun --nproc_per_node 2 example_text_completion.py --ckpt_dir llama-2-13b/ --tokenizer_path tokenizer.model
"""

import fire

from llama import Llama, in_a_shell, show
from llama.batch.lines import read_prompts

PROMPTS = [
    "Once upon a time there was a small fox named Tom.",
    "One morning Mia went to the lake.",
    "Ben wanted a red kite.",
    "The old bear lived in a",
]


def main(
    ckpt_dir: str | None = None,
    tokenizer_path: str | None = None,
    temperature: float = 0.6,
    top_p: float = 0.9,
    max_seq_len: int = 256,
    max_gen_len: int | None = None,
    max_batch_size: int = 4,
    prompts_file: str | None = None,
) -> None:
    """Complete each prompt.

    Args:
        ckpt_dir: folder with consolidated.00.pth and params.json; the bundled demo checkpoint if left out.
        tokenizer_path: the tokenizer.model that belongs to it.
        temperature: 0 always takes the most probable token; higher is more varied.
        top_p: sample from the most probable tokens that together have this probability.
        max_seq_len: the most tokens of one sequence, prompt and completion.
        max_gen_len: the most tokens of a completion; up to max_seq_len if left out.
        max_batch_size: how many prompts run at once; any number may be given.
        prompts_file: a text file with one prompt a line, instead of the built-in prompts.
    """
    prompts = PROMPTS if prompts_file is None else read_prompts(prompts_file)
    llama = Llama.build(ckpt_dir, tokenizer_path, max_seq_len, max_batch_size)
    results = llama.text_completion(prompts, temperature=temperature, top_p=top_p, max_gen_len=max_gen_len)
    for prompt, result in zip(prompts, results, strict=True):
        show(f"{prompt}\n> {result['generation']}\n\n==================================\n")


if __name__ == "__main__":
    with in_a_shell():  # what goes wrong is one line, and exit code 2
        fire.Fire(main)
