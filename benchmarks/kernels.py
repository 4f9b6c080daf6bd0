"""Products of one matrix with few rows: our int8 and int4 kernels beside PyTorch's bfloat16, in bytes a second.

python kernels.py [--outputs 11008 --inputs 4096]
"""

import statistics
import time
from collections.abc import Callable

import fire
import torch
from report import header, table

from llama.kernels import quantized
from llama.linear import product
from llama.quantization import quantize_int4, quantize_int8


def seconds(run: Callable[[int], object], copies: int, repeats: int) -> float:
    """The median time of a call; each call takes the next of `copies` matrices, so that no cache holds one."""
    for copy in range(copies):
        run(copy)
    times = []
    for repeat in range(repeats):
        begun = time.perf_counter()
        run(repeat % copies)
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


@torch.inference_mode()
def main(outputs: int = 11008, inputs: int = 4096, repeats: int = 15) -> None:
    """Print GB/s of weights read, and how many times faster than bfloat16."""
    copies = max(2, (1 << 29) // (2 * outputs * inputs))
    weights = [torch.randn(outputs, inputs).bfloat16() for _ in range(copies)]
    int8, int4 = [quantize_int8(w) for w in weights], [quantize_int4(w) for w in weights]
    rows = []
    for n in (1, 2, 4, 8, 16, 32, 64, 512):
        x = torch.randn(n, inputs).bfloat16()
        runs = [
            (weights[0].nbytes, lambda i, x=x: product(x, weights[i])),
            (sum(part.nbytes for part in int8[0]), lambda i, x=x: quantized.product_int8(x, *int8[i])),
            (sum(part.nbytes for part in int4[0]), lambda i, x=x: quantized.product_int4(x, *int4[i])),
        ]
        times = [seconds(run, copies, repeats) for _, run in runs]
        rates = [f"{size / t / 1e9:.1f}" for (size, _), t in zip(runs, times, strict=True)]
        rows.append([str(n), f"{times[0] * 1e3:.2f}", *rates, *(f"{times[0] / t:.2f}" for t in times[1:])])
    print(header())
    print(f"({outputs}, {inputs}), {torch.get_num_threads()} threads, median of {repeats}\n")
    head = ["rows", "bf16 ms", "bf16 GB/s", "int8 GB/s", "int4 GB/s", "int8 speed-up", "int4 speed-up"]
    print(table(head, rows))


if __name__ == "__main__":
    fire.Fire(main)
