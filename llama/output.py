"""`Output`: the text of one request while it is generated, and what callers get of it beside the text."""

import math
from collections.abc import Sequence
from queue import SimpleQueue

from llama.engine.engine import Engine
from llama.predictions import Result, Score, TopLogprob
from llama.request import Request
from llama.tokenizer import BaseTokenizer, StreamDecoder


class Output:
    """Watches one request in the engine, decodes its tokens, and ends it at a stop string.

    One thread steps the engine and so adds to it, another may read it: what is whole is put into the reader's queue.
    """

    def __init__(
        self, engine: Engine, tokenizer: BaseTokenizer, request: Request, index: int, echo: bool, inside: bool = False
    ) -> None:
        self.request = request
        self.index = index  # of the prompt in its call; n samples of a prompt share it
        self.text = ""
        self.ended = False  # and the reader has been told
        self._taken = 0
        self._engine = engine
        self._tokenizer = tokenizer
        self.inside = inside  # a text, whose first space is kept
        self._decoder = StreamDecoder(tokenizer, request.params.stop, request.params.min_gen_len, inside=inside)
        self._echoed = request.prompt if echo else []
        self._seen = 0
        self._news: SimpleQueue[News | None] = SimpleQueue()
        self._texts = False
        if echo:
            self._add("".join(map(self._decoder.decode, request.prompt)))

    def watch(self, news: "SimpleQueue[News | None]", texts: bool) -> None:
        """Have each change put into a reader's queue: with `texts` every one, else only the end."""
        self._news, self._texts = news, texts

    def observe(self, request: Request) -> None:
        """Take in the request's new tokens, or its end: the engine calls this after each."""
        for token in request.tokens[self._seen :]:
            self._add(self._decoder.feed(token))
        self._seen = len(request.tokens)
        if request.finish_reason:
            self._add(self._decoder.flush())
        if self._decoder.stopped:
            if not request.finish_reason:
                self._engine.finish(request, "stop")  # which comes here again
                return
            request.finish_reason = "stop"
        if self._texts or request.finish_reason:
            self._news.put((self, request.finish_reason is not None))

    def take(self) -> str:
        """The text since the last take; another thread may be adding to it."""
        text, taken = self.text, self._taken
        self._taken = len(text)
        return text[taken:]

    def _add(self, text: str) -> None:
        self.text += text

    def kept(self) -> tuple[list[int], list[str]]:
        """(Tokens, pieces), the pieces joining to the text: of a stop string's tokens only what comes before it."""
        tokens = self._echoed + self.request.tokens
        pieces = self._tokenizer.pieces(tokens, self.inside)
        if not self._decoder.stopped:
            return tokens, pieces
        kept: list[str] = []
        left = len(self.text)
        for piece in pieces:
            if not left and piece:
                break
            kept.append(piece[:left])
            left -= len(kept[-1])
        return tokens[: len(kept)], kept

    def logprobs(self) -> list[float]:
        """One for each token before any cut; an echoed prompt's first token, which nothing precedes, has 0.0."""
        echoed = [0.0 if score is None else score for score in self.request.scores] if self._echoed else []
        return echoed + self.request.logprobs

    def top_logprobs(self, begin: int = 0, end: int | None = None) -> list[list[TopLogprob]]:
        """For each token as above, or for those of a part."""
        echoed = [top or {} for top in self.request.top_scores] if self._echoed else []
        return [_named(top, self._tokenizer) for top in (echoed + self.request.top_logprobs)[begin:end]]

    def result(self) -> Result:
        """All of a prediction but its text."""
        request, params = self.request, self.request.params
        assert request.finish_reason and request.finished is not None  # it has ended
        result: Result = {}
        if params.logprobs or params.top_logprobs:
            result["token_ids"], pieces = self.kept()
            result["tokens"] = pieces
            if params.logprobs:
                result["logprobs"] = self.logprobs()[: len(pieces)]
            if params.top_logprobs:
                result["top_logprobs"] = self.top_logprobs()[: len(pieces)]
        begun = request.first_token
        if self._engine.speculation:
            result["drafted_tokens"], result["accepted_tokens"] = request.counts.drafted, request.counts.accepted
            result["tokens_per_step"] = request.counts.tokens_per_step
        return {
            **result,
            "finish_reason": request.finish_reason,
            "seed": request.seed,
            "prompt_tokens": len(request.prompt),
            "completion_tokens": len(request.tokens),
            "time_to_first_token": None if begun is None else begun - request.added,
            "time": request.finished - request.added,
        }


def score_of(windows: Sequence[Request], tokenizer: BaseTokenizer) -> Score:
    """The score of a text from the requests for its windows, of which a short text has one."""
    tokens, logprobs = windows[0].prompt[:1], windows[0].scores[:1]
    tops = windows[0].top_scores[:1]
    for window in windows:
        tokens = tokens + window.prompt[window.scored_from :]
        logprobs = logprobs + window.scores[window.scored_from :]
        tops = tops + window.top_scores[window.scored_from :]
    known = [score for score in logprobs if score is not None]
    return {
        "tokens": tokens,
        "pieces": tokenizer.pieces(tokens),
        "logprobs": logprobs,
        "top_logprobs": [_named(top, tokenizer) if top else None for top in tops]
        if windows[0].params.top_logprobs
        else None,
        "perplexity": math.exp(-sum(known) / len(known)) if known else None,
    }


News = tuple[Output, bool]  # one that has changed, and whether it has ended


def _named(top: dict[int, float], tokenizer: BaseTokenizer) -> list[TopLogprob]:
    return [{"token": token, "piece": tokenizer.piece(token), "logprob": logprob} for token, logprob in top.items()]
