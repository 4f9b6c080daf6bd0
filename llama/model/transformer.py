"""The Llama-2 architecture on one page; modules are named as Meta's checkpoints name them.

wq|wk|wv and w1|w3 are joined into one matrix each (`wqkv`, `w13`): they read the same input.
Letters in shapes: N tokens of a step, H heads, K kv heads, D head_dim, R rows with logits.
Source: "Llama 2: Open Foundation and Fine-Tuned Chat Models", https://arxiv.org/abs/2307.09288.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llama.kernels.decode_step import DecodeStep, can_run
from llama.kernels.dispatch import gpu_step
from llama.kernels.ops import add_norm, gate, turn_and_store
from llama.model.args import ModelArgs
from llama.model.attention import AttentionPlan, attention, plan
from llama.model.kv_cache import KVCache
from llama.model.linear import column_parallel, parallel_embedding, row_parallel
from llama.model.step import Step
from llama.parallel import model_parallel_size, with_peers


class RMSNorm(nn.Module):
    """x / √(mean x² + eps) · weight, in float32 up to the weight (https://arxiv.org/abs/1910.07467)."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim, device="meta"), requires_grad=False)

    def forward(self, x: Tensor, more: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x + more (N, dim), or x where that is None; and that, normed."""
        return add_norm(x, more, self.weight, self.eps)


def rope_table(head_dim: int, positions: int, theta: float, device: torch.device) -> Tensor:
    """Unit complex numbers, as (positions, D/2, 2) float32, for interleaved RoPE (https://arxiv.org/abs/2104.09864).

    Pair i of a head, read as a complex number, is turned by position · theta^(−2i/D).
    """
    freqs = 1.0 / (theta ** (torch.arange(0, head_dim, 2).float() / head_dim))
    angles = torch.outer(torch.arange(positions).float(), freqs)
    return torch.view_as_real(torch.polar(torch.ones_like(angles), angles)).to(device)


class Attention(nn.Module):
    """Grouped-query attention; this rank holds H / mp query heads and K / mp kv heads."""

    def __init__(self, args: ModelArgs, layer: int) -> None:
        super().__init__()
        mp = model_parallel_size()
        self.layer = layer
        self.n_heads, self.n_kv_heads, self.head_dim = args.n_heads // mp, args.kv_heads // mp, args.head_dim
        self.wqkv = column_parallel(args.dim, (args.n_heads + 2 * args.kv_heads) * args.head_dim)
        self.wo = row_parallel(args.n_heads * args.head_dim, args.dim)

    def queries(self, x: Tensor, turns: Tensor, keys: Tensor, values: Tensor, rows: Tensor) -> Tensor:
        """The queries (N, H, D) of x (N, dim), turned; its keys and values go to those rows of the layer's cache."""
        heads = self.wqkv(x).unflatten(-1, (-1, self.head_dim))  # (N, H + 2K, D)
        return turn_and_store(heads, turns, keys, values, rows, self.n_heads)


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) · w3 x) (https://arxiv.org/abs/2002.05202)."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.w13 = column_parallel(args.dim, 2 * args.hidden_dim)
        self.w2 = row_parallel(args.hidden_dim, args.dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(gate(self.w13(x)))


class TransformerBlock(nn.Module):
    def __init__(self, args: ModelArgs, layer: int) -> None:
        super().__init__()
        self.attention = Attention(args, layer)
        self.feed_forward = FeedForward(args)
        self.attention_norm = RMSNorm(args.dim, args.norm_eps)
        self.ffn_norm = RMSNorm(args.dim, args.norm_eps)

    def forward(self, x: Tensor, more: Tensor | None, inputs: "LayerInputs") -> tuple[Tensor, Tensor]:
        """The layer's input x + more (N, dim) → its output, as such a sum too: the next norm adds the two."""
        cache, layer = inputs.cache, self.attention.layer
        x, q = self.before(x, more, inputs.turns, cache.keys[layer], cache.values[layer], inputs.rows)
        return self.after(x, attention(q, cache, layer, inputs.plan))

    def before(
        self, x: Tensor, more: Tensor | None, turns: Tensor, keys: Tensor, values: Tensor, rows: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What comes before attention: x + more (N, dim), and its queries (N, H, D); see `Attention.queries`."""
        x, normed = self.attention_norm(x, more)
        return x, self.attention.queries(normed, turns, keys, values, rows)

    def after(self, x: Tensor, attended: Tensor) -> tuple[Tensor, Tensor]:
        """What comes after it: x (N, dim) and the heads' sums (N, H, D) → the layer's output, as a sum."""
        x, normed = self.ffn_norm(x, self.attention.wo(attended.flatten(1)))
        return x, self.feed_forward(normed)


@dataclass(frozen=True, slots=True)
class LayerInputs:
    """What every layer of one step needs beside its input: made once a step."""

    cache: KVCache
    rows: Tensor  # (N,) token rows of the cache to write to
    turns: Tensor  # (N, 1, D/2, 2) float32
    plan: AttentionPlan


class Transformer(nn.Module):
    """The model of one rank. It is built without memory, on the meta device: `checkpoint.loader` gives it weights.

    `weight_format` is that of its matrices (None: as they are stored), `kv_dtype` that of its caches (None: as the
    weights).
    """

    def __init__(self, args: ModelArgs, *, weight_format: str | None = None, kv_dtype: str | None = None) -> None:
        super().__init__()
        self.params = args
        self.weight_format = weight_format or args.quantize
        self.kv_dtype = kv_dtype
        self.tok_embeddings = parallel_embedding(args.vocab_size, args.dim)
        self.layers = nn.ModuleList(TransformerBlock(args, layer) for layer in range(args.n_layers))
        self.norm = RMSNorm(args.dim, args.norm_eps)
        self.output = column_parallel(args.dim, args.vocab_size, gather=True)
        self.rope: Tensor | None = None  # made where the weights are, at the first step
        self._decode_step: DecodeStep | None = None
        self.compiled = False  # see compiled.py

    @property
    def device(self) -> torch.device:
        return self.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.norm.weight.dtype

    def new_cache(self, slots: int, max_seq_len: int) -> KVCache:
        """An empty cache for this rank's kv heads."""
        args = self.params
        kv_heads = args.kv_heads // model_parallel_size()
        return KVCache(
            args.n_layers, kv_heads, slots, max_seq_len, args.head_dim, self.dtype, self.device, self.kv_dtype == "fp8"
        )

    @torch.inference_mode()
    @with_peers
    def forward(self, step: Step, cache: KVCache) -> Tensor:
        """Write the step's keys and values into the cache; return the logits (R, vocab) in float32."""
        if self.rope is None or self.rope.shape[0] < cache.max_seq_len:
            self.rope = rope_table(self.params.head_dim, cache.max_seq_len, self.params.rope_theta, self.device)
        together = step.decodes and model_parallel_size() == 1 and not self.compiled
        if together and can_run(len(step.spans), self, cache):
            return self._decode(step, cache)
        if together and (gpu := gpu_step(len(step.tokens), self, cache)):
            return gpu.run(self, step, cache)
        turns = self.rope[step.positions][:, None]
        inputs = LayerInputs(cache, cache.rows(step.slots, step.positions), turns, plan(step, cache))
        x = self.tok_embeddings(step.tokens)
        more = torch.zeros_like(x) if self.compiled else None  # so that the first layer needs no graph of its own
        for layer in self.layers:
            x, more = layer(x, more, inputs)
        if not step.decodes:
            x, more = x[step.logit_rows], more[step.logit_rows]
        return self.output(self.norm(x, more)[1]).float()

    def _decode(self, step: Step, cache: KVCache) -> Tensor:
        """A small decode step on a CPU, all of it in one call."""
        if self._decode_step is None or not self._decode_step.of(self.rope, cache):
            self._decode_step = DecodeStep(self, cache)
        longest = max(span.length for span in step.spans)
        return self._decode_step.run(step.tokens, step.slots, step.positions, longest)
