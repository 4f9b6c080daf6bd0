"""`Llama`: a checkpoint and a tokenizer in, text out. Composition only: each part lives in a file of its own."""

import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from itertools import count, groupby
from pathlib import Path
from typing import Any

import torch
from typing_extensions import Unpack

from llama import parallel
from llama.chat import REFUSAL, ChatPrompt, Dialog, Message, check_dialog, format_dialog, has_special_tags
from llama.checkpoint import memory
from llama.engine.engine import Engine
from llama.errors import LlamaError, ParameterError, PromptError
from llama.loading import chosen, load
from llama.model.transformer import Transformer
from llama.options import RunOptions, check_seed
from llama.output import Output, refused
from llama.paths import expanded
from llama.predictions import ChatPrediction, CompletionPrediction, Score
from llama.request import MoreSampling, Request, SamplingParams, derive_seed, plain, plain_each
from llama.tokenizer import Tokenizer
from llama.turns import Call, Stream, Turns

Params = SamplingParams | Sequence[SamplingParams] | None


class Llama:
    """A model with its tokenizer, ready to complete text and dialogs, for any number of threads at once."""

    @staticmethod
    def build(
        ckpt_dir: str,
        tokenizer_path: str,
        max_seq_len: int,
        max_batch_size: int,
        model_parallel_size: int | None = None,
        seed: int | None = 1,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        quantize: str | None = None,
        kv_dtype: str | None = None,
        threads: int | None = None,
        compile: bool = False,
        verify: bool = False,
        max_step_tokens: int | None = None,
    ) -> "Llama":
        """Load a checkpoint in Meta's layout; says what was chosen in one line on stderr.

        `max_seq_len` is the most tokens of one sequence, prompt and completion; `max_batch_size` how many sequences
        are held at once (more may be asked for). `seed` None takes fresh entropy; of several processes the first's
        counts. `quantize` "int8" or "int4" holds the matrices in so many bits, `kv_dtype` "fp8" the KV cache in 8.
        `threads` is how many this process uses on a CPU (None: `device.default_threads`). `compile` runs the layers
        through torch.compile, which takes its time at the first steps. `verify` compares the files with their
        checklist.chk first. Raises a subclass of LlamaError: PeerError where another process has failed.
        """
        started = time.perf_counter()
        options = RunOptions(
            max_seq_len=max_seq_len, max_batch_size=max_batch_size, model_parallel_size=model_parallel_size, seed=seed,
            device=device, dtype=dtype, quantize=quantize, kv_dtype=kv_dtype, threads=threads, compile=compile,
            verify=verify, max_step_tokens=max_step_tokens,
        )  # fmt: skip
        folder = Path(expanded(ckpt_dir, "ckpt_dir"))
        model, tokenizer = load(folder, tokenizer_path, options)
        step_tokens = memory.step_tokens(model.device, options.max_step_tokens)
        llama = Llama(model, tokenizer, seed=options.seed, max_step_tokens=step_tokens)
        llama.ckpt_dir = folder
        seconds = time.perf_counter() - started
        parallel.say(f"llama: {folder}, {chosen(model, options)}, seed={llama.seed}, loaded in {seconds:.2f} s")
        return llama

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        *,
        seed: int | None = 1,
        max_step_tokens: int = memory.STEP_TOKENS,
    ) -> None:
        check_seed(seed)
        self.model = model
        self.tokenizer = tokenizer
        self.ckpt_dir: Path | None = None  # where `build` loaded it from
        self.seed = parallel.agree(secrets.randbits(63) if seed is None else seed, model.device)
        self.engine = Engine(model, model.params.max_batch_size, model.params.max_seq_len, max_step_tokens)
        self.turns = Turns(self.engine)
        self._requests = count(1)

    def generate(
        self,
        prompt_tokens: Sequence[Sequence[int]],
        max_gen_len: int | None = None,
        temperature: float = 0.6,
        top_p: float = 0.9,
        logprobs: bool = False,
        echo: bool = False,
        *,
        params: Params = None,
    ) -> tuple[list[list[int]], list[list[float]] | None]:
        """The tokens of each prompt's completion, and their log-probabilities or None; with `echo` the prompt's first.

        Each row ends before its end token, after `max_gen_len` new tokens, or at max_seq_len in all. An echoed
        prompt's first token, which nothing precedes, has log-probability 0.0. With n > 1 a prompt has n rows.
        """
        every = self._params(len(prompt_tokens), params, temperature, top_p, max_gen_len, logprobs, {})
        prompts = list(map(_plain_tokens, prompt_tokens))
        for index, prompt in enumerate(prompts):
            if not isinstance(prompt, list):
                raise PromptError(f"prompt {index} is {type(prompt).__name__}, not a list of tokens")
        outputs = self._outputs(prompts, every, "prompt", echo=echo)
        self._finish(outputs, None)
        kept = [output.kept()[0] for output in outputs]
        if not any(p.logprobs for p in every):
            return kept, None
        return kept, [output.logprobs()[: len(row)] for output, row in zip(outputs, kept, strict=True)]

    def text_completion(
        self,
        prompts: Sequence[str],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        logprobs: bool = False,
        echo: bool = False,
        *,
        params: Params = None,
        on_text: Callable[[int, str], None] | None = None,
        **more: Unpack[MoreSampling],
    ) -> list[CompletionPrediction]:
        """Complete each prompt. `on_text(prompt index, text)` is called as text is decided (of the first sample).

        Raises PromptError, naming the prompt, before anything is run; NumericalError after the others have ended.
        """
        tokens = self._encode(prompts)
        every = self._params(len(tokens), params, temperature, top_p, max_gen_len, logprobs, more)
        outputs = self._outputs(tokens, every, "prompt", echo=echo)
        self._finish(outputs, on_text)
        return [_prediction(own, _as_it_is) for own in _by_prompt(outputs)]

    def chat_completion(
        self,
        dialogs: Sequence[Dialog],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        logprobs: bool = False,
        *,
        params: Params = None,
        on_text: Callable[[int, str], None] | None = None,
        allow_special_tags: bool = False,
        **more: Unpack[MoreSampling],
    ) -> list[ChatPrediction]:
        """The assistant's answer to each dialog. A dialog with special tags is refused: answered so, and not run."""
        every = self._params(len(dialogs), params, temperature, top_p, max_gen_len, logprobs, more)
        prompts = self._chat_prompts(dialogs, allow_special_tags)
        outputs = self._outputs([prompt and prompt.tokens for prompt in prompts], every, "dialog")
        self._finish(outputs, on_text)
        answered = iter(_by_prompt(outputs))
        return [
            refused(own) if prompt is None else _prediction(next(answered), _assistant)
            for prompt, own in zip(prompts, every, strict=True)
        ]

    def run_each(
        self,
        prompts: Sequence[str | Dialog],
        params: Params,
        *,
        on_text: Callable[[int, str], None] | None = None,
        allow_special_tags: bool = False,
    ) -> Iterator[tuple[int, CompletionPrediction | ChatPrediction | LlamaError]]:
        """Complete texts and answer dialogs; yields (index, prediction) in the order in which they finish.

        A prompt that cannot be run, or fails, yields its error instead. Closing the iterator ends the rest.
        """
        every = self._params(len(prompts), params, 0.6, 0.9, None, False, {})
        at_once: list[tuple[int, ChatPrediction | LlamaError]] = []
        samples: dict[int, list[Output]] = {}
        for index, (prompt, own) in enumerate(zip(prompts, every, strict=True)):
            try:
                tokens = self._tokens(prompt, allow_special_tags)
                if tokens is None:
                    at_once.append((index, refused(own)))
                else:
                    kind = "the prompt" if isinstance(prompt, str) else "the dialog"
                    samples[index] = self._samples(tokens, own, kind, index)
            except LlamaError as error:
                at_once.append((index, error))
        call = Call(self.turns, [output for outputs in samples.values() for output in outputs], on_text is not None)

        def each() -> Iterator[tuple[int, CompletionPrediction | ChatPrediction | LlamaError]]:
            yield from at_once
            with closing(call):
                for output in call:
                    index, own_samples = output.index, samples[output.index]
                    if on_text and (text := own_samples[0].take()):
                        on_text(index, text)
                    if all(sample.ended for sample in own_samples):
                        failed = next((sample.request.error for sample in own_samples if sample.request.error), None)
                        generation = _as_it_is if isinstance(prompts[index], str) else _assistant
                        yield index, failed or _prediction(own_samples, generation)

        return Stream(call, each())

    def stream_text(
        self, prompt: str, temperature: float = 0.6, top_p: float = 0.9, max_gen_len: int | None = None,
        *, params: SamplingParams | None = None, **more: Unpack[MoreSampling],
    ) -> Iterator[str]:  # fmt: skip
        """The completion of one prompt, piece by piece as text is decided. Closing the iterator ends the request."""
        tokens = self._encode([prompt])
        every = self._params(1, params, temperature, top_p, max_gen_len, False, more)
        return self._stream(self._outputs(tokens, every, "prompt"))

    def stream_chat(
        self, dialog: Dialog, temperature: float = 0.6, top_p: float = 0.9, max_gen_len: int | None = None,
        *, params: SamplingParams | None = None, allow_special_tags: bool = False, **more: Unpack[MoreSampling],
    ) -> Iterator[str]:  # fmt: skip
        """The answer to one dialog, piece by piece as text is decided. Closing the iterator ends the request."""
        every = self._params(1, params, temperature, top_p, max_gen_len, False, more)
        prompt = self._chat_prompts([dialog], allow_special_tags)[0]
        if prompt is None:
            return Stream(Call(self.turns, [], texts=True), iter([REFUSAL]))
        return self._stream(self._outputs([prompt.tokens], every, "dialog"))

    def score(self, texts: Sequence[str], *, top_logprobs: int = 0) -> list[Score]:
        """The log-probability of every token of each text, without generating, in memory that does not grow with it."""
        params = SamplingParams(temperature=0, max_gen_len=0, top_logprobs=top_logprobs)
        tokens = self._encode(texts)
        outputs = self._outputs(tokens, [params] * len(tokens), "text", score=True)
        self._finish(outputs, None)
        return [output.score() for output in outputs]

    def score_each(self, texts: Sequence[str], *, top_logprobs: int = 0) -> list[Score | LlamaError]:
        """As `score`, with its error in the place of a text that cannot be scored."""
        params = SamplingParams(temperature=0, max_gen_len=0, top_logprobs=top_logprobs)
        found: list[Output | LlamaError] = []
        for index, text in enumerate(texts):
            try:
                tokens = self.tokenizer.encode(text, bos=True, eos=False)
                found += self._samples(tokens, params, "the text", index, score=True)
            except LlamaError as error:
                found.append(error)
        self._run([output for output in found if isinstance(output, Output)], None)
        return [one if isinstance(one, LlamaError) else one.request.error or one.score() for one in found]

    def format_dialog(self, dialog: Dialog) -> ChatPrompt:
        """The exact prompt that `chat_completion` would run for a dialog."""
        check_dialog(dialog, "the dialog")
        return format_dialog(dialog, self.tokenizer)

    def _encode(self, prompts: Sequence[str]) -> list[list[int]]:
        if isinstance(prompts, str):
            raise PromptError("prompts is one string: give a list of prompts")
        for index, prompt in enumerate(prompts):
            if not isinstance(prompt, str):
                raise PromptError(f"prompt {index} is {type(prompt).__name__}, not a string: {prompt!r:.60}")
        return [self.tokenizer.encode(prompt, bos=True, eos=False) for prompt in prompts]

    def _tokens(self, prompt: str | Dialog, allow_special_tags: bool) -> list[int] | None:
        """The tokens of a text or dialog; None for a dialog to refuse."""
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt, bos=True, eos=False)
        check_dialog(prompt, "the dialog")
        if has_special_tags(prompt) and not allow_special_tags:
            return None
        return format_dialog(prompt, self.tokenizer).tokens

    def _chat_prompts(self, dialogs: Sequence[Dialog], allow_special_tags: bool) -> list[ChatPrompt | None]:
        """The prompt of each dialog; None for one to refuse."""
        for index, dialog in enumerate(dialogs):
            check_dialog(dialog, f"dialog {index}")
        return [
            None if has_special_tags(dialog) and not allow_special_tags else format_dialog(dialog, self.tokenizer)
            for dialog in dialogs
        ]

    def _params(
        self, count: int, params: Params, temperature: float, top_p: float, max_gen_len: int | None, logprobs: bool,
        more: MoreSampling,
    ) -> list[SamplingParams]:  # fmt: skip
        """One SamplingParams a prompt, from `params=` or from the keywords, of which None is one left out."""
        more = {name: value for name, value in more.items() if value is not None}
        if params is None:
            one = SamplingParams(
                temperature=temperature, top_p=top_p, max_gen_len=max_gen_len, logprobs=logprobs, **more
            )
            return [one] * count
        named = zip((temperature, top_p, max_gen_len, logprobs), (0.6, 0.9, None, False), strict=True)
        if more or any(value is not None and value != default for value, default in named):
            raise ParameterError("params= and sampling keywords were both given: put them all into params")
        every = [params] * count if isinstance(params, SamplingParams) else list(params)
        if len(every) != count or not all(isinstance(p, SamplingParams) for p in every):
            raise ParameterError(
                f"params= has {len(every)} entries for {count} prompts: give one SamplingParams for each"
            )
        return every

    def _outputs(
        self, prompts: Sequence[list[int] | None], every: list[SamplingParams], kind: str,
        *, echo: bool = False, score: bool = False,
    ) -> list[Output]:  # fmt: skip
        """Checked requests for every prompt that is not None, n each; errors call a prompt `kind` and its index."""
        return [
            output
            for index, (prompt, params) in enumerate(zip(prompts, every, strict=True))
            if prompt is not None
            for output in self._samples(prompt, params, f"{kind} {index}", index, echo=echo, score=score)
        ]

    def _samples(
        self, prompt: list[int], params: SamplingParams, name: str, index: int,
        *, echo: bool = False, score: bool = False,
    ) -> list[Output]:  # fmt: skip
        """The n checked requests of one prompt, which errors call `name`."""
        seed = self._next_seed() if params.seed is None else params.seed
        outputs = []
        for sample in range(params.n):
            request = Request(
                prompt, params, derive_seed(seed, sample) if sample else seed,
                stop_tokens=frozenset((self.tokenizer.eos_id, *params.stop_token_ids)),
                prompt_logprobs=score or (echo and (params.logprobs or params.top_logprobs > 0)),
                name=name,
            )  # fmt: skip
            self.engine.check(request)
            outputs.append(Output(self.engine, self.tokenizer, request, index, echo))
        return outputs

    def _next_seed(self) -> int:
        return derive_seed(self.seed, next(self._requests))

    def _run(self, outputs: list[Output], on_text: Callable[[int, str], None] | None) -> None:
        """Run outputs to their end; none stays behind."""
        first_of = {output.index: output for output in reversed(outputs)}
        with closing(Call(self.turns, outputs, texts=on_text is not None)) as call:
            for output in call:
                if on_text and first_of[output.index] is output and (text := output.take()):
                    on_text(output.index, text)

    def _finish(self, outputs: list[Output], on_text: Callable[[int, str], None] | None) -> None:
        """Run outputs to their end, then raise the first error that any met."""
        self._run(outputs, on_text)
        _raise_first(outputs)

    def _stream(self, outputs: list[Output]) -> Iterator[str]:
        """The first output's text as it is decided."""
        call = Call(self.turns, outputs, texts=True)

        def pieces() -> Iterator[str]:
            with closing(call):
                for output in call:
                    if output is outputs[0] and (text := output.take()):
                        yield text
            _raise_first(outputs)

        return Stream(call, pieces())


def _plain_tokens(prompt: Any) -> Any:
    """A prompt as a list of Python's own numbers; what is no list of tokens is as it is."""
    prompt = plain(prompt)
    if not isinstance(prompt, Sequence) or isinstance(prompt, str):
        return prompt
    return list(prompt) if set(map(type, prompt)) <= {int} else plain_each(prompt)


def _raise_first(outputs: list[Output]) -> None:
    for output in outputs:
        if output.request.error:
            raise output.request.error


def _by_prompt(outputs: list[Output]) -> list[list[Output]]:
    return [list(group) for _, group in groupby(outputs, key=lambda output: output.index)]


def _prediction(samples: list[Output], generation: Callable[[str], Any]) -> Any:
    """The dict of one prompt; with several samples it is that of the first, and `samples` has them all."""
    dicts = [{"generation": generation(output.text), **output.result()} for output in samples]
    return {**dicts[0], "samples": dicts} if len(dicts) > 1 else dicts[0]


def _as_it_is(text: str) -> str:
    return text


def _assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}
