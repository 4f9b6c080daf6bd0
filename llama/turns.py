"""Calls of any number of threads run side by side in one engine. A thread that waits for its outputs takes the steps.

There is no thread of ours: its OpenMP pool would compete with the caller's. One thread at a time has the turn. It does
what other threads posted (requests to add, requests to end), computes one step, and tells each call what changed. The
other threads sleep. The thread that ends its turn takes the next one, or wakes a sleeper to take it.

No lock is held between turns, nor while a caller reads its outputs. So a stream that nobody reads stops nobody, a
callback may call the model, and a finalizer may close a call at any moment: closing only posts.

An exception in a step (out of memory, say) ends the call whose thread took the step; the next turn plans a new step.
Ctrl-C waits where it would hurt other calls. If it strikes while a call is being closed, the call's requests may run
to their end, unread.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from queue import SimpleQueue
from typing import TypeVar

from llama import parallel
from llama.engine.engine import Engine
from llama.errors import DeviceError, LlamaError
from llama.interrupts import let_through, put_off
from llama.output import News, Output

T = TypeVar("T")


class Turns:
    """Who steps an engine, and who waits for it."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._turn = threading.Lock()
        self._taker: int | None = None  # the thread that has the turn
        self._builder = threading.get_ident()
        self._posted: deque[Callable[[], None]] = deque()
        self._waiting: dict[Call, None] = {}

    def check(self) -> None:
        """Raise DeviceError where this process, or this thread, cannot take part."""
        parallel.check_process()
        self.check_thread()

    def check_thread(self) -> None:
        if threading.get_ident() != self._builder and (size := parallel.model_parallel_size()) > 1:
            raise DeviceError(
                f"this model is split over {size} processes, which must take the same steps in the same order, so only"
                " the thread that built it may call it: build it in this one"
            )

    def do(self, action: Callable[[], None]) -> None:
        """Have something done to the engine between two steps: now, or after the step that is being taken."""
        self._posted.append(action)
        with put_off():
            self._pass_on()

    def ask(self, action: Callable[[], T]) -> T:
        """What an action gives, or raises, that is done to the engine between two steps."""
        self._check_between_steps()
        answer: Future[T] = Future()

        def act() -> None:  # perhaps in another thread, which is not to hear of an error
            try:
                answer.set_result(action())
            except Exception as error:
                answer.set_exception(error)

        self.do(act)
        return answer.result()

    def next(self, call: "Call") -> News | None:
        """A call's next news, or None when it was closed. Until they come turns are taken, unless another has them."""
        self._check_between_steps()
        with put_off():
            self._waiting[call] = None  # before a turn is tried: the one who has it will see that
            try:
                return self._wait(call)
            finally:
                del self._waiting[call]
                self._pass_on()

    def _check_between_steps(self) -> None:
        self.check()
        if self._taker == threading.get_ident():
            raise LlamaError("the model was called in the middle of a step of its own: call it after that")

    def _wait(self, call: "Call") -> News | None:
        while True:
            while call.news.empty() and self._take(call):
                pass
            with let_through():
                news = call.news.get()
            if news or call.closed:
                return news

    def _take(self, call: "Call | None" = None) -> bool:
        """Take a turn, with a step if a call still waits for it; False where another has the turn."""
        if not self._turn.acquire(blocking=False):
            return False
        try:
            self._taker = threading.get_ident()
            while self._posted:
                self._posted.popleft()()
            if call and call.news.empty():
                self.engine.step()
        finally:
            self._taker = None
            self._turn.release()
        return True

    def _pass_on(self) -> None:
        """Leave nothing posted undone and not all asleep; where another has the turn, this will be done after it."""
        try:
            while self._posted and self._take():
                pass
        finally:
            if not self._turn.locked():
                for call in list(self._waiting)[:1]:
                    call.news.put(None)


class Call:
    """The outputs of one call, each as it changes, until all have ended. Closed, by any thread, it just stops.

    Every change is news with `texts`, else only ends are: nobody is woken for the others.
    """

    def __init__(self, turns: Turns, outputs: list[Output], texts: bool) -> None:
        self.news: SimpleQueue[News | None] = SimpleQueue()  # None: see what has changed
        self.closed = False
        self._turns, self._outputs, self._left = turns, outputs, len(outputs)
        for output in outputs:
            output.watch(self.news, texts)

    def __iter__(self) -> Iterator[Output]:
        """Run them, once; whoever leaves before the end is to close the call."""
        if self._outputs:
            self._turns.check()
            self._turns.do(self._add)
        while self._left and not self.closed and (news := self._turns.next(self)):
            output, ended = news
            output.ended = ended
            self._left -= ended
            yield output

    def close(self) -> None:
        """End what has not ended: in any thread, at any time, any number of times."""
        if self._left:
            self._turns.check_thread()
            self.closed = True
            self._turns.do(self._cancel)
            self.news.put(None)
        self.closed = True

    def _add(self) -> None:
        for output in () if self.closed else self._outputs:
            self._turns.engine.add(output.request, output.observe)

    def _cancel(self) -> None:
        for output in self._outputs:
            self._turns.engine.finish(output.request, "cancelled")


class Stream(Iterator[T]):
    """What a generator makes of a call. Any thread may close it at any time, which a generator that runs forbids."""

    def __init__(self, call: Call, items: Iterator[T]) -> None:
        self._call, self._items = call, items

    def __next__(self) -> T:
        if self._call.closed:
            raise StopIteration
        return next(self._items)

    def close(self) -> None:
        self._call.close()
