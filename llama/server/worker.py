"""The engine's thread: it builds the model, takes every step, and tells the event loop what a step has changed.

The event loop posts what is to be done between two steps (requests to add, requests to end) and never waits for one.
After each step it is told once of all that has changed, however many requests took part.
"""

import asyncio
import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from queue import SimpleQueue
from typing import TYPE_CHECKING

import torch

from llama import log
from llama.errors import DeviceError
from llama.output import News, Output

if TYPE_CHECKING:
    from llama.engine.engine import Engine
    from llama.generation import Llama

Deliver = Callable[[list[News]], None]


class Worker:
    """A model in a thread of its own: its OpenMP pool belongs to the thread that takes the steps."""

    def __init__(self, build: "Callable[[], Llama]") -> None:
        self.built: Future[Llama] = Future()
        self.ended: Future[None] = Future()  # when no step is taken any more; with an error, because none can be
        self._posted: SimpleQueue[Callable[[Engine], None] | None] = SimpleQueue()
        self._news: SimpleQueue[News | None] = SimpleQueue()
        self._live: dict[Output, None] = {}
        self._deliver: Deliver | None = None
        self._thread = threading.Thread(target=self._run, args=(build,), name="engine", daemon=True)
        self._thread.start()

    def attach(self, loop: asyncio.AbstractEventLoop, deliver: Deliver) -> None:
        """Have `deliver` called in the loop with what each step has changed; before anything is added."""
        self._deliver = partial(_call_in, loop, deliver)

    def add(self, outputs: Sequence[Output], texts: bool) -> None:
        """Queue the requests of outputs: with `texts` every change of theirs is delivered, else only their ends."""
        for output in outputs:
            output.watch(self._news, texts)
        self._posted.put(partial(self._add, outputs))

    def cancel(self, outputs: Sequence[Output]) -> None:
        """End what of these has not ended, before the next step."""
        self._posted.put(partial(_cancel, outputs))

    def close(self, seconds: float) -> None:
        """End the thread after its step; wait for it for so long."""
        self._posted.put(None)
        self._thread.join(seconds)

    def _run(self, build: "Callable[[], Llama]") -> None:
        try:
            llama = build()
        except BaseException as error:
            self.built.set_exception(error)
            return
        self.built.set_result(llama)
        try:
            self._work(llama.engine)
            self.ended.set_result(None)
        except Exception as error:
            reason = f"the engine cannot go on ({type(error).__name__}: {error!s:.200})"
            self.ended.set_exception(DeviceError(reason))

    def _work(self, engine: "Engine") -> None:
        """Do what is posted and take steps until told to end. Raises what leaves the engine, or its device, broken."""
        while True:
            if engine.idle or not self._posted.empty():
                action = self._posted.get()
                if action is None:
                    return
            else:
                action = _step
            try:
                action(engine)
            except Exception as error:  # out of memory, say: nobody knows whose fault it is, and all may go on anew
                self._fail(engine, error)
                if engine.model.device.type == "cuda":
                    torch.cuda.synchronize(engine.model.device)  # after some errors all that CUDA is asked for fails
            self._hand_over()

    def _add(self, outputs: Sequence[Output], engine: "Engine") -> None:
        self._live.update(dict.fromkeys(outputs))
        for output in outputs:
            engine.add(output.request, output.observe)

    def _fail(self, engine: "Engine", error: Exception) -> None:
        reason = f"a step of the engine failed ({type(error).__name__}: {error!s:.200})"
        log.say(f"{reason}: {len(self._live)} requests are ended", logging.ERROR)
        for output in list(self._live):
            engine.finish(output.request, "error", DeviceError(f"{reason}: ask again"))
            if output.request.finish_reason is None:  # it was not added yet
                output.request.finish_reason, output.request.error = "error", DeviceError(f"{reason}: ask again")
                self._news.put((output, True))

    def _hand_over(self) -> None:
        changed: list[News] = []
        while not self._news.empty():
            if news := self._news.get():
                changed.append(news)
                if news[1]:
                    self._live.pop(news[0], None)
        if changed and self._deliver:
            self._deliver(changed)


def _call_in(loop: asyncio.AbstractEventLoop, deliver: Deliver, news: list[News]) -> None:
    loop.call_soon_threadsafe(deliver, news)


def _step(engine: "Engine") -> None:
    engine.step()


def _cancel(outputs: Sequence[Output], engine: "Engine") -> None:
    for output in outputs:
        engine.finish(output.request, "cancelled")
