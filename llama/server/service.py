"""The requests in the service, as the event loop sees them: who is let in, who waits for what, who has ended."""

import asyncio
import secrets
import time
from typing import TYPE_CHECKING

from llama.errors import LlamaError
from llama.jobs import Job
from llama.output import News, Output
from llama.server.bodies import Question
from llama.server.limits import Limits
from llama.server.metrics import Metrics
from llama.server.refusals import Refusal
from llama.server.worker import Worker

if TYPE_CHECKING:
    from llama.generation import Llama


class Asked:
    """A question that runs: its outputs change in the engine's thread, and `changed` is set for whoever answers it."""

    def __init__(self, question: Question, job: Job) -> None:
        self.question, self.job = question, job
        self.outputs = job.samples
        self.name, self.created = secrets.token_hex(12), int(time.time())
        self.begun = time.perf_counter()  # the clock of the engine's times
        self.changed = asyncio.Event()
        self.news: dict[Output, None] = {}  # the outputs that changed since the last look

    @property
    def ended(self) -> bool:
        return self.job.ended


class Service:
    """What runs in the one engine. Used by the event loop alone."""

    def __init__(self, llama: "Llama", worker: Worker, model: str, limits: Limits) -> None:
        self.llama = llama
        self.model = model
        self.started = int(time.time())
        self.limits = limits
        self.metrics = Metrics()
        self.draining = False
        self._worker = worker
        self._live: dict[Output, Asked] = {}
        self._idle = asyncio.Event()
        worker.attach(asyncio.get_running_loop(), self._changed)

    @property
    def running(self) -> int:
        return min(len(self._live), self.llama.engine.running)

    @property
    def waiting(self) -> int:
        return len(self._live) - self.running

    @property
    def completion_tokens(self) -> int:
        """Made so far, those of running requests included."""
        return self.metrics.completion_tokens + sum(len(output.request.tokens) for output in list(self._live))

    @property
    def failed(self) -> bool:
        """Whether the engine has ended by itself."""
        return self._worker.ended.done()

    def each_second(self) -> None:
        """Note how fast tokens come; where nobody takes steps any more, end what waits for one."""
        self.metrics.sample(self.completion_tokens)
        if self.failed and isinstance(error := self._worker.ended.exception(), LlamaError):
            for output in self._live:
                output.request.finish_reason, output.request.error = "error", error
            self._changed([(output, True) for output in self._live])

    def check_open(self, count: int = 1) -> None:
        """Raise Refusal where so many samples more cannot be taken now."""
        if self.draining or self.failed:
            raise Refusal(503, "the service is ending: ask another one", headers={"Connection": "close"})
        if len(self._live) + count > self.limits.places:
            said = f"{len(self._live)} samples run or wait, and {self.limits.places} may: ask again later"
            raise Refusal(429, said, "queue_full", {"Retry-After": "1"})

    def ask(self, question: Question, job: Job) -> Asked:
        """Queue what a question asks for. Raises Refusal."""
        asked = Asked(question, job)
        self.check_open(len(asked.outputs))
        if asked.outputs:
            self._live.update(dict.fromkeys(asked.outputs, asked))
            self._worker.add(asked.outputs, question.stream)
        else:  # a refused dialog
            asked.changed.set()
        return asked

    def leave(self, asked: Asked) -> None:
        """Nobody waits for the answer any more: what has not ended is ended before the next step."""
        if not asked.ended:
            self._worker.cancel(asked.outputs)

    async def drain(self, seconds: float) -> None:
        """Take nothing new, and wait so long for what runs; then end the rest."""
        self.draining = True
        if not await self._is_idle(seconds):
            self._worker.cancel(list(self._live))
            await self._is_idle(seconds=10)

    async def _is_idle(self, seconds: float) -> bool:
        self._idle.clear()
        if self._live:
            try:
                await asyncio.wait_for(self._idle.wait(), seconds)
            except asyncio.TimeoutError:
                return False
        return True

    def _changed(self, news: list[News]) -> None:
        """What a step has changed."""
        for output, ended in news:
            if not (asked := self._live.get(output)):
                continue  # it was ended in the meantime, as the engine has failed
            if ended:
                output.ended = True
                del self._live[output]
                self.metrics.count(output.request, asked.begun)
            asked.news[output] = None
            if ended or asked.question.stream:
                asked.changed.set()
        if not self._live:
            self._idle.set()
