"""The stages of a model that several devices share: where each computes, and how a step goes from one to the next."""

import torch
from torch import Tensor

from llama.device_map import DISK

CPU = torch.device("cpu")


def device_of(name: str) -> torch.device:
    """The device that computes a part of a `Placement`: the CPU, whatever its number, for what stays on the disk."""
    device = CPU if name == DISK else torch.device(name)
    return CPU if device.type == "cpu" else device


def cross(device: torch.device, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Take a block's input, x and the residual (N, dim), to the device of the next stage, which computes from here."""
    if device.type == "cuda":
        torch.cuda.set_device(device)  # kernels run where PyTorch is told to be; the engine tells it so again each step
    return x.to(device), None if residual is None else residual.to(device)
