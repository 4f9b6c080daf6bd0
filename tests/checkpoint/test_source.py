"""A source of tensors: Meta's folder is one kind, and nothing that reads it depends on how its tensors lie in files."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from checkpoints import SMALL, SPLIT, held, random_weights, save
from torch import Tensor

from llama import Llama, ModelArgs, Transformer
from llama.checkpoint import loader, meta_folder
from llama.checkpoint.meta_folder import MetaFolder
from llama.checkpoint.source import Source, open_checked, read_slice
from llama.options import RunOptions
from llama.parallel import initialize

CPU = torch.device("cpu")
OPTIONS = {"max_seq_len": 16, "max_batch_size": 2, "max_step_tokens": 64}


@pytest.fixture
def halves() -> dict[str, Tensor]:
    return random_weights(SMALL, torch.bfloat16)


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_metas_folder_has_whole_tensors_and_their_slices(
    tmp_path: Path, halves: dict[str, Tensor], shards: int
) -> None:
    """In however many files they lie: names, whole shapes, dtypes, and the part of each of any number of processes."""
    source = MetaFolder(save(tmp_path, SMALL, {**halves, "rope.freqs": torch.ones(4)}, shards))
    assert set(source.names) == set(halves) and source.vocab_size == SMALL["vocab_size"]
    for name, tensor in halves.items():
        assert (source.shape(name), source.dtype(name)) == (tuple(tensor.shape), torch.bfloat16)
        axis = SPLIT.get(name.split(".")[-2])
        for processes in (1, 2, 4):
            for rank, part in enumerate([tensor] * processes if axis is None else tensor.chunk(processes, axis)):
                assert torch.equal(torch.cat([*source.slices(name, processes, rank)], axis or 0), part), name
                into = torch.full(part.shape, torch.nan)
                read_slice(into, source, name, processes, rank)
                assert torch.equal(into, part.float()), name


class InMemory:
    """The tensors of a table, which are in no file."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.folder, self.files, self.ignored = Path("memory"), [Path("memory")], ()
        self.args = ModelArgs(**SMALL)
        self.names, self.tensors = tensors.keys(), tensors
        self.vocab_size, self.shards, self.aliases = SMALL["vocab_size"], 1, {}

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].dtype

    def slices(self, name: str, processes: int, rank: int) -> Iterator[Tensor]:
        assert (processes, rank) == (1, 0)
        yield self.tensors[name]

    def release(self, piece: Tensor) -> None:
        pass

    def check(self, args: ModelArgs) -> None:
        pass

    def check_dtypes(self) -> None:
        pass


@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
def test_a_source_of_another_kind_gives_the_same_model(
    tmp_path: Path, halves: dict[str, Tensor], quantize: str | None
) -> None:
    initialize(CPU, None)
    options = RunOptions(**OPTIONS, quantize=quantize)

    def load(source: Source) -> Transformer:
        return loader.load(source, source.args, options, CPU, None)

    expected, found = load(MetaFolder(save(tmp_path, SMALL, halves, 2))), load(InMemory(halves))
    parameters = held(found)
    assert all(torch.equal(parameter, parameters[name]) for name, parameter in held(expected).items())
    for (name, module), (_, other) in zip(expected.named_modules(), found.named_modules(), strict=True):
        if getattr(module, "scales", None) is not None:
            assert torch.equal(module.scales, other.scales), name


def test_shards_are_searched_once_a_load(
    build: Callable[..., Llama], ckpt_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    searched: list[Path] = []
    find_shards = meta_folder.find_shards

    def watched(folder: Path) -> list[Path]:
        searched.append(folder)
        return find_shards(folder)

    monkeypatch.setattr(meta_folder, "find_shards", watched)
    build()
    open_checked(ckpt_dir)
    assert searched == [ckpt_dir, ckpt_dir]


def test_an_open_vocabulary_is_that_of_the_tensors(tmp_path: Path, halves: dict[str, Tensor]) -> None:
    source, args = open_checked(save(tmp_path, {**SMALL, "vocab_size": -1}, halves))
    assert (source.args.vocab_size, args.vocab_size) == (-1, SMALL["vocab_size"])
