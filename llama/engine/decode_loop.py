"""Decode steps whose tokens stay on the device: each is the next one's input, so the host may read them one step late.

Some requests need the host to choose their tokens, from logits that it reads. Then the next step waits for the host.

A step reads and writes buffers that never move. So a step of a given number of rows, with the choice of its tokens, can
be captured as a CUDA graph, and one call repeats it.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from llama import log, parallel
from llama.engine.sampling import sample_all
from llama.model import flash_attention
from llama.model.attention import gpu_kernels_for
from llama.model.kv_cache import KVCache
from llama.model.step import Step
from llama.model.transformer import Transformer

WORTH_CAPTURE = 8  # steps of a kind after which it is captured: that takes about as long as some dozen steps
Work = Callable[[], None]
Tokens = Callable[[], list[int]]  # waits for a step: the token of each row, −1 where its logits are not finite


class Choice(Enum):
    """How a step's tokens are chosen."""

    GREEDY = "on the device: each row's largest logit"
    SAMPLED = "on the device: some rows by sampling"
    ON_HOST = "on the host, which reads the logits"


Kind = tuple[int, Choice]  # of a step: its rows, and how their tokens are chosen


@dataclass(frozen=True, slots=True)
class Row:
    """One sequence of a decode step: its last token, where that goes, and how the next one is chosen."""

    token: int
    slot: int
    position: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float


def can_loop(model: Transformer, cache: KVCache) -> bool:
    """Where there is something to hide (on one CUDA device), and no layer needs to know lengths on the host."""
    if model.placement or model.device.type != "cuda":
        return False
    return gpu_kernels_for(cache) is not None or flash_attention.flash_kernel_reads(cache.keys[0])


def graph_capture() -> Callable[[Work], Work]:
    """Return a function that captures a step as a CUDA graph: it records the kernels without running them.

    Calling the captured step replays the graph. All graphs of one loop share one memory pool. That is safe because no
    two of them run at once, and results are copied out of the pool. Each loop has a pool and a stream of its own:
    PyTorch refuses a pool whose graphs are all gone, and when it frees a graph it also frees the cuBLAS workspace of
    all graphs of that stream (https://github.com/pytorch/pytorch/issues/193402).
    """
    graphs: list[torch.cuda.CUDAGraph] = []
    own_stream = functools.cache(torch.cuda.Stream)

    def capture(work: Work) -> Work:
        graph, pool = torch.cuda.CUDAGraph(), graphs[0].pool() if graphs else None
        # The outer one takes the stream back where a capture fails: torch.cuda.graph then does not.
        with torch.cuda.stream(own_stream()), torch.cuda.graph(graph, pool=pool, stream=own_stream()):
            work()
        graphs.append(graph)
        return graph.replay

    return capture


def as_it_is(work: Work) -> Work:
    """Stands for a capture where there are no CUDA graphs: each step runs its kernels again."""
    return work


class DecodeLoop:
    """Decode steps of one model and cache, of up to `rows` sequences.

    `load` says where a batch stands; each `launch` then does a step of it. Before a third launch the first must have
    been read. Steps are padded to 1, 2, 4, 8, … rows by repeating the first: there is a graph for each such size.
    """

    def __init__(
        self, model: Transformer, cache: KVCache, capture: Callable[[Work], Work] | None = None
    ) -> None:  # fmt: skip
        self.model, self.cache = model, cache
        self.sizes = _sizes(cache.slots)
        rows, device = cache.slots, model.device
        self._ints = torch.zeros((5, rows), dtype=torch.int64, device=device)  # Row's; source: see `_step`
        self._floats = torch.zeros((4, rows), dtype=torch.float32, device=device)  # as `sample` takes them
        self._chosen = torch.zeros(rows, dtype=torch.int64, device=device)
        self._row_numbers = torch.arange(rows, device=device)
        self._capture = capture or graph_capture()
        self._logits: Tensor | None = None  # made where the host asks for them
        self._steps: dict[Kind, Work] = {}  # those captured
        self._uses: dict[Kind, int] = {}
        self._captured_ropes: list[Tensor | None] = []
        self._rows, self._choice, self._launches = 0, Choice.GREEDY, 0
        # What is on its way from or to the device must stay as it is, so two of each take turns.
        pinned = device.type == "cuda"
        self._noise = torch.zeros((2, rows), pin_memory=pinned)
        self._read = torch.zeros((2, rows), dtype=torch.int64, pin_memory=pinned)
        parallel.before_leaving(self.drop_graphs)

    def drop_graphs(self) -> None:
        """Do without from here on. NCCL waits for the end of graphs that hold its work before it ends itself."""
        self._steps.clear()
        self._capture = as_it_is

    def load(self, rows: Sequence[Row]) -> None:
        """Begin with these sequences, instead of those that were here."""
        self._rows = len(rows)
        self._choice = Choice.GREEDY if all(row.temperature == 0 for row in rows) else Choice.SAMPLED
        padding = self._size() - len(rows)
        padded, sources = [*rows, *[rows[0]] * padding], [*range(len(rows)), *[0] * padding]
        ints = [(r.token, r.slot, r.position, r.top_k, source) for r, source in zip(padded, sources, strict=True)]
        floats = [(r.temperature, r.top_p, r.min_p, 0.0) for r in padded]
        self._ints[:, : len(padded)] = torch.tensor(ints, dtype=torch.int64).T.to(self._ints.device)
        self._floats[:, : len(padded)] = torch.tensor(floats, dtype=torch.float32).T.to(self._floats.device)

    @torch.inference_mode()
    def launch(self, noise: Sequence[float]) -> Tokens:
        """Do a step; `noise` has a number in [0, 1) for each row."""
        turn, self._launches = self._launches % 2, self._launches + 1
        size = self._size()
        if self._choice is Choice.SAMPLED:
            host = self._noise[turn, :size]
            host.copy_(torch.tensor([*noise, *[noise[0]] * (size - self._rows)]))
            self._floats[3, :size].copy_(host, non_blocking=True)
        self._work((size, self._choice))()
        return self._tokens(self._read[turn, : self._rows])

    @torch.inference_mode()
    def logits(self, rows: Sequence[Row]) -> Tensor:
        """Do one step of sequences whose next tokens the host chooses: their logits (R, vocab), until the next step."""
        self.load(rows)
        if self._logits is None:
            self._logits = torch.empty((self.cache.slots, self.model.params.vocab_size), device=self.model.device)
        self._work((self._size(), Choice.ON_HOST))()
        return self._logits[: len(rows)]

    def _size(self) -> int:
        return next(size for size in self.sizes if size >= self._rows)

    def _work(self, kind: Kind) -> Work:
        """A step of this kind: as it is the first times, which fills what is made once; then captured."""
        if kind in self._steps:
            return self._steps[kind]
        uses = self._uses[kind] = self._uses.get(kind, 0) + 1

        def work() -> None:
            self._step(*kind)

        if uses <= WORTH_CAPTURE:
            return work
        self._captured_ropes.append(self.model.prepared.freqs_cis)  # what is captured reads it where it is
        try:
            self._steps[kind] = self._capture(work)
        except RuntimeError as error:
            log.say(f"no CUDA graphs ({str(error).splitlines()[0]}): decode steps are slower without")
            self._capture = as_it_is
            self._steps[kind] = work
        return self._steps[kind]

    def _step(self, size: int, choice: Choice) -> None:
        """Compute a step from the buffers into the buffers. The host reads no tensor here, as a CUDA graph cannot."""
        tokens, slots, positions, top_k, source = self._ints[:, :size]
        step = Step(tokens, slots, positions, self._row_numbers[:size], (), all_logits=True, decodes=True)
        logits = self.model(step, self.cache)
        if choice is Choice.ON_HOST:
            assert self._logits is not None  # `logits` made it
            self._logits[:size] = logits
            return
        drawn = choice is Choice.SAMPLED
        chosen = sample_all(logits, self._floats[:, :size], top_k) if drawn else logits.argmax(-1)
        self._chosen[:size] = torch.where(logits.sum(-1).isfinite(), chosen, -1)
        tokens.copy_(chosen[source])  # a row that pads stays what it repeats, however the two are rounded
        positions += 1

    def _tokens(self, host: Tensor) -> Tokens:
        """Begin to copy the tokens to the host."""
        host.copy_(self._chosen[: self._rows], non_blocking=True)
        if self._chosen.device.type != "cuda":
            return host.tolist
        arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch gives its class no types
        arrived.record()

        def tokens() -> list[int]:
            arrived.synchronize()
            return host.tolist()

        return tokens


def _sizes(rows: int) -> list[int]:
    """1, 2, 4, 8, … up to `rows`, which is the last."""
    return [*(1 << n for n in range(rows.bit_length()) if 1 << n < rows), rows]
