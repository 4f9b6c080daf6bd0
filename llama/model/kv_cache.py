"""`KVCache`: the keys and values of every slot, for every layer."""

from collections.abc import Sequence

import torch
from torch import Tensor

from llama.device import ADA, compute_capability
from llama.errors import DeviceError

FLOAT8 = torch.float8_e4m3fn  # 4 bits of exponent, 3 of fraction, up to 448


def check_kv_dtype(kv_dtype: str | None, device: torch.device) -> None:
    """Raise DeviceError where the device cannot have a cache of this dtype (None: that of the weights)."""
    too_old = device.type == "cuda" and compute_capability(device) < ADA  # which converts float8
    if kv_dtype and (too_old or device.type == "mps"):
        raise DeviceError(
            f"kv_dtype='fp8' needs a CUDA GPU from Ada or Hopper on, or a CPU, not {device}: leave it out"
        )


class KVCache:
    """Per layer one tensor of keys and one of values, (K kv heads, S slots, P positions, D head_dim).

    A slot's keys of one head are contiguous, and (S, P) folds into one axis of token rows: the row of a slot's
    position is slot · P + position. The memory is allocated once and not cleared: readers take views up to the
    length that was written. `float8` stores them in half of 16 bits, each rounded to 4 significant bits. Layers may be
    on several devices: then `device` is a list of one for each.
    """

    def __init__(
        self, n_layers: int, n_kv_heads: int, slots: int, max_seq_len: int, head_dim: int, dtype: torch.dtype,
        device: torch.device | Sequence[torch.device], float8: bool = False,
    ) -> None:  # fmt: skip
        shape, stored = (n_kv_heads, slots, max_seq_len, head_dim), FLOAT8 if float8 else dtype
        devices = [device] * n_layers if isinstance(device, torch.device) else device
        assert len(devices) == n_layers
        self.keys = [torch.empty(shape, dtype=stored, device=own) for own in devices]
        self.values = [torch.empty(shape, dtype=stored, device=own) for own in devices]
        self.dtype = dtype  # of what is computed with it
        self.slots = slots
        self.max_seq_len = max_seq_len

    def rows(self, slots: Tensor, positions: Tensor) -> Tensor:
        """The token rows (N,) of N slots and positions: the same for every layer, so computed once a step."""
        return slots * self.max_seq_len + positions

    def copy_prefix(self, source: int, target: int, length: int, start: int = 0) -> None:
        """Make positions start … length − 1 of slot `target` equal to those of slot `source`."""
        for tensor in (*self.keys, *self.values):
            tensor[:, target, start:length] = tensor[:, source, start:length]

    def read_prefix(self, slot: int, length: int) -> list[Tensor]:
        """A slot's first `length` keys of each layer, then its values, each (K, length, D): a copy on the CPU."""
        parts = (tensor[:, slot, :length] for tensor in (*self.keys, *self.values))
        return [part.clone(memory_format=torch.contiguous_format).cpu() for part in parts]

    def write_prefix(self, slot: int, rows: Sequence[Tensor]) -> None:
        """Put what `read_prefix` gives at the beginning of a slot."""
        for tensor, own in zip((*self.keys, *self.values), rows, strict=True):
            tensor[:, slot, : own.shape[1]] = own


def slot_view(stored: Tensor, slot: int, length: int, dtype: torch.dtype) -> Tensor:
    """The first `length` of a slot's keys or values, (K, length, D), in `dtype`: no copy unless they are float8."""
    return stored[:, slot, :length].to(dtype)
