"""RoPE's table, which is made above the model."""

import pytest
import torch
from caches import CPU
from reference import rope

from llama.kernels.ops import apply_rope
from llama.model.rope import precompute_freqs_cis


@pytest.mark.parametrize("theta", [10000.0, 1e6])
def test_rope_rotates_neighbouring_pairs(theta: float) -> None:
    """Places 2i and 2i + 1 of a head rotate together, as a complex number; not the two halves of the head."""
    x = torch.randn(40, 3, 16, generator=torch.Generator().manual_seed(0))
    freqs_cis = precompute_freqs_cis(16, 40, theta, CPU)
    torch.testing.assert_close(apply_rope(x, freqs_cis[:, None]), rope(x, theta), atol=1e-5, rtol=0)
