"""`forward`: a step of a model, by the fastest way that there is for it on its device.

Small decode steps have a fused way, which is all of a step in one call on a CPU, and few kernels on CUDA. Any step can
go layer by layer, and those of a model that several devices share do. What these ways need beside the weights is made
at a model's first steps and kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from llama.kernels.decode_step import DecodeStep, can_fuse_on_cpu
from llama.kernels.dispatch import gpu_step
from llama.model.args import ModelArgs
from llama.model.attention import AttentionPlan, plan
from llama.model.kv_cache import KVCache
from llama.model.rope import precompute_freqs_cis
from llama.model.step import Step
from llama.parallel import model_parallel_size, with_peers
from llama.placement import Placement


@dataclass(slots=True)
class Prepared:
    """What `forward` keeps between a model's steps."""

    freqs_cis: Tensor | None = None  # see `precompute_freqs_cis`
    decode_step: DecodeStep | None = None
    compiled: bool = False  # torch.compile has the layers (see compiled.py): then no step is fused


@dataclass(frozen=True, slots=True)
class LayerInputs:
    """What every layer of one step needs beside its input: made once a step for each device."""

    cache: KVCache
    rows: Tensor  # (N,) token rows of the cache to write to
    freqs_cis: Tensor  # (N, 1, D/2, 2) float32, those of the tokens' positions
    attend: AttentionPlan


class Model(Protocol):
    """What `forward` needs of a `Transformer`."""

    params: ModelArgs
    prepared: Prepared
    batch_invariant: bool
    placement: Placement | None

    @property
    def device(self) -> torch.device: ...
    @property
    def stages(self) -> Sequence[tuple[torch.device, range]]: ...
    def layer_by_layer(self, step: Step, inputs: Sequence[LayerInputs]) -> Tensor: ...


@torch.inference_mode()
@with_peers
def forward(model: Model, step: Step, cache: KVCache) -> Tensor:
    """Write the step's keys and values into the cache; return the logits (R, vocab) in float32."""
    freqs_cis = _freqs_cis(model, cache)
    may_fuse = model_parallel_size() == 1 and not model.prepared.compiled and model.placement is None
    if step.all_logits and may_fuse:
        if can_fuse_on_cpu(len(step.tokens), model, cache):
            longest = max(span.length for span in step.spans)
            return _decode_step(model, freqs_cis, cache).run(step.tokens, step.slots, step.positions, longest)
        if step.decodes and (run := gpu_step(len(step.tokens), model, cache)):
            return run(model, freqs_cis, step, cache)
    own, inputs = freqs_cis[step.positions][:, None], list[LayerInputs]()
    for device, layers in model.stages:
        here = step.to(device)
        attend = plan(here, cache, model.batch_invariant, layers.start)
        inputs += [LayerInputs(cache, cache.rows(here.slots, here.positions), own.to(device), attend)] * len(layers)
    return model.layer_by_layer(step, inputs)


def _freqs_cis(model: Model, cache: KVCache) -> Tensor:
    """The model's table, made anew only where a cache is longer than it: captured graphs read it where it is."""
    table = model.prepared.freqs_cis
    if table is None or table.shape[0] < cache.max_seq_len:
        args = model.params
        table = precompute_freqs_cis(args.head_dim, cache.max_seq_len, args.rope_theta, model.device, args.rope_scaling)
        model.prepared.freqs_cis = table
    return table


def _decode_step(model: Model, freqs_cis: Tensor, cache: KVCache) -> DecodeStep:
    step = model.prepared.decode_step
    if step is None or not step.is_of(freqs_cis, cache):
        step = model.prepared.decode_step = DecodeStep(model, freqs_cis, cache)
    return step
