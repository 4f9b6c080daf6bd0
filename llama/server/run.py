"""The service from its start to its end: the model's thread, uvicorn in the main one, and the signals."""

import asyncio
import socket
import sys
from collections.abc import Callable, Coroutine
from types import FrameType
from typing import TYPE_CHECKING, Any

import uvicorn

from llama import log
from llama.server.app import make_app
from llama.server.connections import Connection, watch
from llama.server.limits import HEAD_BYTES, HEAD_SECONDS, Limits
from llama.server.listening import url
from llama.server.options import ServeOptions
from llama.server.service import Service
from llama.server.worker import Worker

if TYPE_CHECKING:
    from llama.generation import Llama

SWITCH_SECONDS = 0.001  # after which the engine's thread gets the interpreter from the event loop; Python's own is 5 ms


def serve(build: "Callable[[], Llama]", listener: socket.socket, key: str | None, options: ServeOptions) -> None:
    """Build the model and answer requests at `listener`, until a signal ends that."""
    sys.setswitchinterval(SWITCH_SECONDS)
    worker = Worker(build)
    llama = worker.built.result()
    slots, longest = llama.engine.scheduler.slots, llama.engine.max_seq_len
    limits = Limits(
        prompt_tokens=min(options.max_prompt_tokens or longest, longest),
        completion_tokens=min(options.max_completion_tokens or longest, longest),
        places=slots + options.max_queue,
    )
    assert llama.ckpt_dir  # `build` has loaded it from there
    path = llama.ckpt_dir.resolve()
    model = path.stem if path.suffix == ".gguf" else path.name

    async def run() -> None:
        service = Service(llama, worker, model, limits)
        config = uvicorn.Config(
            make_app(service, key, options.host), http=Connection, loop="asyncio", ws="none", lifespan="off",
            log_config=None, log_level="critical", access_log=False, proxy_headers=False, server_header=False,
            timeout_keep_alive=HEAD_SECONDS, timeout_graceful_shutdown=5, h11_max_incomplete_event_size=HEAD_BYTES,
        )  # fmt: skip
        server = _Server(config, service, options.drain_seconds, url(options.host, listener))
        try:
            await server.serve([listener])
        finally:
            worker.close(10)

    asyncio.run(run())
    if worker.ended.done():
        worker.ended.result()  # raises why the engine has failed


class _Server(uvicorn.Server):
    """uvicorn's, which a signal makes take nothing new and end when what runs has ended; a second one ends it now."""

    def __init__(self, config: uvicorn.Config, service: Service, drain_seconds: float, address: str) -> None:
        super().__init__(config)
        self._service, self._drain_seconds, self._address = service, drain_seconds, address
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._begin(self._each_second())
        log.say(f"{self._service.model} is served at {self._address}/v1, as OpenAI's; Ctrl-C ends it")

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        for task in self._tasks:
            task.cancel()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._service.draining:
            self.should_exit = self.force_exit = True
        else:
            self._service.draining = True
            self._loop.call_soon_threadsafe(lambda: self._begin(self._drain()))

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        self._tasks.add(self._loop.create_task(work))

    async def _drain(self) -> None:
        running = self._service.running + self._service.waiting
        if running:
            log.say(f"ending: nothing new is taken, and {running} running samples have {self._drain_seconds} s")
        await self._service.drain(self._drain_seconds)
        self.should_exit = True

    async def _each_second(self) -> None:
        while True:
            watch(self.server_state.connections)
            self._service.each_second()
            if self._service.failed:
                self.should_exit = True
            await asyncio.sleep(1)
