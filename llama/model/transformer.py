"""The Llama-2 architecture on one page; modules are named as Meta's checkpoints name them.

wq|wk|wv and w1|w3 are joined into one matrix each (`wqkv`, `w13`): they read the same input.
Letters in shapes: N tokens of a step, H heads, K kv heads, D head_dim, R rows with logits.
Source: "Llama 2: Open Foundation and Fine-Tuned Chat Models", https://arxiv.org/abs/2307.09288.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from llama.kernels.ops import add_norm, rope_and_store, silu_and_mul
from llama.model.args import ModelArgs
from llama.model.forward import LayerInputs, Prepared, forward
from llama.model.kv_cache import KVCache
from llama.model.linear import ColumnLinear, RowLinear, column_parallel, parallel_embedding, row_parallel
from llama.model.stages import cross, device_of
from llama.model.step import Step
from llama.parallel import model_parallel_size
from llama.placement import Placement


class RMSNorm(nn.Module):
    """x / √(mean x² + eps) · weight, in float32 up to the weight (https://arxiv.org/abs/1910.07467)."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim, device="meta"), requires_grad=False)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The norm of residual + x (N, dim), and that sum; of x alone where there is no residual."""
        return add_norm(x, residual, self.weight, self.eps)


class Attention(nn.Module):
    """Grouped-query attention's weights, for this rank's H / mp query heads and K / mp kv heads; see attention.py."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        mp = model_parallel_size()
        self.n_heads, self.n_kv_heads, self.head_dim = args.n_heads // mp, args.kv_heads // mp, args.head_dim
        self.wqkv = column_parallel(args.dim, (args.n_heads + 2 * args.kv_heads) * args.head_dim, bias=args.qkv_bias)
        self.wo = row_parallel(args.n_heads * args.head_dim, args.dim, bias=args.o_bias)

    def queries(self, x: Tensor, freqs_cis: Tensor, keys: Tensor, values: Tensor, rows: Tensor) -> Tensor:
        """The queries (N, H, D) of x (N, dim), after RoPE; its keys and values go to those rows of the cache."""
        heads = self.wqkv(x).unflatten(-1, (-1, self.head_dim))  # (N, H + 2K, D)
        return rope_and_store(heads, freqs_cis, keys, values, rows, self.n_heads)


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) · w3 x) (https://arxiv.org/abs/2002.05202)."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.w13 = column_parallel(args.dim, 2 * args.hidden_dim, bias=args.mlp_bias)
        self.w2 = row_parallel(args.hidden_dim, args.dim, bias=args.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.w2(silu_and_mul(self.w13(x)))
        return y


class TransformerBlock(nn.Module):
    """h = x + attention(norm(x)), then h + feed_forward(norm(h)).

    A block takes and returns such a sum as two parts, x and the residual: the next norm adds them in the kernel that
    norms, which saves a pass over memory. What comes before and after attention are methods for compiled.py's sake.
    """

    def __init__(self, args: ModelArgs, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.attention = Attention(args)
        self.feed_forward = FeedForward(args)
        self.attention_norm = RMSNorm(args.dim, args.norm_eps)
        self.ffn_norm = RMSNorm(args.dim, args.norm_eps)

    def forward(self, x: Tensor, residual: Tensor | None, inputs: LayerInputs) -> tuple[Tensor, Tensor]:
        """x and the residual (N, dim), which the first layer does not have → those for the next layer."""
        keys, values = inputs.cache.keys[self.layer], inputs.cache.values[self.layer]
        q, residual = self.before_attention(x, residual, inputs.freqs_cis, keys, values, inputs.rows)
        return self.after_attention(inputs.attend(q, keys, values), residual)

    def before_attention(
        self, x: Tensor, residual: Tensor | None, freqs_cis: Tensor, keys: Tensor, values: Tensor, rows: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The queries (N, H, D), and the new residual; keys and values go to the layer's cache."""
        x, residual = self.attention_norm(x, residual)
        return self.attention.queries(x, freqs_cis, keys, values, rows), residual

    def after_attention(self, heads: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Attention's result (N, H, D) and the residual → the layer's output, as x and residual."""
        x, residual = self.ffn_norm(self.attention.wo(heads.flatten(1)), residual)
        return self.feed_forward(x), residual


class Transformer(nn.Module):
    """The model of one rank. It is built without memory, on the meta device: `checkpoint.loader` gives it weights.

    `weight_format` is that of its matrices (None: as they are stored), `kv_dtype` that of its caches (None: as the
    weights). `batch_invariant`: a token's logits are the same to the bit whatever else is computed in its step.
    `placement`: which devices share it; None where it is all on one.
    """

    def __init__(
        self, args: ModelArgs, *, weight_format: str | None = None, kv_dtype: str | None = None,
        batch_invariant: bool = False, placement: Placement | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.params = args
        self.placement = placement
        self.weight_format = weight_format or args.quantize
        self.kv_dtype = kv_dtype
        self.tok_embeddings = parallel_embedding(args.vocab_size, args.dim)
        self.layers = nn.ModuleList(TransformerBlock(args, layer) for layer in range(args.n_layers))
        self.norm = RMSNorm(args.dim, args.norm_eps)
        self.output = column_parallel(args.dim, args.vocab_size, gather=True)
        self.prepared = Prepared()  # what `forward` keeps between steps
        self.batch_invariant = batch_invariant
        for module in self.modules():
            if isinstance(module, ColumnLinear | RowLinear):
                module.invariant = batch_invariant

    @property
    def device(self) -> torch.device:
        """Where a step's tokens are. Where several devices share a model, its logits may be on another."""
        return self.norm.weight.device if self.placement is None else device_of(self.placement.embeddings)

    @property
    def stages(self) -> Sequence[tuple[torch.device, range]]:
        """The runs of layers on one device, in order."""
        if self.placement is None:
            return [(self.device, range(len(self.layers)))]
        return [(device_of(name), layers) for name, layers in self.placement.stages]

    @property
    def dtype(self) -> torch.dtype:
        return self.norm.weight.dtype

    def new_cache(self, slots: int, max_seq_len: int) -> KVCache:
        """An empty cache for this rank's kv heads, each layer's on the device of the layer."""
        args = self.params
        kv_heads = args.kv_heads // model_parallel_size()
        devices = [device for device, layers in self.stages for _ in layers]
        return KVCache(
            args.n_layers, kv_heads, slots, max_seq_len, args.head_dim, self.dtype, devices, self.kv_dtype == "fp8"
        )

    def forward(self, step: Step, cache: KVCache) -> Tensor:
        """Write the step's keys and values into the cache; return the logits (R, vocab) in float32."""
        return forward(self, step, cache)

    def layer_by_layer(self, step: Step, inputs: Sequence[LayerInputs]) -> Tensor:
        """The logits of any step, with each layer's inputs: the whole architecture, one module after the other."""
        x: Tensor = self.tok_embeddings(step.tokens)
        residual: Tensor | None = None
        for layer, own in zip(self.layers, inputs, strict=True):
            if x.device != own.rows.device:
                x, residual = cross(own.rows.device, x, residual)
            x, residual = layer(x, residual, own)
        if not step.all_logits:
            assert residual is not None  # every model has layers
            rows = step.logit_rows.to(x.device)
            x, residual = x[rows], residual[rows]
        if x.device != self.norm.weight.device:
            x, residual = cross(self.norm.weight.device, x, residual)
        normed, _ = self.norm(x, residual)
        logits: Tensor = self.output(normed)
        return logits.float()
