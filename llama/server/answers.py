"""An answer as it goes to the client: one JSON object at the end, or server-sent events while it is made.

Events: https://html.spec.whatwg.org/multipage/server-sent-events.html, with OpenAI's chunks as their data. An event
is written once a step, for all samples together, and holds what is new. A client that reads slowly gets fewer and
larger events: what waits for it is never more than its completion. One that goes away ends its requests.
"""

import asyncio
import contextlib
import json
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from llama import openai
from llama.chat import REFUSAL
from llama.gate import json_line
from llama.jobs import Job, prediction
from llama.output import Output
from llama.predictions import completion_tokens
from llama.server.refusals import Refusal, refusal_of
from llama.server.service import Asked, Service
from llama.tokenizer import BaseTokenizer, StreamDecoder

_EVENTS = {"type": "http.response.start", "status": 200, "headers": [
    (b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),
]}  # fmt: skip
DONE = b"data: [DONE]\n\n"


class Answer:
    """The response (an ASGI application) to a question that runs."""

    def __init__(self, service: Service, asked: Asked) -> None:
        self._service, self._asked = service, asked

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer; raises Refusal where it is an error before anything was sent."""
        gone = asyncio.ensure_future(_gone(receive))
        gone.add_done_callback(lambda _: self._service.leave(self._asked))
        try:
            if self._asked.question.stream:
                await self._stream(send)
            else:
                await (await self._whole())(scope, receive, send)
        finally:
            gone.cancel()  # which also ends what still runs
            with contextlib.suppress(asyncio.CancelledError):
                await gone

    async def _whole(self) -> JSONResponse:
        asked, job = self._asked, self._asked.job
        while not (asked.ended or _failure(job)):
            await self._next()
        if refusal := _failure(job):
            raise refusal
        return await asyncio.to_thread(self._response)  # log-probabilities may be many

    def _response(self) -> JSONResponse:
        asked, service = self._asked, self._service
        result, chat = dict(prediction(asked.job, asked.question.prompt)), asked.question.chat
        body = openai.response(asked.name, asked.created, service.model, chat, result, service.llama.tokenizer)
        return JSONResponse(body)

    async def _next(self) -> list[Output]:
        """The outputs that have changed since the last call; waits for one."""
        asked = self._asked
        await asked.changed.wait()
        asked.changed.clear()
        news, asked.news = list(asked.news), {}
        return news

    async def _stream(self, send: Send) -> None:
        asked, job = self._asked, self._asked.job
        chunks = _Chunks(asked, self._service.model)
        parts = {output: _Part(index, output, self._service.llama.tokenizer, chunks)
                 for index, output in enumerate(asked.outputs)}  # fmt: skip
        changed = await self._next()
        if refusal := _failure(job):
            raise refusal  # before anything was sent: it is the response
        await send(_EVENTS)
        await _send(send, b"".join(map(chunks.role, range(len(parts) or 1))) + chunks.refused(not parts))
        while True:
            if data := b"".join(parts[output].events() for output in changed):
                await _send(send, data)
            if asked.ended or (refusal := _failure(job)):
                break
            changed = await self._next()
        if refusal := _failure(job):
            tail = _event(refusal.body)
        else:
            tail = chunks.usage() if asked.question.include_usage else b""
        await send({"type": "http.response.body", "body": tail + DONE, "more_body": False})


class _Chunks:
    """OpenAI's chunks of one response: what all have in common is written once."""

    def __init__(self, asked: Asked, model: str) -> None:
        self._asked, self._chat = asked, asked.question.chat
        head = {
            "id": f"{'chatcmpl' if self._chat else 'cmpl'}-{asked.name}",
            "object": "chat.completion.chunk" if self._chat else "text_completion",
            "created": asked.created,
            "model": model,
        }
        self._head = json_line(head)[:-1]
        self._usage = ', "usage": null' if asked.question.include_usage else ""

    def text(self, index: int, text: str, logprobs: dict[str, Any] | None = None, reason: str | None = None) -> bytes:
        """What is new of a sample, and why it ended, if it has."""
        said = json_line(text)
        if self._chat:
            return self._chunk(index, f'"delta": {{"content": {said}}}' if text else '"delta": {}', logprobs, reason)
        return self._chunk(index, f'"text": {said}', logprobs, reason)

    def role(self, index: int) -> bytes:
        """The first chunk of a chat's sample."""
        return self._chunk(index, '"delta": {"role": "assistant", "content": ""}') if self._chat else b""

    def refused(self, refused: bool) -> bytes:
        """All of an answer that is a refusal."""
        return self.text(0, REFUSAL, reason="content_filter") if refused else b""

    def usage(self) -> bytes:
        """The last chunk, which has no choice."""
        result = prediction(self._asked.job, self._asked.question.prompt)
        usage = openai.usage(result["prompt_tokens"], completion_tokens(result))
        return f'data: {self._head}, "choices": [], "usage": {json.dumps(usage)}}}\n\n'.encode()

    def _chunk(self, index: int, said: str, logprobs: dict[str, Any] | None = None, reason: str | None = None) -> bytes:
        probable = json_line(logprobs) if logprobs else "null"
        choice = f'{{"index": {index}, {said}, "logprobs": {probable}, "finish_reason": {json.dumps(reason)}}}'
        return f'data: {self._head}, "choices": [{choice}]{self._usage}}}\n\n'.encode()


class _Part:
    """How much of one sample has been sent. The engine's thread goes on adding to its output meanwhile."""

    def __init__(self, index: int, output: Output, tokenizer: BaseTokenizer, chunks: _Chunks) -> None:
        self._index, self._output, self._chunks = index, output, chunks
        self._tokens = _Tokens(output, tokenizer, chunks._chat) if output.request.params.logprobs else None

    def events(self) -> bytes:
        """What is new: text, with the log-probabilities of its tokens where they were asked for, and the end."""
        output = self._output
        ended = output.ended  # before the text is looked at: what is seen then is all
        text = output.take()
        logprobs = self._tokens.take(len(text), ended) if self._tokens else None
        data = self._chunks.text(self._index, text, logprobs) if text or logprobs else b""
        if ended:
            data += self._chunks.text(self._index, "", reason=openai.finish_reason(output.request.finish_reason))
        return data


class _Tokens:
    """Which tokens of an output belong to the text that has been sent.

    A token goes with the text that it ends. Those that begin a character, or what may be a stop string, wait for it.
    """

    def __init__(self, output: Output, tokenizer: BaseTokenizer, chat: bool) -> None:
        self._output, self._tokenizer, self._chat = output, tokenizer, chat
        self._decoder = StreamDecoder(tokenizer, inside=output.inside)
        self._pieces: list[str] = []  # of the tokens so far, as texts
        self._sent = self._sent_characters = 0
        self._characters = 0  # of the pieces that have been sent

    def take(self, characters: int, ended: bool) -> dict[str, Any] | None:
        """The log-probabilities of the tokens of so many characters more; the rest of them at the end."""
        output, begin = self._output, self._sent
        self._sent_characters += characters
        if ended:
            self._pieces = output.kept()[1]
            self._sent = len(self._pieces)
        else:
            for token in output.request.tokens[len(self._pieces) :]:
                self._pieces.append(self._decoder.feed(token))
            length = self._characters
            for place in range(begin, len(self._pieces)):
                length += len(self._pieces[place])
                if self._pieces[place] and length <= self._sent_characters:
                    self._sent = place + 1
        if self._sent == begin:
            return None
        offset, pieces = self._characters, self._pieces[begin : self._sent]
        self._characters += sum(map(len, pieces))
        request = output.request
        part: dict[str, Any] = {
            "token_ids": request.tokens[begin : self._sent], "tokens": pieces,
            "logprobs": request.logprobs[begin : self._sent],
        }  # fmt: skip
        if request.params.top_logprobs:
            part["top_logprobs"] = output.top_logprobs(begin, self._sent)
        first = tuple(request.tokens[:1]) if begin else ()
        return openai.token_logprobs(part, self._chat, self._tokenizer, first, offset)


def _failure(job: Job) -> Refusal | None:
    """Why a job that has ended, or whose first sample has, is no answer."""
    if job.error:
        return refusal_of(job.error)
    if any(sample.request.finish_reason == "cancelled" for sample in job.samples):
        return Refusal(503, "the service has ended before the answer was complete: ask another one")
    return None


async def _gone(receive: Receive) -> None:
    """Return when the client has gone away."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _event(data: dict[str, Any]) -> bytes:
    return f"data: {json_line(data)}\n\n".encode()


async def _send(send: Send, data: bytes) -> None:
    await send({"type": "http.response.body", "body": data, "more_body": True})
