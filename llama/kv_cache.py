"""`KVCache`: the keys and values of every slot, for every layer."""

import torch
from torch import Tensor


class KVCache:
    """Per layer one tensor of keys and one of values, (K kv heads, S slots, P positions, D head_dim).

    A slot's keys of one head are contiguous, and (S, P) folds into one axis of token rows: the row of a slot's
    position is slot · P + position. The memory is allocated once and not cleared: readers take views up to the
    length that was written.
    """

    def __init__(
        self, n_layers: int, n_kv_heads: int, slots: int, max_seq_len: int, head_dim: int, dtype: torch.dtype,
        device: torch.device,
    ) -> None:  # fmt: skip
        shape = (n_kv_heads, slots, max_seq_len, head_dim)
        self.keys = [torch.empty(shape, dtype=dtype, device=device) for _ in range(n_layers)]
        self.values = [torch.empty(shape, dtype=dtype, device=device) for _ in range(n_layers)]
        self.slots = slots
        self.max_seq_len = max_seq_len

    def rows(self, slots: Tensor, positions: Tensor) -> Tensor:
        """The token rows (N,) of N slots and positions: the same for every layer, so computed once a step."""
        return slots * self.max_seq_len + positions

    def view(self, layer: int, slot: int, length: int) -> tuple[Tensor, Tensor]:
        """The slot's first `length` keys and values, each (K, length, D), without a copy."""
        return self.keys[layer][:, slot, :length], self.values[layer][:, slot, :length]

    def copy_prefix(self, source: int, target: int, length: int, start: int = 0) -> None:
        """Make positions start … length − 1 of slot `target` equal to those of slot `source`."""
        for tensor in (*self.keys, *self.values):
            tensor[:, target, start:length] = tensor[:, source, start:length]
