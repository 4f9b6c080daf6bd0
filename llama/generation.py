"""`Llama`: a checkpoint and a tokenizer in, text out. Composition only: each part lives in a file of its own."""

import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

import torch
from typing_extensions import Unpack

from llama import log, parallel, prompt_cache
from llama.chat import REFUSAL, ChatFormat, ChatPrompt, Dialog, Llama2Chat
from llama.checkpoint import memory
from llama.checkpoint.find import find_checkpoint
from llama.engine.drafts import Speculation
from llama.engine.engine import Engine
from llama.errors import LlamaError, PromptCacheError, PromptError
from llama.grammar import Forms
from llama.infilling import Infilling, infilling_prompt
from llama.jobs import Job, answer, completion, infilled, prediction
from llama.loading import chosen, load, speculation
from llama.model.transformer import Transformer
from llama.options import RunOptions, check_seed
from llama.output import Output, score_of
from llama.paths import check_writable, expanded
from llama.predictions import ChatPrediction, CompletionPrediction, InfillingPrediction, Score, TokenScores
from llama.request import (
    LOGPROBS,
    TEMPERATURE,
    TOP_P,
    LeftOut,
    MoreSampling,
    Params,
    Prompt,
    Request,
    SamplingParams,
    derive_seed,
    params_for,
    plain,
    plain_each,
)
from llama.tokenizer import BaseTokenizer
from llama.turns import Call, Stream, Turns
from llama.windows import Windows, bits_per_byte

P = TypeVar("P")
T = TypeVar("T")
OnText = Callable[[int, str], None]
Ended = tuple[int, T | LlamaError]  # the index of a prompt that has ended, and its result or error


class Llama:
    """A model with its tokenizer, ready to complete text and dialogs, for any number of threads at once."""

    @staticmethod
    def build(
        ckpt_dir: str | None = None,
        tokenizer_path: str | None = None,
        max_seq_len: int = 2048,
        max_batch_size: int = 8,
        model_parallel_size: int | None = None,
        seed: int | None = 1,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        quantize: str | None = None,
        kv_dtype: str | None = None,
        threads: int | None = None,
        compile: bool = False,
        batch_invariant: bool = False,
        verify: bool = False,
        chat_template: str | None = None,
        max_step_tokens: int | None = None,
        speculate: str | None = None,
        draft_tokens: int = 7,
        max_memory: dict[str, int | str] | None = None,
        device_map: str | dict[str, str] | None = None,
    ) -> "Llama":
        """Load a checkpoint (a folder of Meta's or of Hugging Face's, or a GGUF file), and log what was chosen.

        Left out, `ckpt_dir` is LLAMA_CKPT_DIR, or else the bundled demo; `tokenizer_path` is the tokenizer in the
        folder or file, LLAMA_TOKENIZER_PATH, or the one beside the folder. `max_seq_len` is the most tokens of one
        sequence, prompt and completion; `max_batch_size` how many sequences are held at once (more may be asked for).
        `seed` None takes fresh entropy; of several processes the first's counts. `quantize` "int8" or "int4" holds the
        matrices in so many bits, `kv_dtype` "fp8" the KV cache in 8. `threads` is how many this process uses on a CPU
        (None: `device.default_threads`). `compile` runs the layers through torch.compile, which takes its time at the
        first steps. `batch_invariant` makes results the same to the bit whatever is computed beside them, also where
        that is slower (where it costs nothing they always are). `verify` compares the files with the sums that came
        with them first. `chat_template` is a file with a template in Jinja, "llama2" or "none" (None: the checkpoint's
        own, or Llama-2's format). `speculate` drafts up to `draft_tokens` tokens at a time, from what a text has said
        before ("lookup") or with a smaller model of the same vocabulary (its folder), and verifies them in one step:
        results stay the same. `device_map` ("auto", "balanced", or {"layers.0-15": "cuda:0", …}) lays whole layers over
        devices and the disk, within `max_memory` ({"cuda:0": "5GiB"}; None: what is free). Raises a subclass of
        LlamaError: PeerError where another process has failed.
        """
        started = time.perf_counter()
        options = RunOptions(
            max_seq_len=max_seq_len, max_batch_size=max_batch_size, model_parallel_size=model_parallel_size, seed=seed,
            device=device, dtype=dtype, quantize=quantize, kv_dtype=kv_dtype, threads=threads, compile=compile,
            batch_invariant=batch_invariant, verify=verify, chat_template=chat_template,
            max_step_tokens=max_step_tokens, speculate=speculate, draft_tokens=draft_tokens,
            max_memory=max_memory, device_map=device_map,
        )  # fmt: skip
        folder, tokenizer_path = find_checkpoint(ckpt_dir, tokenizer_path)
        loaded = load(Path(folder), tokenizer_path, options)
        model = loaded.model
        step_tokens = memory.step_tokens(model.device, options.max_step_tokens)
        drafting = speculation(model, options, step_tokens)
        llama = Llama(model, loaded.tokenizer, seed=options.seed, max_step_tokens=step_tokens, speculation=drafting)
        llama.ckpt_dir, llama.files, llama.fingerprint = Path(folder), loaded.files, loaded.fingerprint
        llama.end_ids |= set(loaded.end_ids)
        llama.chat = loaded.chat
        seconds = time.perf_counter() - started
        log.say(f"{folder}, {chosen(model, options)}, seed={llama.seed}, loaded in {seconds:.2f} s")
        return llama

    def __init__(
        self,
        model: Transformer,
        tokenizer: BaseTokenizer,
        *,
        seed: int | None = 1,
        max_step_tokens: int = memory.STEP_TOKENS,
        speculation: Speculation | None = None,
    ) -> None:
        check_seed(seed)
        self.model = model
        self.tokenizer = tokenizer
        self.ckpt_dir: Path | None = None  # where `build` loaded it from
        self.files: tuple[Path, ...] = ()  # and which files those are
        self.fingerprint: Callable[[], str] | None = None  # of its weights
        self.end_ids = {tokenizer.eos_id} - {-1}  # the tokens that end a text
        self.chat: ChatFormat = Llama2Chat(tokenizer)
        self.seed: int = parallel.broadcast(secrets.randbits(63) if seed is None else seed, model.device)
        sizes = model.params
        self.engine = Engine(model, sizes.max_batch_size, sizes.max_seq_len, max_step_tokens, speculation)
        self.turns = Turns(self.engine)
        self._requests = count(1)
        self._forms = Forms(tokenizer, sizes.vocab_size)

    def generate(
        self,
        prompt_tokens: Sequence[Sequence[int]],
        max_gen_len: int | None = None,
        temperature: float = TEMPERATURE,
        top_p: float = TOP_P,
        logprobs: bool | LeftOut = LOGPROBS,
        echo: bool = False,
        *,
        params: Params = None,
    ) -> tuple[list[list[int]], list[list[float]] | None]:
        """The tokens of each prompt's completion, and their log-probabilities or None; with `echo` the prompt's first.

        Each row ends before its end token, after `max_gen_len` new tokens, or at max_seq_len in all. An echoed
        prompt's first token, which nothing precedes, has log-probability 0.0. With n > 1 a prompt has n rows.
        Left out, `temperature` is 0.6, `top_p` 0.9 and `logprobs` False, or what `params` says.
        """
        keywords = _keywords(temperature, top_p, max_gen_len, logprobs)
        jobs = self._jobs(prompt_tokens, params_for(len(prompt_tokens), params, keywords), "prompt", _listed, echo=echo)
        outputs = [output for samples in self._finish(jobs, lambda job: job.samples) for output in samples]
        rows = [output.kept()[0] for output in outputs]
        if not any(job.params.logprobs for job in jobs):
            return rows, None
        return rows, [output.logprobs()[: len(row)] for output, row in zip(outputs, rows, strict=True)]

    def text_completion(
        self,
        prompts: Sequence[str],
        temperature: float = TEMPERATURE,
        top_p: float = TOP_P,
        max_gen_len: int | None = None,
        logprobs: bool | LeftOut = LOGPROBS,
        echo: bool = False,
        *,
        params: Params = None,
        on_text: OnText | None = None,
        **more: Unpack[MoreSampling],
    ) -> list[CompletionPrediction]:
        """Complete each prompt. `on_text(prompt index, text)` is called as text is decided (of the first sample).

        Left out, `temperature` is 0.6, `top_p` 0.9 and `logprobs` False, or what `params` says.
        Raises PromptError, naming the prompt, before anything is run; NumericalError after the others have ended.
        """
        _check_list(prompts)
        listed = params_for(len(prompts), params, _keywords(temperature, top_p, max_gen_len, logprobs, more))
        return self._finish(self._jobs(prompts, listed, "prompt", self._text, echo=echo), completion, on_text)

    def chat_completion(
        self,
        dialogs: Sequence[Dialog],
        temperature: float = TEMPERATURE,
        top_p: float = TOP_P,
        max_gen_len: int | None = None,
        logprobs: bool | LeftOut = LOGPROBS,
        *,
        params: Params = None,
        on_text: OnText | None = None,
        allow_special_tags: bool = False,
        **more: Unpack[MoreSampling],
    ) -> list[ChatPrediction]:
        """The assistant's answer to each dialog. A dialog with special tags is refused: answered so, and not run.

        Left out, `temperature` is 0.6, `top_p` 0.9 and `logprobs` False, or what `params` says.
        """
        listed = params_for(len(dialogs), params, _keywords(temperature, top_p, max_gen_len, logprobs, more))
        read = partial(self._dialog, allow_special_tags)
        return self._finish(self._jobs(dialogs, listed, "dialog", read), answer, on_text)

    def infill(
        self,
        prefixes: Sequence[str],
        suffixes: Sequence[str],
        temperature: float = TEMPERATURE,
        top_p: float = TOP_P,
        max_gen_len: int | None = None,
        logprobs: bool | LeftOut = LOGPROBS,
        suffix_first: bool = False,
        *,
        params: Params = None,
        on_text: OnText | None = None,
        **more: Unpack[MoreSampling],
    ) -> list[InfillingPrediction]:
        """What belongs between each prefix and its suffix: Code Llama 7B and 13B were made for that.

        The model reads the prefix first, or, `suffix_first`, the suffix. `generation` is what belongs in the gap,
        `full_text` the whole. Left out, `temperature` is 0.6, `top_p` 0.9 and `logprobs` False, or what `params` says.
        Raises PromptError where the model was not made for it.
        """
        _check_list(prefixes)
        _check_list(suffixes)
        if len(prefixes) != len(suffixes):
            raise PromptError(f"{len(prefixes)} prefixes and {len(suffixes)} suffixes: give a suffix for each prefix")
        gaps = [Infilling(*texts, suffix_first) for texts in zip(prefixes, suffixes, strict=True)]
        listed = params_for(len(gaps), params, _keywords(temperature, top_p, max_gen_len, logprobs, more))
        jobs = self._jobs(gaps, listed, "prompt", self._infilling)
        return self._finish(jobs, lambda job: infilled(job, gaps[job.index]), on_text)

    text_infilling = infill  # as Code Llama's own runner calls it

    def run_each(
        self,
        prompts: Sequence[str | Prompt | Dialog | Infilling],
        params: Params,
        *,
        on_text: OnText | None = None,
        allow_special_tags: bool = False,
    ) -> Iterator[Ended[CompletionPrediction | ChatPrediction | InfillingPrediction]]:
        """Complete texts, answer dialogs and fill gaps; yields (index, prediction) in the order in which they finish.

        A text may be a `Prompt`, with its tokens. A prompt that cannot be run, or fails, yields its error instead.
        Closing the iterator ends the rest.
        """
        read = partial(self._any, allow_special_tags)
        jobs = self._jobs_or_errors(prompts, params_for(len(prompts), params, {}), read)
        return self._each(jobs, lambda job: prediction(job, prompts[job.index]), on_text)

    def job(self, prompt: str | Dialog | Infilling, params: SamplingParams) -> Job:
        """The checked requests of one prompt, for who steps `engine`: they are not queued yet. Any thread may ask.

        A dialog with special tags has none. Raises PromptError or ParameterError.
        """
        read, name = self._any(False, prompt)
        return self._job(0, read, params, name)

    def stream_text(
        self, prompt: str, temperature: float = TEMPERATURE, top_p: float = TOP_P, max_gen_len: int | None = None,
        *, params: SamplingParams | None = None, **more: Unpack[MoreSampling],
    ) -> Iterator[str]:  # fmt: skip
        """The completion of one prompt, piece by piece as text is decided. Closing the iterator ends the request."""
        listed = params_for(1, params, _keywords(temperature, top_p, max_gen_len, None, more))
        return self._pieces(self._jobs([prompt], listed, "prompt", self._text)[0])

    def stream_chat(
        self, dialog: Dialog, temperature: float = TEMPERATURE, top_p: float = TOP_P, max_gen_len: int | None = None,
        *, params: SamplingParams | None = None, allow_special_tags: bool = False, **more: Unpack[MoreSampling],
    ) -> Iterator[str]:  # fmt: skip
        """The answer to one dialog, piece by piece as text is decided. Closing the iterator ends the request."""
        listed = params_for(1, params, _keywords(temperature, top_p, max_gen_len, None, more))
        return self._pieces(self._jobs([dialog], listed, "dialog", partial(self._dialog, allow_special_tags))[0])

    def score(
        self, texts: Sequence[str], *, top_logprobs: int = 0, stride: int | None = None, context: int | None = None
    ) -> list[Score]:
        """The log-probability of every token of each text, without generating, in memory that does not grow with it.

        With `stride` or `context` a text may be of any length: it is read in windows of `context` tokens (left out:
        max_seq_len), each `stride` tokens (left out: half a window) behind the one before it (see `Windows`).
        """
        _check_list(texts)
        windows = Windows.of(stride, context, self.engine.max_seq_len)
        jobs = self._scoring_jobs(texts, [f"text {index}" for index in range(len(texts))], windows, top_logprobs)
        if wrong := next((job.rejection for own in jobs for job in own if job.rejection), None):
            raise wrong
        return _raised(self._scored(texts, jobs, windows))

    def score_each(
        self, texts: Sequence[str], *, top_logprobs: int = 0, stride: int | None = None, context: int | None = None
    ) -> list[Score | LlamaError]:
        """As `score`, with its error in the place of a text that cannot be scored."""
        windows = Windows.of(stride, context, self.engine.max_seq_len)
        jobs = self._scoring_jobs(texts, ["the text"] * len(texts), windows, top_logprobs)
        return self._scored(texts, jobs, windows)

    def score_tokens(self, prompts: Sequence[Prompt]) -> Iterator[Ended[TokenScores]]:
        """The log-probabilities of each prompt's tokens from its place `scored_from` on; yields (index, scores) in the
        order in which they end.

        Each has one token more than `scored_from`, or more, and at most max_seq_len + 1: the last is not read. The
        beginning of a prompt that another has, up to what is scored, is computed once.
        """
        jobs = self._jobs_or_errors(prompts, [_scoring(0)] * len(prompts), partial(self._any, False), score=True)
        return self._each(jobs, _token_scores)

    def save_prefix(self, prompt: str | Dialog | Infilling | Sequence[int], path: str | os.PathLike[str]) -> list[int]:
        """Write the KV cache of a text, a dialog, a gap or a list of tokens to a file; returns its tokens.

        What of the prompt was not computed yet is computed first. The file takes the place of one that is there when it
        is whole. Raises PromptError where the prompt has more than max_seq_len tokens, ParameterError where the file
        cannot be written, DeviceError and PromptCacheError as `prefix_made_with`.
        """
        made, target = self.prefix_made_with(), expanded(path, "path")
        check_writable(target)
        tokens = self._prefix_tokens(prompt)
        run = prompt_cache.PrefixRun(self.engine, self.tokenizer, tokens)
        with closing(Call(self.turns, [run], texts=False)) as call:
            for _ in call:
                pass
        prompt_cache.write(target, run.prefix(), made)
        return tokens

    def load_prefix(self, path: str | os.PathLike[str]) -> list[int]:
        """Read such a file, so that prompts which begin with its tokens, or some of them, start from there.

        Returns its tokens. They stay until sequences need their place, as those of any call do. Raises PromptCacheError
        where the file is damaged, was made with another model, or has more than max_seq_len tokens; DeviceError where
        running requests have all places.
        """
        source = expanded(path, "path")
        prefix = prompt_cache.read(source, self.engine, self.prefix_made_with())
        self.turns.ask(lambda: self.engine.write_prefix(prefix.tokens, prefix.rows))
        return prefix.tokens

    def prefix_made_with(self) -> dict[str, Any]:
        """What `load_prefix` wants a file to be made with: all that decides the numbers of this model's KV cache.

        Raises DeviceError where the model is split over processes, PromptCacheError where nobody knows its weights: it
        was not built from files, or they have changed since.
        """
        if self.fingerprint is None:
            raise PromptCacheError("this model was not made by Llama.build, so its weights are not known: use that")
        return prompt_cache.made_with(self.engine, self.fingerprint())

    def prompt_tokens(self, prompt: str | Dialog | Infilling) -> list[int]:
        """The exact prompt that would be run for a text, a dialog or a gap."""
        read, _ = self._any(True, prompt)
        assert read  # nothing is refused
        return read.tokens

    def format_dialog(self, dialog: Dialog) -> ChatPrompt:
        """The exact prompt that `chat_completion` would run for a dialog."""
        self.chat.check(dialog, "the dialog")
        return self.chat.prompt(dialog)

    def _scoring_jobs(
        self, texts: Sequence[str], names: Sequence[str], windows: Windows | None, top_logprobs: int
    ) -> list[list[Job]]:
        """For each text a job for each of its windows, or one with its error."""
        params, made, count = _scoring(top_logprobs), [], 0
        for text, name in zip(texts, names, strict=True):
            try:
                whole = self._text(text, name)
                parts = windows.over(whole.tokens) if windows else [whole]
                own = [self._job(count + n, part, params, name, score=True) for n, part in enumerate(parts)]
            except LlamaError as error:
                own = [Job(params, count, rejection=error)]
            made.append(own)
            count += len(own)
        return made

    def _scored(self, texts: Sequence[str], jobs: list[list[Job]], windows: Windows | None) -> list[Score | LlamaError]:
        """Run the jobs of each text to their end, all together."""
        ended = iter(self._collect([job for own in jobs for job in own], lambda job: job.samples[0].request))
        scores: list[Score | LlamaError] = []
        for text, own in zip(texts, jobs, strict=True):
            parts = [next(ended) for _ in own]
            if error := next((part for part in parts if isinstance(part, LlamaError)), None):
                scores.append(error)
                continue
            score = score_of([part for part in parts if isinstance(part, Request)], self.tokenizer)
            if windows:
                score["bits_per_byte"] = bits_per_byte(score["logprobs"], text)
            scores.append(score)
        return scores

    def _prefix_tokens(self, prompt: str | Dialog | Infilling | Sequence[int]) -> list[int]:
        if isinstance(prompt, str | Infilling):
            return self.prompt_tokens(prompt)
        listed: Any = plain(prompt)
        is_dialog = isinstance(listed, Sequence) and len(listed) > 0 and isinstance(listed[0], Mapping)
        return self.prompt_tokens(listed) if is_dialog else _listed(listed, "the prompt").tokens

    def _each(self, jobs: list[Job], result: Callable[[Job], T], on_text: OnText | None = None) -> Stream[Ended[T]]:
        """Run jobs; yields (index, result or error) as each ends, and first those of which nothing is run."""
        call = Call(self.turns, [output for job in jobs for output in job.samples], texts=on_text is not None)

        def each() -> Iterator[Ended[T]]:
            with closing(call):
                yield from ((job.index, job.error or result(job)) for job in jobs if not job.samples)
                for output in call:
                    job = jobs[output.index]
                    if on_text and (text := job.take()):
                        on_text(job.index, text)
                    if job.ended:
                        yield job.index, job.error or result(job)

        return Stream(call, each())

    def _collect(
        self, jobs: list[Job], result: Callable[[Job], T], on_text: OnText | None = None
    ) -> list[T | LlamaError]:
        """Run jobs to their end; their results or errors in the order of the prompts."""
        with closing(self._each(jobs, result, on_text)) as each:
            ended = dict(each)
        return [ended[job.index] for job in jobs]

    def _finish(self, jobs: list[Job], result: Callable[[Job], T], on_text: OnText | None = None) -> list[T]:
        """Run jobs to their end; their results, or the first error is raised."""
        return _raised(self._collect(jobs, result, on_text))

    def _pieces(self, job: Job) -> Iterator[str]:
        """Run one job; yields the text of its first sample as it is decided, and raises the error at the end."""
        call = Call(self.turns, job.samples, texts=True)

        def pieces() -> Iterator[str]:
            if not job.samples:
                yield REFUSAL
            with closing(call):
                for _ in call:
                    if text := job.take():
                        yield text
            if job.error:
                raise job.error

        return Stream(call, pieces())

    def _jobs(
        self, prompts: Sequence[P], params: list[SamplingParams], kind: str,
        read: Callable[[P, str], Prompt | None], *, echo: bool = False,
    ) -> list[Job]:  # fmt: skip
        """A job for each prompt. Raises what is wrong with the first bad one, called `kind` and its index."""
        read_prompts = [read(prompt, f"{kind} {index}") for index, prompt in enumerate(prompts)]
        return [
            self._job(index, one, own, f"{kind} {index}", echo=echo)
            for index, (one, own) in enumerate(zip(read_prompts, params, strict=True))
        ]

    def _jobs_or_errors(
        self, prompts: Sequence[P], params: list[SamplingParams],
        read: Callable[[P], tuple[Prompt | None, str]], *, score: bool = False,
    ) -> list[Job]:  # fmt: skip
        """The same where a bad prompt has a job with its error. `read` gives its prompt, and a name."""
        jobs = []
        for index, (prompt, own) in enumerate(zip(prompts, params, strict=True)):
            try:
                read_prompt, name = read(prompt)
                jobs.append(self._job(index, read_prompt, own, name, score=score))
            except LlamaError as error:
                jobs.append(Job(own, index, rejection=error))
        return jobs

    def _job(
        self, index: int, prompt: Prompt | None, params: SamplingParams, name: str,
        *, echo: bool = False, score: bool = False,
    ) -> Job:  # fmt: skip
        """The n checked requests of one prompt, which errors call `name`; none where there is nothing to run."""
        job = Job(params, index)
        if prompt is None:
            return job
        seed = derive_seed(self.seed, next(self._requests)) if params.seed is None else params.seed
        stop_tokens = prompt.end_ids.union(self.end_ids, params.stop_token_ids)
        for sample in range(params.n):
            request = Request(
                prompt.tokens, params, derive_seed(seed, sample) if sample else seed, stop_tokens,
                prompt_logprobs=score or (echo and (params.logprobs or params.top_logprobs > 0)),
                scored_from=prompt.scored_from, name=name,
            )  # fmt: skip
            self.engine.check(request)
            if params.form:
                request.form = self._forms.form(*params.form, stop_tokens, prompt.inside)
            job.samples.append(Output(self.engine, self.tokenizer, request, index, echo, prompt.inside))
        return job

    def _text(self, text: str, name: str) -> Prompt:
        if not isinstance(text, str):
            raise PromptError(f"{name} is {type(text).__name__}, not a string: {text!r:.60}")
        return Prompt(self.tokenizer.encode(text, bos=True, eos=False))

    def _infilling(self, infilling: Infilling, name: str) -> Prompt:
        return infilling_prompt(infilling, self.tokenizer, name)

    def _dialog(self, allow_special_tags: bool, dialog: Dialog, name: str) -> Prompt | None:
        """None for a dialog to refuse."""
        self.chat.check(dialog, name)
        if self.chat.refuses(dialog) and not allow_special_tags:
            return None
        return Prompt(self.chat.prompt(dialog).tokens, self.chat.end_ids)

    def _any(self, allow_special_tags: bool, prompt: str | Prompt | Dialog | Infilling) -> tuple[Prompt | None, str]:
        if isinstance(prompt, Prompt):
            return prompt, "the prompt"
        if isinstance(prompt, Infilling):
            return self._infilling(prompt, "the prompt"), "the prompt"
        if isinstance(prompt, str):
            return self._text(prompt, "the prompt"), "the prompt"
        return self._dialog(allow_special_tags, prompt, "the dialog"), "the dialog"


def _listed(prompt: Sequence[int], name: str) -> Prompt:
    """A prompt that is a list of tokens, as Python's own numbers."""
    listed: object = plain(prompt)
    if not isinstance(listed, Sequence) or isinstance(listed, str):
        raise PromptError(f"{name} is {type(listed).__name__}, not a list of tokens")
    return Prompt(list(listed) if set(map(type, listed)) <= {int} else list(plain_each(listed)))


def _keywords(
    temperature: float, top_p: float, max_gen_len: int | None, logprobs: bool | LeftOut | None,
    more: MoreSampling | None = None,
) -> dict[str, object]:  # fmt: skip
    named = {"temperature": temperature, "top_p": top_p, "max_gen_len": max_gen_len, "logprobs": logprobs}
    return {**named, **(more or {})}


def _scoring(top_logprobs: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_gen_len=0, top_logprobs=top_logprobs)


def _token_scores(job: Job) -> TokenScores:
    request = job.samples[0].request
    scored = slice(request.scored_from, None)
    logprobs = [logprob for logprob in request.scores[scored] if logprob is not None]
    return TokenScores(logprobs, request.best[scored] == request.prompt[scored])


def _raised(results: Sequence[T | LlamaError]) -> list[T]:
    """The results; the first error among them is raised."""
    found: list[T] = []
    for one in results:
        if isinstance(one, LlamaError):
            raise one
        found.append(one)
    return found


def _check_list(prompts: Sequence[str]) -> None:
    if isinstance(prompts, str):
        raise PromptError("prompts is one string: give a list of prompts")
