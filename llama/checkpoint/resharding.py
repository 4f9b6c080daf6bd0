"""How a checkpoint saved for M processes is cut for N: pure arithmetic on names and lengths."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Piece:
    """Elements start … stop − 1 of shard `shard` go to offset … of the process that asked."""

    shard: int
    start: int
    stop: int
    offset: int


def plan(length: int, shards: int, processes: int, rank: int) -> list[Piece]:
    """The pieces of an axis of `length` that process `rank` of `processes` reads from `shards` equal shards.

    Example: length 12 in 3 shards of 4, for process 1 of 2 (elements 6 … 11):
    [Piece(shard=1, start=2, stop=4, offset=0), Piece(shard=2, start=0, stop=4, offset=2)].
    """
    assert length % shards == 0 and length % processes == 0 and 0 <= rank < processes
    stored, wanted = length // shards, length // processes
    first, last = rank * wanted, (rank + 1) * wanted
    pieces = []
    for shard in range(first // stored, (last - 1) // stored + 1):
        begin, end = max(first, shard * stored), min(last, (shard + 1) * stored)
        pieces.append(Piece(shard, begin - shard * stored, end - shard * stored, begin - first))
    return pieces


def possible_sizes(*lengths: int) -> list[int]:
    """The numbers of processes that divide every length: heads, kv heads, dim, hidden dim and vocabulary."""
    return [n for n in range(1, min(lengths) + 1) if all(length % n == 0 for length in lengths)]
