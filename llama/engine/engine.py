"""The loop: plan → `Step` → model → sample → tokens to their requests."""

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import islice

import torch
from torch import Tensor

from llama import parallel
from llama.engine.beam_search import beam_search
from llama.engine.checks import check_request
from llama.engine.decode_loop import DecodeLoop, Row, Tokens, can_loop
from llama.engine.drafts import Speculation
from llama.engine.next_token import Place, next_tokens
from llama.engine.sampling import no_token, noise_key, top_logprobs, uniform
from llama.engine.scheduler import Chunk, Scheduler, Sequence
from llama.errors import DeviceError, LlamaError, NumericalError, ParameterError
from llama.interrupts import let_through
from llama.kernels.sample import greedy
from llama.model.step import Step
from llama.model.transformer import Transformer
from llama.request import Counts, FinishReason, Request

Observer = Callable[[Request], None]  # called after each token of a request, and when it ends


@dataclass(frozen=True, slots=True)
class Ahead:
    """A decode step that was launched and not read yet, and whose it is."""

    loop: DecodeLoop
    sequences: list[Sequence]
    tokens: Tokens


class Engine:
    """Runs any number of requests through `slots` slots of one KV cache, each step packing what can run.

    A step has at most `max_step_tokens` tokens: long prompts are prefilled in chunks of what decoding leaves of it.
    Beam searches run one at a time, when nothing else does: each has all the slots. What comes after one waits for it.
    Threads share an engine by way of `Turns`: of itself it is one thread's.

    Where there is a `loop` (on CUDA), steps in which all that runs decodes are launched before the one before them is
    read. What is then computed for a sequence that has just ended is dropped.

    With `speculation`, which only a model on a CPU may have, steps in which all that runs decodes verify drafts too.
    """

    def __init__(
        self, model: Transformer, slots: int, max_seq_len: int, max_step_tokens: int,
        speculation: Speculation | None = None,
    ) -> None:  # fmt: skip
        self.model = model
        self.speculation = speculation
        self.max_seq_len = max_seq_len
        self.scheduler = Scheduler(slots, max(max_step_tokens, slots))
        self.cache = model.new_cache(slots, max_seq_len)
        self.loop = DecodeLoop(model, self.cache) if can_loop(model, self.cache) else None
        self._ahead: Ahead | None = None
        self.computed_tokens = 0  # by all steps so far; not those of a shared prefix, nor drafts that were wrong
        self.counts = Counts()  # of all steps so far
        self._sequences: dict[Request, Sequence] = {}
        self._searches: deque[Request] = deque()  # beam searches; the first may be running
        self._search: Iterator[int] | None = None  # the running one
        self._observers: dict[Request, Observer] = {}
        self._noise: dict[Request, bytes] = {}

    @property
    def idle(self) -> bool:
        return not self._sequences and not self._searches

    @property
    def running(self) -> int:
        """How many requests have slots; another thread may ask."""
        return len(self.scheduler.running) + (self._search is not None)

    def add(self, request: Request, observer: Observer | None = None) -> None:
        """Queue a request. Raises PromptError or ParameterError, and queues nothing, where it can never run."""
        self.check(request)
        request.added = time.perf_counter()
        if observer:
            self._observers[request] = observer
        if request.params.num_beams > 1:
            self._searches.append(request)
            return
        reusable = request.scored_from - 1 if request.prompt_logprobs else None
        sequence = Sequence(request, request.computed, reusable)
        self._sequences[request] = sequence
        self._noise[request] = noise_key(request.seed, request.prompt)
        self.scheduler.add(sequence)

    def check(self, request: Request) -> None:
        """Raise PromptError or ParameterError where a request can never run here."""
        check_request(request, self.model.params.vocab_size, self.max_seq_len, self.scheduler.slots)

    def finish(self, request: Request, reason: FinishReason, error: LlamaError | None = None) -> None:
        """End a request now and free its slot; one that has ended already stays as it is."""
        if request in self._sequences:
            sequence = self._sequences.pop(request)
            self.scheduler.remove(sequence)
            self._noise.pop(request)
            if self.speculation:
                self.speculation.forget(sequence)
        elif request in self._searches:
            if self._search and request is self._searches[0]:
                self._search = None
                self.scheduler.give_back_all()
            self._searches.remove(request)
        else:
            return
        request.finish_reason, request.error, request.finished = reason, error, time.perf_counter()
        if observer := self._observers.pop(request, None):
            observer(request)

    def clear_prefix_cache(self) -> None:
        """Forget the prefixes that the slots hold, unless in use: what runs next is computed as in a new engine."""
        if self.idle:
            self._ahead = None
            self.scheduler = Scheduler(self.scheduler.slots, self.scheduler.max_step_tokens)

    def read_prefix(self, tokens: list[int]) -> list[Tensor] | None:
        """A copy of the cache's rows of these tokens, as `KVCache` gives it; None where no free slot holds them all."""
        self._copy_prefixes()
        slot = self.scheduler.holder(tokens)
        return None if slot is None else self.cache.read_prefix(slot, len(tokens))

    def write_prefix(self, tokens: list[int], rows: list[Tensor]) -> None:
        """Have a free slot hold these tokens and their rows. Raises DeviceError where no slot is free."""
        if not self.scheduler.free:
            raise DeviceError(
                f"all {self.scheduler.slots} places for sequences are in use, so none can take a prompt cache: load"
                " it before requests run, or build with a larger max_batch_size"
            )
        self._copy_prefixes()
        self.scheduler.refill(tokens, lambda slot: self.cache.write_prefix(slot, rows))

    def step(self) -> list[Request]:
        """Compute one packed step; return the requests that got a token or ended."""
        parallel.check_process()
        device = self.model.device  # kernels run where PyTorch is told to be: another model may have told it otherwise
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            return self._step()

    def _step(self) -> list[Request]:
        if self._ahead:
            return self._collect(self._ahead)
        chunks = self.scheduler.plan(self._searches[0].added if self._searches else math.inf)
        self._copy_prefixes()
        if not chunks:
            return self._step_search() if self._searches else []
        decodes = all(chunk.reaches_end and chunk.stop - chunk.start == 1 for chunk in chunks)
        loop = self.loop if decodes else None
        if loop and len(chunks) == len(self.scheduler.running) and all(map(_decides_on_device, chunks)):
            with let_through():
                loop.load([_row(chunk) for chunk in chunks])
                self._ahead = self._launch(loop, [chunk.sequence for chunk in chunks], 0)
            return self._collect(self._ahead)
        if self.speculation and decodes:
            drafts = self.speculation.drafts([c.sequence for c in chunks], [self._room(c.sequence) for c in chunks])
            chunks = [replace(chunk, drafts=_in_form(chunk, own)) for chunk, own in zip(chunks, drafts, strict=True)]
        return self._decode_or_prefill(chunks, loop)

    def _copy_prefixes(self) -> None:
        copies = self.scheduler.copies
        while copies:
            self.cache.copy_prefix(copies[0].source, copies[0].target, copies[0].length)
            copies.popleft()

    def _room(self, sequence: Sequence) -> int:
        """How many tokens a sequence may get beside the next one."""
        request, left = sequence.request, self.max_seq_len - len(sequence.tokens)
        most = request.params.max_gen_len
        return (left if most is None else min(left, most - len(request.tokens))) - 1

    def _decode_or_prefill(self, chunks: list[Chunk], loop: DecodeLoop | None) -> list[Request]:
        """Compute the logits of chunks, with the loop where there is one, and choose the next tokens from them."""
        wanted = [_wanted_rows(chunk) for chunk in chunks]
        with let_through():
            if loop:
                logits = loop.logits([_row(chunk) for chunk in chunks])
            else:
                logits = self.model(_pack(chunks, wanted, self.model.device), self.cache)
        self.scheduler.commit(chunks)
        self.computed_tokens += sum(chunk.stop - chunk.start for chunk in chunks)
        try:
            places = self._places(chunks)  # before logits are read: a GPU computes them meanwhile
            return self._give(chunks, wanted, logits, places)
        except BaseException:  # Ctrl-C, say: the requests may go on
            self.scheduler.rewind(chunks)
            raise

    def _launch(self, loop: DecodeLoop, sequences: list[Sequence], unread: int) -> Ahead:
        """Launch a decode step, while the host lacks the last `unread` tokens of each sequence."""
        noise = [
            uniform(self._noise[s.request], len(s.tokens) + unread) if s.request.params.temperature else 0.0
            for s in sequences
        ]
        return Ahead(loop, sequences, loop.launch(noise))

    def _collect(self, launched: Ahead) -> list[Request]:
        """Launch the next step, if it has the same sequences; then read the launched one and hand its tokens out."""
        self._ahead = None
        chunks: list[Chunk] = []
        try:
            with let_through():
                if all(map(self._goes_on, launched.sequences)) and not (self.scheduler.waiting and self.scheduler.free):
                    self._ahead = self._launch(launched.loop, launched.sequences, 1)
                tokens = zip(launched.sequences, launched.tokens(), strict=True)
            there = [(sequence, token) for sequence, token in tokens if sequence.request in self._sequences]
            chunks = [Chunk(sequence, sequence.cached, sequence.cached + 1) for sequence, _ in there]
            self.scheduler.commit(chunks)
            self.computed_tokens += len(chunks)
            for sequence, token in there:
                if token < 0:
                    self._fail(sequence)
                else:
                    self._give_token(sequence, token)
        except BaseException:  # Ctrl-C, say: the requests may go on
            self._ahead = None
            self.scheduler.rewind(chunks)
            raise
        return [sequence.request for sequence, _ in there]

    def _goes_on(self, sequence: Sequence) -> bool:
        """Whether a sequence may need a token after the one that is on its way."""
        request = sequence.request
        ends = request.params.max_gen_len == len(request.tokens) + 1 or len(sequence.tokens) + 1 == self.max_seq_len
        return request in self._sequences and not ends

    def _step_search(self) -> list[Request]:
        """One pass of the first beam search; it ends with the last."""
        request = self._searches[0]
        if self._search is None:
            slots = self.scheduler.take_all()
            self._search = beam_search(self.model, self.cache, request, slots, self.scheduler.max_step_tokens)
        try:
            with let_through():
                self.computed_tokens += next(self._search)
            return []
        except StopIteration:
            self.finish(request, request.finish_reason or "length")
        except (NumericalError, ParameterError) as error:  # its own; one of the processes is everybody's
            self.finish(request, "error", error)
        except BaseException:  # Ctrl-C, say: the search begins anew
            self._search = None
            self.scheduler.give_back_all()
            raise
        return [request]

    def _places(self, chunks: list[Chunk]) -> dict[Sequence, list[Place]]:
        """Where tokens are to be chosen: behind each sequence's tokens, and behind each of its drafts."""
        return {
            chunk.sequence: [
                Place.of(chunk.sequence.request, self._noise[chunk.sequence.request], chunk.drafts[:n])
                for n in range(1 + len(chunk.drafts))
            ]
            for chunk in chunks
            if chunk.reaches_end and chunk.sequence.request.params.max_gen_len != 0
        }

    def _give(
        self, chunks: list[Chunk], wanted: list[range], logits: Tensor, places: dict[Sequence, list[Place]]
    ) -> list[Request]:  # fmt: skip
        """Hand the rows of logits to their requests: scores of prompt tokens, then the next tokens."""
        best, finite = greedy(logits)
        progressed, deciding, rows, first = [], [], [], 0
        for chunk, positions in zip(chunks, wanted, strict=True):
            behind = range(first + len(positions), first + len(positions) + len(chunk.drafts))  # the drafts' rows
            chunk_rows, first = range(first, behind.start), behind.stop
            request = chunk.sequence.request
            if not all(finite[row] for row in chunk_rows):
                self._fail(chunk.sequence)
                progressed.append(request)
                continue
            if request.prompt_logprobs and positions:
                rows_of = slice(chunk_rows.start, chunk_rows.stop)
                _score(request, positions, best[rows_of], logits[rows_of])
            if not chunk.reaches_end:
                continue
            progressed.append(request)
            if request.params.max_gen_len == 0:
                self.finish(request, "length")
            else:
                deciding.append(chunk)
                rows += [chunk_rows[-1], *behind]
        if deciding:
            taken = logits if len(rows) == len(logits) else logits[rows]
            own = [place for chunk in deciding for place in places[chunk.sequence]]
            unchanged = [_of_model(place, row) for place, row in zip(own, taken, strict=True)]
            chosen = self._choose(own, taken, [best[row] for row in rows])
            choices = zip(chosen, unchanged, [finite[row] for row in rows], strict=True)
            for chunk in deciding:
                self._accept(chunk, list(islice(choices, 1 + len(chunk.drafts))), len(chunks))
        return progressed

    def _choose(self, places: list[Place], logits: Tensor, best: list[int]) -> Iterable[int | None]:
        """The next token at each place, from its row of logits (R, V), which is changed, `best` the largest of each."""
        return next_tokens(places, logits, best)

    def _accept(self, chunk: Chunk, choices: list[tuple[int | None, Tensor | None, bool]], sequences: int) -> None:
        """Hand a sequence the tokens that its rows chose, up to the first that is not the draft in its place.

        A choice is a token, None where all are forbidden; its row of logits, where asked; and whether they are finite.
        """
        sequence, request, right = chunk.sequence, chunk.sequence.request, 0
        for (token, logits, finite), draft in zip(choices, (*chunk.drafts, None), strict=True):
            if not finite:
                self._fail(sequence)
                break
            if token is None:
                self.finish(request, "error", no_token(request))
                break
            self._give_token(sequence, token, logits)
            if token != draft:
                break
            right += 1
            if request not in self._sequences:
                break
            sequence.cached += 1  # the draft's keys and values are this token's
            self.computed_tokens += 1
        for counts in (request.counts, self.counts):
            counts.add(len(chunk.drafts), right)
        if chunk.drafts and self.speculation and request in self._sequences:
            self.speculation.learn(sequence, len(chunk.drafts), right, sequences)

    def _give_token(self, sequence: Sequence, token: int, logits: Tensor | None = None) -> None:
        """Hand a sequence its next token, chosen from logits (V,), which only requests for log-probabilities need."""
        request = sequence.request
        if request.first_token is None:
            request.first_token = time.perf_counter()
        if token in request.stop_tokens:
            self.finish(request, "stop")
            return
        if request.params.logprobs or request.params.top_logprobs:
            assert logits is not None  # the device chooses no token of such a request
            logprobs = torch.log_softmax(logits, dim=-1)
            tops = top_logprobs(logprobs[None], request.params.top_logprobs) if request.params.top_logprobs else []
            request.logprobs.append(logprobs[token].item())
            request.top_logprobs += tops  # all or nothing: where memory is short the step is taken again
        sequence.tokens.append(token)
        request.tokens.append(token)
        if request.form and request.form.ended(request.tokens):
            self.finish(request, "stop")
        elif len(request.tokens) == request.params.max_gen_len or len(sequence.tokens) == self.max_seq_len:
            self.finish(request, "length")
        elif observer := self._observers.get(request):
            observer(request)

    def _fail(self, sequence: Sequence) -> None:
        """End a sequence whose logits are not finite."""
        sequence.cached = 0  # what its slot holds may be damaged: nobody starts from it
        self.finish(sequence.request, "error", NumericalError(_not_finite(sequence.request)))


def _decides_on_device(chunk: Chunk) -> bool:
    """Whether the device can choose the next token: nobody needs the logits, and nothing changes them before."""
    request, params = chunk.sequence.request, chunk.sequence.request.params
    needs_logits = request.prompt_logprobs or params.logprobs or params.top_logprobs or params.max_gen_len == 0
    return params.plain and request.form is None and not needs_logits


def _of_model(place: Place, logits: Tensor) -> Tensor | None:
    """A copy of the model's own logits (V,) there, where the request asks for log-probabilities."""
    params = place.request.params
    return logits.clone() if params.logprobs or params.top_logprobs else None


def _in_form(chunk: Chunk, drafts: tuple[int, ...]) -> tuple[int, ...]:
    """Those of a chunk's drafts, up to the first that its request's form does not allow."""
    request = chunk.sequence.request
    return drafts if request.form is None else drafts[: request.form.allowed(request.tokens, drafts)]


def _row(chunk: Chunk) -> Row:
    sequence, params = chunk.sequence, chunk.sequence.request.params
    return Row(
        sequence.tokens[-1], chunk.slot, chunk.start, params.temperature, params.top_p, params.top_k, params.min_p
    )


def _wanted_rows(chunk: Chunk) -> range:
    """The positions of a chunk whose logits are needed: all before a scored token, else the last if it decides.

    Those of its drafts are always needed.
    """
    request = chunk.sequence.request
    if request.prompt_logprobs:
        return range(min(max(chunk.start, request.scored_from - 1), chunk.stop), chunk.stop)
    return range(chunk.stop - 1, chunk.stop) if chunk.reaches_end else range(0)


def _pack(chunks: list[Chunk], wanted: list[range], device: torch.device) -> Step:
    rows: list[int] = []
    first = 0
    for chunk, positions in zip(chunks, wanted, strict=True):
        drafted = first + chunk.stop - chunk.start
        rows += [first + position - chunk.start for position in positions]
        rows += range(drafted, first := drafted + len(chunk.drafts))
    parts = ((c.slot, c.start, [*c.sequence.tokens[c.start : c.stop], *c.drafts]) for c in chunks)
    return Step.pack(parts, rows, device)


def _score(request: Request, positions: range, best: list[int], logits: Tensor) -> None:
    """Note log p(prompt token t | before t) for the tokens after `positions`, from their rows of logits.

    `best` are the largest of each row.
    """
    for noted in (request.scores, request.top_scores, request.best):
        if not noted:
            noted += [None] * request.scored_from
        del noted[positions.start + 1 :]  # of a step that was interrupted after it had noted them
    targets = request.prompt[positions.start + 1 : positions.stop + 1]
    if not targets:
        return
    logprobs = torch.log_softmax(logits[: len(targets)], dim=-1)
    ids = torch.tensor(targets, device=logits.device)
    request.scores += logprobs.gather(1, ids[:, None])[:, 0].tolist()
    request.best += best[: len(targets)]
    if request.params.top_logprobs:
        request.top_scores += top_logprobs(logprobs, request.params.top_logprobs)


def _not_finite(request: Request) -> str:
    return (
        f"the model gave NaN or infinite logits for {request.name}: the weights are damaged (verify them against their"
        " checklist), or overflow in this dtype (try float32)"
    )
