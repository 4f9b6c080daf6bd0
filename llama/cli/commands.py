"""The `llama` command: parse, call, print, exit code."""

import functools
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama import log
from llama.checkpoint.find import DEMO, find_folder
from llama.cli import prompt_cache as prompt_caches
from llama.cli.arguments import Command, with_flags
from llama.cli.build import build, import_libraries
from llama.cli.flags import (
    BENCH_MODEL,
    GAP,
    MODEL,
    ONE_PROCESS_MODEL,
    PLACEMENT,
    SAMPLING,
    SCORING_MODEL,
    SERVICE,
    sampling_params,
)
from llama.cli.output import cut, show_completions, statistics
from llama.cli.prompts import text_with_gap, texts
from llama.cli.shell import run
from llama.errors import LlamaError, ParameterError
from llama.gate import json_line, one_line, show, to_stderr
from llama.infilling import Infilling
from llama.log import is_first
from llama.paths import FilePath, check_writable

if TYPE_CHECKING:
    from llama.generation import Llama

AT_ONCE = 8  # sequences held at once where --max_batch_size is left out: at most so many
BATCH_AT_ONCE = 16  # the same for files of prompts
HTML_ALTERNATIVES = 5  # what --html shows where --top_logprobs does not say


# ------------------------------------------------------------------------------------------------------- the commands


def _once(command: Command) -> Command:
    """Have a command run by the first process alone: torchrun's others have no part in it."""

    @functools.wraps(command)
    def call(*positional: Any, **named: Any) -> None:
        if is_first():
            command(*positional, **named)

    return call


@with_flags(gap=GAP, model=MODEL, sampling=SAMPLING)
def complete(
    *prompts: str, prompt: Sequence[str] = (), json: bool = False, html: FilePath | None = None,
    show_prompt: bool = False, prompt_cache: FilePath | None = None, gap: dict[str, Any],
    model: dict[str, Any], sampling: dict[str, Any],
) -> None:  # fmt: skip
    """Complete texts, or fill the gap in one.

    A text is taken as it is typed, whatever it looks like. In a terminal its completion appears while it is made.
    Code Llama 7B and 13B can fill a gap too, between --prefix and --suffix or where a file has <FILL_ME>.

    Args:
        prompts: the texts to complete; - is the standard input as one text.
        prompt: one more text, which may begin with -, as in --prompt=-x; may be given several times.
        json: print one JSON object per text.
        html: the file for a page in which hovering a token shows its alternatives.
        show_prompt: show the exact prompt and its tokens, on stderr.
        prompt_cache: the file that keeps what was computed of the prompt's beginning; made where there is none.
    """
    params = sampling_params(sampling)
    prompt_caches.check(prompt_cache, params)
    as_tokens = params.logprobs or params.top_logprobs > 0
    if html is not None:
        check_writable(html)
        params = replace(params, top_logprobs=params.top_logprobs or HTML_ALTERNATIVES)
    params = replace(params, logprobs=params.logprobs or params.top_logprobs > 0)
    asked = _asked(prompts, prompt, text_with_gap(**gap))
    llama = build(model, max(min(len(asked) * params.n, AT_ONCE), params.num_beams))
    from llama import parallel  # as _build has done: not earlier, for it imports torch

    asked = parallel.broadcast(asked, llama.model.device)  # of the first process, which alone reads standard input
    if show_prompt and is_first():
        _show_prompts(llama, asked)
    with prompt_caches.used(prompt_cache, llama, asked):
        results = show_completions(llama, asked, params, as_json=json, as_tokens=as_tokens, speaks=is_first())
    done = [(str(one), r) for one, r in zip(asked, results, strict=True) if not isinstance(r, LlamaError)]
    if html is not None and is_first():
        from llama.cli.token_view import page

        _write(html, page(done))
    if done:
        log.say(statistics([result for _, result in done]))
        if remark := cut([result for _, result in done], params):
            log.say(remark)
    if len(done) < len(asked):
        sys.exit(2)


@with_flags(model=MODEL, sampling=SAMPLING)
def chat(
    *, system: str | None = None, show_prompt: bool = False, prompt_cache: FilePath | None = None,
    model: dict[str, Any], sampling: dict[str, Any],
) -> None:  # fmt: skip
    """Talk with a chat model in the terminal; /help there lists what can be done.

    Args:
        system: the system prompt.
        show_prompt: show the exact prompt of each turn and its tokens, on stderr.
        prompt_cache: the file that keeps what was computed of the talk; written at /save and at the end.
    """
    import_libraries()
    from llama.cli.chat.session import talk
    from llama.cli.chat.terminal import check_terminal

    if is_first():
        check_terminal()
    params = sampling_params(sampling)
    prompt_caches.check(prompt_cache, params)
    llama = build(model, max(params.n, params.num_beams))
    talk(llama, params, system=system, show_prompt=show_prompt, prompt_cache=prompt_cache)


@with_flags(model=MODEL, sampling=SAMPLING)
def batch(
    file: FilePath, *, output: FilePath, format: str | None = None, ordered: bool = False,
    model: dict[str, Any], sampling: dict[str, Any],
) -> None:  # fmt: skip
    """Complete every prompt of a file; killed at any moment, the same command finishes the rest.

    Exit code 0: all were completed; 1: some were not, and their records say why; 2: it could not run.

    Args:
        file: the prompts: a text a line, or JSON lines; - is the standard input.
        output: where results go, one JSON object a line, each written when it is finished; - is the standard output,
            and such a run cannot be gone on with.
        format: text or jsonl; if left out, jsonl for files named .jsonl or .ndjson, else text.
        ordered: sort the results by line at the end; with --output - as they come, a block at a time.
    """
    from llama.batch.input import check_paths
    from llama.batch.lines import choose_format

    kind = choose_format(file, format)
    check_paths(file, output)
    params = sampling_params(sampling)
    llama = build(model, max(BATCH_AT_ONCE, params.num_beams))
    from llama.batch.run import run_batch, stream_batch  # now that torch is there

    if output == "-":
        failed = stream_batch(llama, file, kind, params, ordered=ordered)
    else:
        fresh = model["seed"] is None
        failed = run_batch(llama, file, kind, output, params, fresh_seed=fresh, ordered=ordered)
    if failed and is_first():
        sys.exit(1)


@with_flags(service=SERVICE, model=ONE_PROCESS_MODEL)
def serve(*, service: dict[str, Any], model: dict[str, Any]) -> None:
    """Answer requests over HTTP as OpenAI does, many at once, until Ctrl-C or SIGTERM.

    Args:
    """
    from llama.server.listening import listen, read_key
    from llama.server.options import ServeOptions

    _check_serves()
    options = ServeOptions(**service)
    key = read_key(options.api_key)
    listener = listen(options.host, options.port, key is not None or options.allow_unauthenticated)
    import_libraries()
    from llama.server.run import serve  # now that torch is there

    serve(lambda: build(model, BATCH_AT_ONCE), listener, key, options)


@with_flags(model=SCORING_MODEL)
def score(
    file: FilePath, *, format: str | None = None, whole: bool = False, stride: int | None = None,
    context: int | None = None, json: bool = False, top_logprobs: int = 0, model: dict[str, Any],
) -> None:  # fmt: skip
    """Print the perplexity of every text of a file, without generating.

    With --stride, --context or --whole texts may be of any length: they are read in windows that overlap, and each
    token is scored once. Exit code 1: some texts could not be scored.

    Args:
        file: a text a line, or JSON lines with strings or {"text": …}; - is the standard input.
        format: text or jsonl; if left out, jsonl for files named .jsonl or .ndjson, else text.
        whole: take the file as one text.
        stride: how many tokens a window begins behind the one before it; half a window if left out.
        context: how many tokens a window has; max_seq_len if left out.
        json: print one JSON object per text, with the log-probability of each token.
        top_logprobs: with --json, show so many of the most probable tokens at each place.
    """
    from llama.batch.lines import choose_format
    from llama.cli.score import Total, heading, opened, row, scores
    from llama.windows import Windows

    if top_logprobs and not json:
        raise ParameterError(f"top_logprobs={top_logprobs!r} is shown in JSON alone: add --json")
    if whole and format is not None:
        raise ParameterError(f"format={format!r} with --whole, which takes a file as one text: leave one of them out")
    kind = "text" if whole else choose_format(file, format)
    windows = Windows.of(stride, context, model["max_seq_len"], always=whole)
    lines = opened(file, whole) if is_first() else iter(())
    llama = build(model, AT_ONCE)
    total = Total()
    if is_first() and not json:
        show(heading())
    for result in scores(llama, lines, kind, top_logprobs, windows):
        total.add(result)
        if is_first():
            print(json_line(result) if json else row(result), flush=True)
    log.say(total.line())
    if total.failed:
        sys.exit(1)


@with_flags(model=BENCH_MODEL)
def bench(
    *, seconds: float = 120.0, json: bool = False, markdown: bool = False, compare: FilePath | None = None,
    model: dict[str, Any],
) -> None:  # fmt: skip
    """Measure how fast a model runs on this machine, beside what the machine can do.

    Args:
        seconds: end within this time, counted from the start of loading; what it did not suffice for is said.
        json: print one JSON object.
        markdown: print the table in Markdown.
        compare: the file of an earlier run's --json: show this run's figures over its.
    """
    number = isinstance(seconds, int | float) and not isinstance(seconds, bool)
    if not number or not 0 < seconds <= 86400:
        raise ParameterError(f"seconds={seconds!r} is out of range: expected a number above 0, up to 86400")
    if json and (markdown or compare is not None):
        raise ParameterError("--json prints this run's record alone: leave out --markdown and --compare")
    from llama.bench import report

    before = None if compare is None else report.earlier(compare)
    import_libraries()
    from llama.bench.run import bench as measure

    found = measure(model, seconds)
    if is_first():
        show(json_line(found) if json else report.text(found, before, markdown=markdown))


@with_flags(placement=PLACEMENT)
@_once
def info(
    ckpt_dir: FilePath | None = None, *, max_seq_len: int = 2048, max_batch_size: int = AT_ONCE, json: bool = False,
    placement: dict[str, Any],
) -> None:  # fmt: skip
    """Describe a checkpoint, and what of it fits on this machine, without loading its weights.

    With --max_memory or --device_map it shows which device would have which layers, and whether they fit.

    Args:
        ckpt_dir: the checkpoint folder; else LLAMA_CKPT_DIR, else the bundled demo.
        max_seq_len: the most tokens of one sequence, for the size of the KV cache.
        max_batch_size: how many sequences are held at once, for the size of the KV cache.
        json: print one JSON object.
    """
    import_libraries()
    from llama.checkpoint import info

    found = info.describe(find_folder(ckpt_dir), max_seq_len, max_batch_size, **placement)
    print(json_line(found) if json else info.text(found))


@with_flags()
@_once
def verify(ckpt_dir: FilePath | None = None) -> None:
    """Compare a checkpoint's files with the sums that came with them, and with what they say of each other.

    Args:
        ckpt_dir: the checkpoint folder; else LLAMA_CKPT_DIR, else the bundled demo.
    """
    from llama.checkpoint.verify import verify

    folder = find_folder(ckpt_dir)
    print(one_line(f"{folder}: {verify(folder)}"))


@with_flags()
@_once
def reshard(ckpt_dir: FilePath, out: FilePath, *, model_parallel_size: int) -> None:
    """Write a checkpoint anew for another number of processes, with a fresh checklist.chk.

    Not needed to run it (any number of shards loads on any number of processes), but faster to load from slow disks.

    Args:
        ckpt_dir: the checkpoint folder.
        out: the folder to write, new or empty.
        model_parallel_size: how many shards to write.
    """
    import_libraries()
    from llama.checkpoint.writer import reshard

    written = reshard(Path(ckpt_dir), Path(out), model_parallel_size)
    print(one_line(f"{out}: {len(written)} shards written"))


@with_flags()
@_once
def quantize(ckpt_dir: FilePath, out: FilePath, *, quantize: str) -> None:
    """Write a checkpoint anew with the matrices of its layers in int8 or int4, with a fresh checklist.chk.

    It is a half or a quarter of the size, loads as it is, and runs like any other checkpoint.

    Args:
        ckpt_dir: the checkpoint folder.
        out: the folder to write, new or empty.
        quantize: int8 or int4.
    """
    import_libraries()
    from llama.checkpoint import writer

    written = writer.quantize(Path(ckpt_dir), Path(out), quantize)
    print(one_line(f"{out}: {len(written)} shard{'s' if len(written) > 1 else ''} written in {quantize}"))


@with_flags()
@_once
def convert(source: FilePath, out: FilePath, *, to: str) -> None:
    """Write a checkpoint of any format anew in another: Meta's layout, a Hugging Face folder, or a GGUF file.

    Numbers stay as they are; int8 and int4 become GGUF's q8_0 and q4_0.

    Args:
        source: the checkpoint: a folder, or a .gguf file.
        out: the folder to write, new or empty; or the .gguf file.
        to: meta, hf or gguf.
    """
    import_libraries()
    from llama.checkpoint.convert import convert

    written = convert(Path(source), Path(out), to)
    print(one_line(f"{out}: {len(written)} file{'s' if len(written) > 1 else ''} written"))


@with_flags()
def demo() -> None:
    """Show what the bundled demo checkpoint can do: a story, an answer, and what to try next.

    Args:
    """
    from llama.cli.demo_scenes import scenes

    for scene in scenes(build({"ckpt_dir": str(DEMO), "max_seq_len": 512}, AT_ONCE)):
        if is_first():
            show(f"{scene}\n")


_ALL = (complete, chat, batch, serve, score, bench, info, verify, reshard, quantize, convert, demo)
COMMANDS = {command.__name__: command for command in _ALL}


def main() -> None:
    """The `llama` command."""
    run(COMMANDS)


# ------------------------------------------------------------------------------------------------------ what they share


def _asked(prompts: Sequence[str], more: Sequence[str], infilling: Infilling | None) -> Sequence[str | Infilling]:
    if infilling is None:
        return texts(prompts, more)
    if prompts or more:
        raise ParameterError("a text with a gap is filled in by itself: leave out the other prompts")
    return [infilling]


def _check_serves() -> None:
    """Raise ParameterError where a package is missing, or several processes were started."""
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ModuleNotFoundError as error:
        raise ParameterError(f'llama serve needs {error.name}: pip install "llama-runner[serve]"') from None
    if (processes := int(os.environ.get("WORLD_SIZE", 1))) > 1:
        raise ParameterError(f"{processes} processes were started, but llama serve is one: start it without torchrun")


def _write(path: str, text: str) -> None:
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ParameterError(f"{path} cannot be written: {error.strerror}") from None


def _show_prompts(llama: "Llama", asked: Sequence[str | Infilling]) -> None:
    for one in asked:
        tokens = llama.prompt_tokens(one)
        to_stderr(f"llama: prompt {str(one)!r}, {len(tokens)} tokens: {tokens}")
