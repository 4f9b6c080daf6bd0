"""The model `llama_runner` of lm-evaluation-harness: its requests → scores and completions of a checkpoint.

`python -m llama.integrations.lm_eval` is the harness's own command, which knows this model. Versions that look for
entry points of the group `lm_eval.models` find it by themselves. What the harness asks for is written in
https://github.com/EleutherAI/lm-evaluation-harness/blob/main/docs/model_guide.md.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import lm_eval.models  # noqa: F401  # registers the harness's own models, which ours is one more of
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from llama import Llama, log
from llama.batch.lines import sampling_fields
from llama.chat import E_INST, Message
from llama.errors import LlamaError, ParameterError, PromptError
from llama.options import RunOptions
from llama.request import Prompt, SamplingParams
from llama.wording import nearest

T = TypeVar("T")
SLOTS = 16  # what batch_size "auto" stands for
MAX_GEN_TOKS = 256  # as in the harness's other models
Request = tuple[tuple[str, str] | None, list[int], list[int]]  # (as asked for, context, continuation)


@register_model("llama_runner")
class LlamaRunner(TemplateLM):  # type: ignore[misc]  # the harness has no types
    """A checkpoint as the harness wants a model.

    Requests are handed over together, sorted by their tokens: those that begin alike stand side by side, and a
    beginning that the cache still holds is not computed again. Prompts that are longer than the model's context lose
    their first tokens, which is said.
    """

    def __init__(
        self, ckpt_dir: str | None = None, *, batch_size: int | str = 1, max_batch_size: int | None = None,
        max_length: int | None = None, max_gen_toks: int = MAX_GEN_TOKS, **options: Any,
    ) -> None:  # fmt: skip
        """`batch_size` is how many sequences are held at once ("auto": 16, or `max_batch_size` where that is less).

        `max_length` is the most tokens of one sequence (left out: what `Llama.build` takes), `max_gen_toks` the most of
        a completion where a task does not say. `options` are `Llama.build`'s others, such as dtype.
        """
        super().__init__()
        _check_options(options)
        if max_length is not None:
            options["max_seq_len"] = max_length
        slots = _slots(batch_size, max_batch_size)
        self.llama = Llama.build(None if ckpt_dir is None else str(ckpt_dir), max_batch_size=slots, **options)
        self.batch_size = slots
        self.max_length = self.llama.engine.max_seq_len
        self.max_gen_toks = max_gen_toks
        self._device = self.llama.model.device

    @property
    def eot_token_id(self) -> int:
        return self.llama.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that nothing precedes: the begin token, else the end token."""
        begin = self.llama.tokenizer.bos_id
        return begin if begin >= 0 else self.eot_token_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The tokens of a text. Special tokens that it spells are those tokens, as chat templates come as text here.

        The begin token is put before it unless it is there, `add_special_tokens` is False or the model has none.
        """
        tokenizer = self.llama.tokenizer
        spells = any(name in string for name in tokenizer.specials)
        tokens = tokenizer.encode_template(string) if spells else tokenizer.encode(string, bos=False, eos=False)
        begins = tokenizer.adds_bos and add_special_tokens is not False and tokens[:1] != [tokenizer.bos_id]
        return [tokenizer.bos_id] * begins + tokens

    # ------------------------------------------------------------------------------------------------------- scores

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """(Log p, whether greedy decoding gives it) of each continuation behind its context."""
        found: dict[int, tuple[float, bool]] = {}
        for index, answer in self._scored(requests, disable_tqdm):
            found[index] = answer
            if (asked := requests[index][0]) is not None:
                self.cache_hook.add_partial("loglikelihood", asked, answer)
        return [found[index] for index in range(len(requests))]

    def _scored(self, requests: Sequence[Request], disable_tqdm: bool) -> Iterator[tuple[int, tuple[float, bool]]]:
        yield from ((index, (0.0, True)) for index, (_, _, text) in enumerate(requests) if not text)
        order = [index for index, (_, _, text) in enumerate(requests) if text]
        order.sort(key=lambda index: requests[index][1] + requests[index][2])
        prompts = [self._scoring_prompt(*requests[index][1:]) for index in order]
        _say_cut(cut for _, cut in prompts)
        each = self.llama.score_tokens([prompt for prompt, _ in prompts])
        for place, scores in _shown(each, len(order), "loglikelihood", disable_tqdm):
            yield order[place], (sum(scores.logprobs), scores.is_greedy)

    def _scoring_prompt(self, context: list[int], continuation: list[int]) -> tuple[Prompt, bool]:
        """The prompt of a continuation, and whether its context was cut: the last token need not be read."""
        if len(continuation) > self.max_length:
            raise PromptError(
                f"a continuation of {len(continuation)} tokens is longer than max_length={self.max_length}: raise that"
            )
        whole = (context or [self.prefix_token_id]) + continuation
        tokens = whole[-self.max_length - 1 :]
        cut = len(tokens) < len(whole)
        return Prompt(tokens, scored_from=len(tokens) - len(continuation)), cut

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log p of each text, of any length, by the harness's windows."""
        windows: list[Request] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0], add_special_tokens=False)
            for window in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(owner)
        sums = [0.0] * len(requests)
        for owner, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            sums[owner] += logprob
        for request, logprob in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, logprob)
        return sums

    # -------------------------------------------------------------------------------------------------- completions

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """The completion of each context, up to the first of its stop strings."""
        prompts = [self._completed(*request.args) for request in requests]
        _say_cut(cut for *_, cut in prompts)
        order = sorted(range(len(prompts)), key=lambda index: prompts[index][0].tokens)
        each = self.llama.run_each([prompts[index][0] for index in order], [prompts[index][1] for index in order])
        found: dict[int, str] = {}
        for place, prediction in _shown(each, len(order), "generate_until", disable_tqdm):
            text = str(prediction["generation"])
            found[order[place]] = text
            self.cache_hook.add_partial("generate_until", requests[order[place]].args, text)
        return [found[index] for index in range(len(requests))]

    def _completed(self, context: str, asked: dict[str, Any]) -> tuple[Prompt, SamplingParams, bool]:
        """A context's prompt and parameters, and whether it was cut to leave room for the completion."""
        params = _sampling(asked, self.max_gen_toks)
        room = self.max_length - (params.max_gen_len or 0)
        if room < 1:
            raise ParameterError(
                f"max_gen_toks={params.max_gen_len} leaves no room for a prompt in max_length={self.max_length}: lower"
                " it, or raise max_length"
            )
        tokens = self.tok_encode(context) or [self.prefix_token_id]
        return Prompt(tokens[-room:], self.llama.chat.end_ids), params, len(tokens) > room

    # --------------------------------------------------------------------------------------------------------- chat

    @property
    def tokenizer_name(self) -> str:
        """What the harness keeps requests by that it has built: the tokenizer's file and the chat format."""
        return f"{self.llama.tokenizer.model_path}-{self.llama.chat.identity}".replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """What the results call the checkpoint's format: there is one, so a name cannot choose."""
        if isinstance(chat_template, str):
            raise ParameterError(
                f"apply_chat_template={chat_template!r:.60}: a checkpoint has one format here; give it without a name,"
                " and another template by --model_args chat_template=FILE"
            )
        return self.llama.chat.identity if chat_template else None

    def apply_chat_template(self, chat_history: list[Message], add_generation_prompt: bool = True) -> str:
        """The prompt of a dialog as text. Without `add_generation_prompt` the last message is an answer's beginning."""
        dialog = chat_history if add_generation_prompt else chat_history[:-1]
        text = self.llama.format_dialog(dialog).text
        if add_generation_prompt:
            return text
        between = " " if text.endswith(E_INST) else ""  # in Llama-2's format; others end with a space or a line's end
        return text + between + chat_history[-1]["content"]


def _check_options(options: dict[str, Any]) -> None:
    """Raise ParameterError for what `Llama.build` does not take."""
    known = {"tokenizer_path", *RunOptions.__dataclass_fields__}
    for name in options:
        if name not in known:
            near = nearest(name, known)
            hint = f"did you mean {near!r}?" if near else "expected what Llama.build takes"
            raise ParameterError(f"model_args has {name!r:.60}: {hint}")


def _slots(batch_size: int | str, most: int | None) -> int:
    """How many sequences are held at once."""
    if str(batch_size).startswith("auto"):
        return min(SLOTS, most or SLOTS)
    try:
        return int(batch_size)
    except ValueError:
        raise ParameterError(f"batch_size={batch_size!r:.60} is no number: expected an integer, or auto") from None


def _sampling(asked: dict[str, Any], max_gen_toks: int) -> SamplingParams:
    """The harness's `generation_kwargs` as ours. Raises ParameterError for one that is not known here."""
    given = dict(normalize_gen_kwargs(asked, max_gen_toks))
    until = [text for text in given.pop("until") if text]
    sampled = given.pop("do_sample", False)
    own = {
        "temperature": given.pop("temperature", 0.0) if sampled else 0,
        "max_gen_len": given.pop("max_gen_toks"),
        "stop": until,
    }
    return SamplingParams(**{"top_p": 1.0, **sampling_fields(given), **own})


def _shown(each: Iterable[tuple[int, T | LlamaError]], total: int, kind: str, hidden: bool) -> Iterator[tuple[int, T]]:
    """Results as they come, counted by a bar on stderr. An error among them is raised."""
    for index, result in tqdm(each, total=total, desc=f"Running {kind} requests", disable=hidden or not log.is_first()):
        if isinstance(result, LlamaError):
            raise result
        yield index, result


def _say_cut(cuts: Iterable[bool]) -> None:
    """Say how many prompts lost their first tokens."""
    if count := sum(cuts):
        are = "1 prompt is" if count == 1 else f"{count} prompts are"
        log.say(f"{are} longer than max_length has room for: cut from the left", logging.WARNING)
