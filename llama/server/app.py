"""The service's routes: OpenAI's, what it says of itself, and the page at /."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from llama import log
from llama.openai import CHAT, COMPLETIONS
from llama.server import bodies
from llama.server.answers import Answer
from llama.server.guard import Guard
from llama.server.limits import BODIES_BYTES, BODY_BYTES, BODY_SECONDS, READERS, UNREAD_BYTES
from llama.server.page import page
from llama.server.refusals import Refusal
from llama.server.service import Service


def make_app(service: Service, key: str | None, host: str) -> ASGIApp:
    """The application, which asks for `key` where there is one; `host` is the name under which it listens."""
    routes = _Routes(service)
    table = [
        Route(CHAT, routes.chat, methods=["POST"]),
        Route(COMPLETIONS, routes.complete, methods=["POST"]),
        Route("/v1/models", routes.models),
        Route("/v1/models/{name:path}", routes.model),
        Route("/health", routes.health),
        Route("/metrics", routes.metrics),
        Route("/", routes.page),
    ]
    paths = frozenset(route.path for route in table)
    handlers: dict[Any, Any] = {Refusal: _refused, HTTPException: _no_route, Exception: _failed}
    app = Starlette(routes=table, exception_handlers=handlers)
    app.router.redirect_slashes = False
    return Guard(app, key=key, host=host, paths=paths, metrics=service.metrics)


class _Routes:
    """What each path does."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._page = page()
        self._readers = ThreadPoolExecutor(READERS, "reader")
        self._compiler = ThreadPoolExecutor(1, "compiler")  # of forms: one that takes its time stops no other request
        self._reading = 0  # bytes of bodies

    async def chat(self, request: Request) -> Answer:
        return await self._answer(request, chat=True)

    async def complete(self, request: Request) -> Answer:
        return await self._answer(request, chat=False)

    async def _answer(self, request: Request, chat: bool) -> Answer:
        service = self._service
        service.check_open()
        data = bytearray()
        try:
            try:
                await asyncio.wait_for(self._read(request, data), BODY_SECONDS)
            except asyncio.TimeoutError:
                said = f"the body did not come within {BODY_SECONDS} s"
                raise Refusal(408, said, headers={"Connection": "close"}) from None
            except ClientDisconnect:
                raise Refusal(400, "the body ends early") from None
            loop, limits = asyncio.get_running_loop(), service.limits
            question = await loop.run_in_executor(self._readers, bodies.read, bytes(data), chat, service.model, limits)
        finally:
            self._reading -= len(data)
        threads = self._compiler if question.params.form else self._readers
        job = await loop.run_in_executor(threads, bodies.job, question, service.llama, limits)
        return Answer(service, service.ask(question, job))

    async def _read(self, request: Request, data: bytearray) -> None:
        """Read the body into `data`. Raises Refusal where it is too large: after its end if that is near, since many
        clients do not look for an answer before."""
        if int(request.headers.get("content-length", 0)) > UNREAD_BYTES:
            raise _too_large()
        refusal, size = None, 0
        async for part in request.stream():
            size += len(part)
            if size > BODY_BYTES:
                refusal = _too_large()
            elif self._reading + len(part) > BODIES_BYTES:
                refusal = Refusal(429, "too many bodies are being read: ask again later", "queue_full",
                                  {"Retry-After": "1", "Connection": "close"})  # fmt: skip
            if refusal and size > UNREAD_BYTES:
                break
            if not refusal:
                data += part
                self._reading += len(part)
        if refusal:
            raise refusal

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        if request.path_params["name"] != self._service.model:
            raise Refusal(404, f"the model does not exist: this service has {self._service.model!r}", "model_not_found")
        return JSONResponse(self._model())

    def _model(self) -> dict[str, Any]:
        service = self._service
        return {"id": service.model, "object": "model", "created": service.started, "owned_by": "llama"}

    async def health(self, request: Request) -> Response:
        ending = self._service.draining or self._service.failed
        return JSONResponse({"status": "ending" if ending else "ok"}, 503 if ending else 200)

    async def metrics(self, request: Request) -> Response:
        service = self._service
        text = service.metrics.text(service.running, service.waiting, service.completion_tokens)
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    async def page(self, request: Request) -> Response:
        return self._page


def _too_large() -> Refusal:
    return Refusal(413, f"the body has more than {BODY_BYTES} bytes", headers={"Connection": "close"})


async def _refused(request: Request, refusal: Refusal) -> Response:
    return JSONResponse(refusal.body, refusal.status, refusal.headers)


async def _no_route(request: Request, error: HTTPException) -> Response:
    said = f"there is nothing at {request.scope['path']!r:.60}"
    if error.status_code == 405:
        said = f"{request.method!r:.20} is not answered here: use {(error.headers or {}).get('Allow', 'another')}"
    return JSONResponse(Refusal(error.status_code, said).body, error.status_code, error.headers)


async def _failed(request: Request, error: Exception) -> Response:
    log.say(f"a request failed: {type(error).__name__}: {error!s:.200}")
    return JSONResponse(Refusal(500, "the service failed at this request: its log says how").body, 500)
