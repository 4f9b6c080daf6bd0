"""Resharding is arithmetic: the pieces of a plan, put together, are the slice that was asked for."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama.checkpoint.layout import split_axis
from llama.checkpoint.resharding import Piece, plan, possible_sizes
from llama.errors import CheckpointError
from llama.wording import either

SIZES = st.integers(1, 8)


@given(shards=SIZES, processes=SIZES, scale=st.integers(1, 3), data=st.data())
def test_pieces_make_the_slice(shards: int, processes: int, scale: int, data: st.DataObject) -> None:
    """For every M, N and rank, gathering the pieces gives elements rank · L/N … in order, each once."""
    length = shards * processes * scale
    rank = data.draw(st.integers(0, processes - 1))
    whole = list(range(length))
    held = [whole[i * length // shards : (i + 1) * length // shards] for i in range(shards)]
    out: list[int | None] = [None] * (length // processes)
    for piece in plan(length, shards, processes, rank):
        part = held[piece.shard][piece.start : piece.stop]
        assert part
        assert out[piece.offset : piece.offset + len(part)] == [None] * len(part)
        out[piece.offset : piece.offset + len(part)] = part
    assert out == whole[rank * length // processes : (rank + 1) * length // processes]


@pytest.mark.parametrize(
    ("shards", "processes", "read"), [(1, 1, 1), (1, 2, 1), (2, 1, 2), (8, 1, 8), (8, 2, 4), (2, 4, 1), (3, 2, 2)]
)
def test_a_process_opens_only_the_shards_it_needs(shards: int, processes: int, read: int) -> None:
    for rank in range(processes):
        assert len(plan(48, shards, processes, rank)) == read


def test_the_docstrings_example() -> None:
    assert plan(12, 3, 2, 1) == [Piece(1, 2, 4, 0), Piece(2, 0, 4, 2)]


@pytest.mark.parametrize(
    ("name", "axis"),
    [
        ("tok_embeddings.weight", 1), ("output.weight", 0), ("norm.weight", None), ("layers.3.attention.wq.weight", 0),
        ("layers.3.attention.wk.weight", 0), ("layers.3.attention.wv.weight", 0), ("layers.3.attention.wo.weight", 1),
        ("layers.3.feed_forward.w1.weight", 0), ("layers.3.feed_forward.w2.weight", 1),
        ("layers.3.feed_forward.w3.weight", 0), ("layers.3.attention_norm.weight", None),
        ("layers.3.ffn_norm.weight", None),
    ],
)  # fmt: skip
def test_split_axes_are_metas(name: str, axis: int | None) -> None:
    assert split_axis(name) == axis


@pytest.mark.parametrize("name", ["layers.0.attention.wz.weight", "output.bias", "weight", "layers.0.router.weight"])
def test_an_unknown_name_is_an_error(name: str) -> None:
    with pytest.raises(CheckpointError, match="is not a parameter of Llama-2"):
        split_axis(name)


def test_possible_sizes_divide_everything() -> None:
    assert possible_sizes(32, 8, 4096, 11008, 32000) == [1, 2, 4, 8]
    assert possible_sizes(40, 40, 5120, 13824, 32000) == [1, 2, 4, 8]
    assert possible_sizes(7, 7, 14) == [1, 7]


def test_numbers_to_choose_from_are_said_so() -> None:
    assert [either([1]), either([1, 2]), either([1, 2, 4])] == ["1", "1 or 2", "1, 2 or 4"]
