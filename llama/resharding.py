"""How a checkpoint saved for M processes is cut for N: pure arithmetic on names and lengths."""

from dataclasses import dataclass

from llama.errors import CheckpointError

# The axis along which Meta's model parallelism splits each weight; None: every process has it whole.
SPLIT_AXIS = {
    "tok_embeddings": 1, "output": 0, "norm": None, "attention_norm": None, "ffn_norm": None,
    "wq": 0, "wk": 0, "wv": 0, "wo": 1, "w1": 0, "w2": 1, "w3": 0,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Piece:
    """Elements start … stop − 1 of shard `shard` go to offset … of the process that asked."""

    shard: int
    start: int
    stop: int
    offset: int


def split_axis(name: str) -> int | None:
    """The axis of a parameter, or of a quantised one's scales, by its name ("layers.0.attention.wq.weight" → 0).

    Raises CheckpointError for a name that Llama-2 does not have: how it is split cannot be guessed.
    """
    parts = name.split(".")
    if len(parts) < 2 or parts[-1] not in ("weight", "scales") or parts[-2] not in SPLIT_AXIS:
        raise CheckpointError(f"{name!r} is not a parameter of Llama-2, so how it is split is not known")
    return SPLIT_AXIS[parts[-2]]


def plan(length: int, shards: int, processes: int, rank: int) -> list[Piece]:
    """The pieces of an axis of `length` that process `rank` of `processes` reads from `shards` equal shards.

    Example: length 12 in 3 shards of 4, for process 1 of 2 (elements 6 … 11):
    [Piece(shard=1, start=2, stop=4, offset=0), Piece(shard=2, start=0, stop=4, offset=2)].
    """
    assert length % shards == 0 and length % processes == 0 and 0 <= rank < processes
    held, wanted = length // shards, length // processes
    first, last = rank * wanted, (rank + 1) * wanted
    pieces = []
    for shard in range(first // held, (last - 1) // held + 1):
        begin, end = max(first, shard * held), min(last, (shard + 1) * held)
        pieces.append(Piece(shard, begin - shard * held, end - shard * held, begin - first))
    return pieces


def possible_sizes(*lengths: int) -> list[int]:
    """The numbers of processes that divide every length: heads, kv heads, dim, hidden dim and vocabulary."""
    return [n for n in range(1, min(lengths) + 1) if all(length % n == 0 for length in lengths)]


def either(numbers: list[int]) -> str:
    """[1] → "1", [1, 2, 4] → "1, 2 or 4"."""
    return " or ".join(filter(None, (", ".join(map(str, numbers[:-1])), str(numbers[-1]))))
