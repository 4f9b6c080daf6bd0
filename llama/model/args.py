"""What a checkpoint says of its model."""

from dataclasses import dataclass

from llama.model.rope import RopeScaling


@dataclass(frozen=True, slots=True)
class ModelArgs:
    """A model's sizes, by the names that params.json gives them; what a run chose is in `RunOptions`.

    Those that Llama-2 itself has no use for (sizes that do not follow from others, scaled positions, biases) are of its
    relatives.

    `max_batch_size` and `max_seq_len` have their place here in Meta's runner, where programs give and read them:
    `Llama(model, tokenizer)` makes room for so many sequences, of so many tokens.
    """

    dim: int = 4096
    n_layers: int = 32
    n_heads: int = 32
    n_kv_heads: int | None = None  # None: as many as n_heads
    vocab_size: int = -1  # −1: the tokenizer's
    multiple_of: int = 256
    ffn_dim_multiplier: float | None = None
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    own_head_dim: int | None = None  # None: dim / n_heads
    own_hidden_dim: int | None = None  # None: by Meta's rule
    rope_scaling: RopeScaling | None = None
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    quantize: str | None = None  # the format in which the matrices are stored; None: as plain numbers
    max_batch_size: int = 32
    max_seq_len: int = 2048

    @property
    def head_dim(self) -> int:
        return self.own_head_dim or self.dim // self.n_heads

    @property
    def kv_heads(self) -> int:
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def has_bias(self) -> bool:
        return self.qkv_bias or self.o_bias or self.mlp_bias

    @property
    def hidden_dim(self) -> int:
        """Of the feed-forward: two thirds of 4 · dim, scaled, rounded up to a multiple of `multiple_of`."""
        if self.own_hidden_dim is not None:
            return self.own_hidden_dim
        hidden = int(2 * (4 * self.dim) / 3)
        if self.ffn_dim_multiplier is not None:
            hidden = int(self.ffn_dim_multiplier * hidden)
        return self.multiple_of * -(-hidden // self.multiple_of)
