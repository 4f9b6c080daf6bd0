"""Drawing tokens from logits on a CPU: our kernel beside PyTorch's sort of every row.

python sampling.py [--vocab 32000]
"""

import fire
import torch
from report import header, median_seconds, table

from llama.engine.sampling import sample, sample_all

FILTERS = {  # temperature, top_p, min_p, top_k
    "temperature 0.6, top_p 0.9": (0.6, 0.9, 0.0, 0),
    "temperature 1": (1.0, 1.0, 0.0, 0),
    "temperature 0.8, top_k 40, top_p 0.95": (0.8, 0.95, 0.0, 40),
    "temperature 1.5, min_p 0.05": (1.5, 1.0, 0.05, 0),
}


@torch.inference_mode()
def main(vocab: int = 32000) -> None:
    """Print microseconds for 1, 8 and 32 rows, each with logits of another spread."""
    rows = []
    for n in (1, 8, 32):
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(n, vocab, generator=generator) * torch.linspace(4, 2, n)[:, None]
        for name, (temperature, top_p, min_p, k) in FILTERS.items():
            noise = torch.rand(n, generator=generator).tolist()
            numbers = torch.tensor([[temperature] * n, [top_p] * n, [min_p] * n, noise])
            top_k = torch.full((n,), k)
            assert sample(logits, numbers, top_k).equal(sample_all(logits, numbers, top_k))
            own, sorted_ = (
                median_seconds(lambda _, f=f, a=(logits, numbers, top_k): f(*a), 50, 5) * 1e6
                for f in (sample, sample_all)
            )
            rows.append([str(n), name, f"{own:.0f}", f"{sorted_:.0f}", f"{sorted_ / own:.1f}"])
    print(header())
    print(f"{vocab} tokens, {torch.get_num_threads()} threads, medians of 50\n")
    print(table(["rows", "sampling", "kernel (µs)", "sorted (µs)", "ratio"], rows))


if __name__ == "__main__":
    fire.Fire(main)
