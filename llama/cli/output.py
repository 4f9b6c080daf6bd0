"""What completions look like on stdout: as they are made, whole, as JSON, or token by token."""

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llama.errors import LlamaError
from llama.gate import harmless, json_line, to_stderr
from llama.predictions import completion_tokens, samples_of
from llama.request import SamplingParams

if TYPE_CHECKING:
    from llama.generation import Llama
    from llama.infilling import Infilling
    from llama.predictions import CompletionPrediction

_HEADING = 70  # characters of a prompt in the line above its completion


def has_colour() -> bool:
    """Whether stdout is a terminal whose user has not set NO_COLOR (no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def prediction_fields(prediction: dict[str, Any]) -> dict[str, Any]:
    """A prediction as JSON shows it: `text` instead of `generation`, in its samples too."""
    fields = {"text": prediction["generation"], **prediction}
    del fields["generation"]
    if "samples" in fields:
        fields["samples"] = [prediction_fields(sample) for sample in fields["samples"]]
    return fields


def in_order(results: Iterator[tuple[int, Any]]) -> Iterator[tuple[int, Any]]:
    """(Index, result) pairs as they come, those ahead of their turn held back."""
    waiting: dict[int, Any] = {}
    turn = 0
    for index, result in results:
        waiting[index] = result
        while turn in waiting:
            yield turn, waiting.pop(turn)
            turn += 1


def show_completions(
    llama: "Llama", prompts: "Sequence[str | Infilling]", params: SamplingParams,
    *, as_json: bool, as_tokens: bool, speaks: bool,
) -> list[Any]:  # fmt: skip
    """Complete texts, fill gaps, and print each result in its turn, in a terminal while it is made.

    Only a process that `speaks` prints. `as_tokens`: token by token, with what `params` asks for. The error of a text
    that fails is a line on stderr.
    """
    texts = list(map(str, prompts))
    whole = as_json or as_tokens or params.num_beams > 1 or not sys.stdout.isatty()
    stream = _Stream(texts) if speaks and not whole else None
    done = []
    for index, result in in_order(llama.run_each(prompts, params, on_text=stream.add if stream else None)):
        done.append(result)
        if stream:
            stream.end("\n" if isinstance(result, LlamaError) else _after_first(result))
        if not speaks:
            continue
        if isinstance(result, LlamaError):
            which = f"prompt {index}: " if len(texts) > 1 else ""
            to_stderr(f"llama: {which}{result}")
        elif as_json:
            print(json_line({**_prompt_fields(prompts[index]), **prediction_fields(result)}), flush=True)
        elif not stream:
            print(_heading(texts, index) + _whole(result, as_tokens), end="", flush=True)
    return done


def _prompt_fields(prompt: "str | Infilling") -> dict[str, str]:
    return {"prompt": prompt} if isinstance(prompt, str) else {"prefix": prompt.prefix, "suffix": prompt.suffix}


def statistics(results: Sequence[Mapping[str, Any]]) -> str:
    """Tokens in and out, how fast, and what came of drafts."""
    samples = [sample for result in results for sample in samples_of(result)]
    read, completed = sum(result["prompt_tokens"] for result in results), sum(map(completion_tokens, results))
    seconds = max(sample["time"] for sample in samples)
    first = [result["time_to_first_token"] for result in results if result["time_to_first_token"] is not None]
    began = f", the first after {min(first):.2f} s" if first else ""
    drafted, right = (sum(sample.get(f"{which}_tokens", 0) for sample in samples) for which in ("drafted", "accepted"))
    drafts = f", {right} of {drafted} drafts right" if drafted else ""
    speed = completed / max(seconds, 1e-9)
    return f"{read} tokens in, {completed} out in {seconds:.2f} s ({speed:.1f} tokens/s){began}{drafts}"


def cut(results: Sequence[Mapping[str, Any]], params: SamplingParams) -> str:
    """What is to be said where texts that were to have a form were cut; else nothing."""
    samples = [sample for result in results for sample in samples_of(result)]
    short = sum(sample["finish_reason"] == "length" for sample in samples)
    if params.form is None or not short:
        return ""
    return (
        f"{short} of {len(samples)} texts cut by max_gen_len or max_seq_len, before the end that {params.form[0]} asks"
        " for: raise them, or limit what it allows"
    )


class _Stream:
    """Prints the text whose turn it is while it is made, and holds back that of later ones."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._held = [_heading(texts, index) for index in range(len(texts))]
        self._turn = 0

    def add(self, index: int, text: str) -> None:
        self._held[index] += text
        if index == self._turn:
            self._write()

    def end(self, rest: str) -> None:
        """The text of this turn has ended, but for `rest`: on with the next."""
        self.add(self._turn, rest)
        self._turn += 1
        if self._turn < len(self._held):
            self._write()

    def _write(self) -> None:
        print(harmless(self._held[self._turn]), end="", flush=True)
        self._held[self._turn] = ""


def _heading(texts: Sequence[str], index: int) -> str:
    """The line that tells several completions apart, as head(1) does with several files."""
    if len(texts) == 1:
        return ""
    first = " ".join(texts[index].split())
    shown = harmless(first[:_HEADING]) + ("…" if len(first) > _HEADING else "")
    return ("\n" if index else "") + f"==> {shown} <==\n"


def _whole(result: "CompletionPrediction", as_tokens: bool) -> str:
    if as_tokens:
        from llama.cli.token_view import coloured

        return coloured(result, colour=has_colour()) + "\n"
    text = result["generation"] + _after_first(result)
    return harmless(text) if sys.stdout.isatty() else text


def _after_first(result: "CompletionPrediction") -> str:
    """What follows the text of the first sample: the end of its line, and the others."""
    others = samples_of(result)[1:]
    return "\n" + "".join(f"--- sample {number}\n{sample['generation']}\n" for number, sample in enumerate(others, 2))
