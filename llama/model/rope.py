"""Rotary position embeddings: the angle by which each pair of a head's numbers turns from one position to the next.

RoFormer, https://arxiv.org/abs/2104.09864. `RopeScaling` stretches them over longer texts than a model was trained on.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

KINDS = ("linear", "dynamic", "yarn", "llama3", "factors")


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How angles differ from theta^(−2i/D), by the names that config.json uses.

    linear: all by `factor` (https://arxiv.org/abs/2306.15595). dynamic: theta grows with the longest text beyond
    `original_max_position_embeddings` (NTK-aware). yarn: by wavelength, and queries and keys by `attention_factor`
    (https://arxiv.org/abs/2309.00071). llama3: by wavelength, as Llama 3.1 does. factors: pair i by factors[i].
    """

    kind: str
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    factors: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        """Raises ValueError, which says what is wrong, for numbers with which no angle could be computed."""
        if self.kind not in KINDS:
            raise ValueError(f"{self.kind!r:.40} is none of {', '.join(KINDS)}")
        for name in ("factor", "attention_factor", "beta_fast", "beta_slow", "low_freq_factor", "high_freq_factor"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e9:
                raise ValueError(f"{name}={value!r:.40}: expected a positive number")
        length = self.original_max_position_embeddings
        needs_length = self.kind in ("dynamic", "yarn", "llama3")
        if isinstance(length, bool) or not isinstance(length, int) or not needs_length <= length < 2**31:
            raise ValueError(f"original_max_position_embeddings={length!r:.40}: expected a number of tokens")
        if self.kind == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise ValueError("high_freq_factor is not above low_freq_factor")


def rope_scaling(given: Mapping[str, Any]) -> RopeScaling:
    """The scaling that a JSON object describes. Raises ValueError where it does not describe one."""
    known = RopeScaling.__dataclass_fields__
    if strange := [key for key in given if key not in known]:
        raise ValueError(f"{strange[0]!r:.40} is not known")
    factors = given.get("factors", ())
    if not isinstance(factors, list | tuple) or not all(isinstance(f, int | float) and 0 < f < 1e9 for f in factors):
        raise ValueError("factors: expected a list of positive numbers")
    try:
        return RopeScaling(**{**given, "factors": tuple(factors)})
    except TypeError:
        raise ValueError("kind is missing") from None


def precompute_freqs_cis(
    head_dim: int, positions: int, theta: float, device: torch.device, scaling: RopeScaling | None = None
) -> Tensor:
    """Complex numbers, as (positions, D/2, 2) float32, for interleaved RoPE.

    Pair i of a head, read as a complex number, is multiplied by that of its position: turned by position · angle i,
    and, with yarn, made longer by `attention_factor`.
    """
    freqs, length = (
        frequencies(head_dim, positions, theta, scaling),
        1.0 if scaling is None else scaling.attention_factor,
    )
    angles = torch.outer(torch.arange(positions).float(), freqs)
    return torch.view_as_real(torch.polar(torch.full_like(angles, length), angles)).to(device)


def frequencies(head_dim: int, positions: int, theta: float, scaling: RopeScaling | None) -> Tensor:
    """The angles (D/2,) from one position to the next; `positions`: how long texts may become."""
    if scaling is None:
        return _plain(head_dim, theta)
    original, factor = scaling.original_max_position_embeddings, scaling.factor
    match scaling.kind:
        case "linear":
            return _plain(head_dim, theta) / factor
        case "dynamic":
            longer = factor * max(positions, original) / original - (factor - 1)
            return _plain(head_dim, theta * longer ** (head_dim / (head_dim - 2)))
        case "yarn":
            freqs = _plain(head_dim, theta)
            ramp = _yarn_ramp(head_dim, theta, scaling)
            return freqs / factor * ramp + freqs * (1 - ramp)
        case "llama3":
            return _llama3(_plain(head_dim, theta), scaling)
        case _:
            assert len(scaling.factors) == head_dim // 2  # checked where they were read
            return _plain(head_dim, theta) / torch.tensor(scaling.factors)


def _plain(head_dim: int, theta: float) -> Tensor:
    return 1.0 / (theta ** (torch.arange(0, head_dim, 2).float() / head_dim))


def _yarn_ramp(head_dim: int, theta: float, scaling: RopeScaling) -> Tensor:
    """How far each pair (D/2,) is interpolated: 0 where it turns often within the original length, 1 where seldom."""

    def pair(turns: float) -> float:
        """The pair, between two, that turns so often within the original length."""
        length = scaling.original_max_position_embeddings
        return head_dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair(scaling.beta_fast), pair(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low or 0.001
    return ((torch.arange(head_dim // 2).float() - low) / width).clamp(0, 1)


def _llama3(freqs: Tensor, scaling: RopeScaling) -> Tensor:
    """Long wavelengths are divided by the factor, short ones stay, and those between are mixed."""
    turns = scaling.original_max_position_embeddings * freqs / (2 * math.pi)  # within the original length
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    mixed = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - mixed) * freqs / scaling.factor + mixed * freqs
