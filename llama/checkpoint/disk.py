"""Parts of a model whose matrices stay on the disk: each is read before it runs, the next one meanwhile."""

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor, nn

from llama import log
from llama.checkpoint.pages import fetch_pages, release_pages
from llama.checkpoint.parameters import Maker
from llama.wording import in_units


@dataclass(slots=True)
class Part:
    """A module whose matrices are in memory only between `read` and `drop`."""

    maker: Maker
    module: nn.Module
    nbytes: int  # that are read from the disk
    mapped: list[Tensor] = field(default_factory=list)  # matrices that are used where they lie in the files
    made: list[str] = field(default_factory=list)  # parameters that are made of what lies there, anew each time

    def read(self) -> None:
        for tensor in self.mapped:
            fetch_pages(tensor)
        for name in self.made:
            self.maker.make(name)

    def drop(self) -> None:
        for tensor in self.mapped:
            release_pages(tensor, for_good=True)
        for name in self.made:
            self.maker.drop(name)


class ReadAhead:
    """Reads parts in the order in which a step runs them, over and over, in a thread beside the one that computes.

    There are two of them in memory at most: the one that runs and the next. After the last comes the first, since
    another step will follow.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        self._parts = parts
        self._thread = ThreadPoolExecutor(1, "disk", torch.set_num_threads, (torch.get_num_threads(),))
        self._read: dict[int, Future[None]] = {}  # the parts that are in memory, or will be
        for number, part in enumerate(parts):
            part.module.register_forward_pre_hook(lambda _module, _given, number=number: self.bring(number))

    def bring(self, number: int) -> None:
        """Have a part in memory, and ask for the next; of others nothing stays, also where a step was not ended."""
        wanted = (number, (number + 1) % len(self._parts))
        for other in self._read.keys() - set(wanted):
            del self._read[other]
            self._thread.submit(self._parts[other].drop)
        for one in wanted:
            if one not in self._read:
                self._read[one] = self._thread.submit(self._parts[one].read)
        self._read[number].result()


def stay_on_disk(maker: Maker, names: Sequence[str]) -> None:
    """Have these matrices of a model come from the disk when they are used, and say how fast that can be."""
    parts = [_part(maker, runs, list(own)) for runs, own in groupby(names, _what_runs)]
    if parts and parts[0].module is maker.model.tok_embeddings and not parts[0].made:
        table = parts.pop(0)  # a few of its rows are looked up where they lie
        table.module.register_forward_hook(lambda _module, _given, _rows: table.drop())
    if not parts:
        return
    ahead, started = ReadAhead(parts), time.perf_counter()
    ahead.bring(0)
    rate = parts[0].nbytes / (time.perf_counter() - started)
    total = sum(part.nbytes for part in parts)
    log.say(
        f"each step reads {in_units(total)} of the model from the disk: {total / rate:.2g} s at the"
        f" {in_units(round(rate))}/s of the first read"
    )


def _what_runs(name: str) -> str:
    """The module before which a parameter is read: a whole layer, or the matrix alone."""
    return ".".join(name.split(".")[: 2 if name.startswith("layers.") else 1])


def _part(maker: Maker, runs: str, names: Sequence[str]) -> Part:
    part = Part(maker, maker.model.get_submodule(runs), sum(sum(maker.sizes(name)) for name in names))
    for name in names:
        if mapped := maker.in_place(name):
            part.mapped += mapped
        else:
            part.made.append(name)
            maker.drop(name)
    part.mapped.sort(key=Tensor.data_ptr)  # as they lie in the file
    return part
