"""Products of one matrix with rows of bfloat16: our kernels beside PyTorch's product, in bytes of weights a second.

python kernels.py [--outputs 11008 --inputs 4096]
"""

from collections.abc import Callable

import fire
import torch
from report import header, median_seconds, table

from llama.kernels.quantized import can_pack, pack, packed_product, quantize
from llama.model.linear import product


def seconds(run: Callable[[int], object], copies: int, repeats: int) -> float:
    """The median time of a call; each call takes the next of `copies` matrices, so that no cache holds one."""
    return median_seconds(lambda number: run(number % copies), repeats, copies)


@torch.inference_mode()
def main(outputs: int = 11008, inputs: int = 4096, repeats: int = 15) -> None:
    """Print GB/s of weights read, and how many times faster than bfloat16."""
    copies = max(2, (1 << 29) // (2 * outputs * inputs))
    weights = [torch.randn(outputs, inputs).bfloat16() for _ in range(copies)]
    forms = {name: [pack(*quantize(w, name)) for w in weights] for name in ("int8", "int4")}
    if can_pack(weights[0], torch.bfloat16):
        forms = {"bf16": [pack(w, None) for w in weights], **forms}
    rows = []
    for n in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512):
        x = torch.randn(n, inputs).bfloat16()
        plain = seconds(lambda i, x=x: product(x, weights[i], None, outputs), copies, repeats)
        row = [str(n), f"{plain * 1e3:.2f}", f"{weights[0].nbytes / plain / 1e9:.1f}"]
        for packed in forms.values():
            size = sum(part.nbytes for part in packed[0] if part is not None)
            own = seconds(lambda i, x=x, p=packed: packed_product(x, *p[i], outputs), copies, repeats)
            row += [f"{size / own / 1e9:.1f}", f"{plain / own:.2f}"]
        rows.append(row)
    print(header())
    print(f"({outputs}, {inputs}), {torch.get_num_threads()} threads, median of {repeats}\n")
    head = ["rows", "PyTorch's bf16 ms", "GB/s", *(f"{name} {what}" for name in forms for what in ("GB/s", "speed-up"))]
    print(table(head, rows))


if __name__ == "__main__":
    fire.Fire(main)
