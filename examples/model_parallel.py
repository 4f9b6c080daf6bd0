"""One model split over several processes, each of which holds a part of every matrix.

torchrun --nproc_per_node 2 examples/model_parallel.py

Every process runs the same lines; results are the same in all of them, and the first one prints. The number of
processes must divide the heads; it need not be the number of files.
"""

import fire

from llama import Llama, in_a_shell, show


def main(ckpt_dir: str | None = None, max_gen_len: int = 24) -> None:
    """Complete a text with all processes together."""
    llama = Llama.build(ckpt_dir, max_seq_len=256)  # cuda:0, cuda:1, … where there are GPUs, else the CPU
    weights = sum(parameter.numel() for parameter in llama.model.parameters())
    result = llama.text_completion(["Ben wanted a red kite."], temperature=0, max_gen_len=max_gen_len)[0]
    show(f"{weights} weights in this process\nBen wanted a red kite. {result['generation']}")


if __name__ == "__main__":
    with in_a_shell():
        fire.Fire(main)
