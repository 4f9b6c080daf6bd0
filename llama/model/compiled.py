"""torch.compile for a model: what is before and after attention in a layer; attention itself is not compiled.

On a CPU that has our kernels the default is faster (benchmarks/RESULTS.md): this is for a CPU that has none. All layers
share the same few graphs, whatever the number of tokens in a step.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from llama.errors import DeviceError
from llama.kernels.quantized import packed_product
from llama.model.transformer import Transformer, TransformerBlock


def compile_layers(model: Transformer) -> None:
    """Compile the model's layers, at their first steps. Raises DeviceError where torch has no compiler to use."""
    _check_compiler(model.device)
    _register()
    model.prepared.compiled = True
    for layer in model.layers:
        assert isinstance(layer, TransformerBlock)
        before = _given_a_residual(torch.compile(layer.before_attention, dynamic=True, fullgraph=True))
        after = torch.compile(layer.after_attention, dynamic=True, fullgraph=True)
        # On this layer alone, which mypy does not tell from a change of the class.
        layer.before_attention = before  # type: ignore[method-assign]
        layer.after_attention = after  # type: ignore[method-assign]


def _given_a_residual(before: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """`before_attention` with zeros for no residual, so that the first layer needs no graph of its own."""

    def with_zeros(x: Tensor, residual: Tensor | None, *rest: Tensor) -> tuple[Tensor, Tensor]:
        return before(x, torch.zeros_like(x) if residual is None else residual, *rest)

    return with_zeros


def _check_compiler(device: torch.device) -> None:
    """Compile something small: torch.compile needs a C++ compiler for a CPU, and a C compiler (for Triton) for CUDA."""
    try:
        torch.compile(torch.neg, fullgraph=True)(torch.zeros(8, device=device))
    except Exception as error:  # its kind differs between versions
        reason = getattr(error, "inner_exception", error)
        why = f"{type(reason).__name__}: {reason}".splitlines()[0]
        do = f"install {'g++' if device.type == 'cpu' else 'gcc'}"
        if " " in torch.__file__ and "C++ compile error" in why:  # the linker's command is split at spaces
            do = f"install PyTorch in a folder whose path has no space, which {Path(torch.__file__).parent} has"
        raise DeviceError(
            f"compile=True needs a compiler, and torch.compile has none that works ({why}): {do}, or leave compile out"
        ) from None


def _register() -> None:
    """Make our products known to torch.compile, which calls them as they are."""
    if hasattr(torch.ops.llama, "packed_product"):
        return
    schema = "(Tensor x, Tensor weight, Tensor? scales, SymInt outputs) -> Tensor"
    torch.library.define("llama::packed_product", schema)
    torch.library.impl("llama::packed_product", ("cpu", "cuda", "mps"))(packed_product)

    def shape_of(x: Tensor, weight: Tensor, scales: Tensor | None, outputs: int) -> Tensor:
        return x.new_empty(x.shape[0], outputs)

    torch.library.register_fake("llama::packed_product", shape_of)
