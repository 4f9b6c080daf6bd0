"""What the replicas of one run share, through torch.distributed's store: work, sums, and signs of life."""

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any

import fairscale.nn.model_parallel.initialize as fairscale_groups
import torch
import torch.distributed as dist

from llama import parallel
from llama.errors import PeerError

BEAT = 5.0  # seconds between two signs of life
SILENT = 60.0  # seconds without one after which a replica counts as dead


class Replicas:
    """World size = replicas × model-parallel size: replica `index` of `count`, of whose ranks one `leads`.

    Made by every rank at the same point of the program.
    """

    def __init__(self, device: torch.device) -> None:
        mp = parallel.model_parallel_size()
        self.index, self.count = parallel.rank() // mp, parallel.world_size() // mp
        self.leads = parallel.model_parallel_rank() == 0
        self._device = device
        self._store = dist.distributed_c10d._get_default_store()
        self._prefix = "llama"
        number = self.add("runs", 1) if parallel.rank() == 0 else 0
        self._prefix = f"llama/run{self.from_first(number)}"
        self._ended = threading.Event()
        if self.count > 1 and self.leads and self.index:
            self._beats = threading.Thread(target=self._beat, daemon=True)
            self._beats.start()
            parallel.before_leaving(self._end)

    def from_first(self, value: Any) -> Any:
        """The value that rank 0 has, on every rank."""
        return parallel.broadcast(value, self._device)

    def draw(self, name: str) -> int:
        """The next number, from 0, of a counter that all replicas share; each rank of a replica gets the same."""
        number = self.add(name, 1) - 1 if self.leads else 0
        if parallel.model_parallel_size() == 1:
            return number
        return int(parallel.broadcast(number, self._device, fairscale_groups.get_model_parallel_group()))

    @parallel.with_peers
    def add(self, name: str, amount: int) -> int:
        """Add to a sum of all replicas; return it."""
        return self._store.add(f"{self._prefix}/{name}", amount)

    def wait(self) -> Iterator[None]:
        """On rank 0: come back now and then until every other replica has ended; raises PeerError if one is silent.

        On the others: say that this replica has ended.
        """
        if parallel.rank():
            self._ended.set()
            if self.leads:
                self.add(f"ended/{self.index}", 1)
            return
        seen: dict[int, tuple[int, float]] = {}
        while waiting := [i for i in range(1, self.count) if not self.add(f"ended/{i}", 0)]:
            for index in waiting:
                beats, now = self.add(f"alive/{index}", 0), time.monotonic()
                if seen.get(index, (-1, now))[0] != beats:
                    seen[index] = (beats, now)
                elif now - seen[index][1] > SILENT:
                    raise PeerError(f"replica {index} of {self.count} gave no sign of life for {SILENT:.0f} s")
            yield
            time.sleep(0.2)

    def _beat(self) -> None:
        with contextlib.suppress(PeerError):  # which the replica itself will meet, and say
            while not self._ended.is_set():
                self.add(f"alive/{self.index}", 1)
                self._ended.wait(BEAT)

    def _end(self) -> None:
        """End the thread: one that is in the store when Python ends would abort it."""
        self._ended.set()
        self._beats.join(BEAT)
