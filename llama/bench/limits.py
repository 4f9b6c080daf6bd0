"""What the machine can do, measured, and what a step needs of it at least."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from llama import parallel
from llama.checkpoint import memory
from llama.model.args import ModelArgs
from llama.model.transformer import Transformer

READ = 1 << 29  # bytes that are read on a CPU: more than its caches hold
COPIED = 1 << 30  # bytes that are copied on other devices
SQUARE, SQUARE_ON_GPU = 1024, 8192  # rows and columns of the matrices
TIMES = 5


@dataclass(frozen=True, slots=True)
class Rates:
    read: float  # bytes/s
    matmul: float  # FLOP/s

    def seconds(self, size: float, flops: float) -> float:
        """The least time for so many bytes and floating-point operations: that of the slower of the two."""
        return max(size / self.read, flops / self.matmul)


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def best_seconds(device: torch.device, work: Callable[[], object]) -> float:
    """The least time of several calls, the first of which does not count; on every process that of the first."""
    times = []
    for _ in range(1 + TIMES):
        begun = time.perf_counter()
        work()
        wait(device)
        times.append(time.perf_counter() - begun)
    return float(parallel.broadcast(min(times[1:]), device))


def read_rate(device: torch.device) -> float:
    """Bytes/s that all threads together read from memory; elsewhere than on a CPU, what a copy reads and writes."""
    if device.type == "cpu":
        numbers = torch.ones(READ // 8, dtype=torch.int64)
        return numbers.nbytes / best_seconds(device, numbers.sum)
    source, target = (torch.zeros(COPIED, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * source.nbytes / best_seconds(device, lambda: target.copy_(source))


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of PyTorch's products of matrices in `dtype`, or in float32 where that is faster."""
    n, rates = SQUARE if device.type == "cpu" else SQUARE_ON_GPU, []
    for own in {dtype, torch.float32}:
        x, y = (torch.randn((n, n), dtype=torch.float32, device=device).to(own) for _ in range(2))
        work = _product(x, y)
        rates.append(2 * n**3 / best_seconds(device, work))
    return max(rates)


def _product(x: torch.Tensor, y: torch.Tensor) -> Callable[[], torch.Tensor]:
    return lambda: torch.nn.functional.linear(x, y)


# ------------------------------------------------------------------------------------------------- what a step needs


def need_of(model: Transformer, step_tokens: int) -> memory.Need:
    """Bytes of this process."""
    return memory.need(
        model.params, model.dtype, parallel.model_parallel_size(), step_tokens, weight_format=model.weight_format,
        kv_dtype=model.kv_dtype, held=model.output.weight.dtype if model.weight_format is None else None,
    )  # fmt: skip


def weights_read(model: Transformer) -> int:
    """Bytes of this process's weights that a step reads, scales included: all but the table of embeddings."""
    total = 0
    for name, module in model.named_modules():
        if name != "tok_embeddings":
            scales = getattr(module, "scales", None)
            own = module.parameters(recurse=False)
            total += sum(weight.nbytes for weight in own) + (scales.nbytes if scales is not None else 0)
    return total


def layer_weights(args: ModelArgs) -> int:
    """Of the matrices of all layers."""
    attention = 2 * args.dim * (args.n_heads + args.kv_heads) * args.head_dim
    return args.n_layers * (attention + 3 * args.dim * args.hidden_dim)


def decode_seconds(model: Transformer, rates: Rates, batch: int, context: int) -> float:
    """The least time of a step of `batch` sequences that have `context` tokens each.

    It reads the weights once and each sequence's keys and values, and multiplies each sequence's row with all matrices.
    """
    args, processes = model.params, parallel.model_parallel_size()
    size = weights_read(model) + batch * context * need_of(model, 1).cache_per_token
    attention = 2 * args.n_layers * args.n_heads * args.head_dim * context
    flops = 2 * batch * (layer_weights(args) + args.vocab_size * args.dim + attention) / processes
    return rates.seconds(size, flops)


def prefill_seconds(model: Transformer, rates: Rates, tokens: int) -> float:
    """The least time to the first token after so many: logits are those of the last, half of the scores are masked."""
    args, processes = model.params, parallel.model_parallel_size()
    scores = 2 * args.n_layers * args.n_heads * args.head_dim * tokens**2
    flops = (2 * layer_weights(args) * tokens + 2 * args.vocab_size * args.dim + scores) / processes
    return rates.seconds(weights_read(model), flops)
