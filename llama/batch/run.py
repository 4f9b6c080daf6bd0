"""A file of prompts, run to its end: by one process or by replicas, in one go or in several after being killed.

The lines are cut into blocks, which replicas draw from one counter. A block is run as if the engine were new, so its
results do not depend on who runs it or on what ran before: a block that was interrupted is run again whole, in the
same steps, and only the lines that are missing are written. That makes a resumed run equal to an undisturbed one to
the byte, in every dtype. Where results are the same in any batch (see kernels/invariance.py), the lines that are
missing are run alone, and prefixes are kept from block to block.
"""

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama import log, parallel
from llama.batch.identity import check_same, read_identity, write_identity
from llama.batch.input import drop_input_copy, measure, settle_input
from llama.batch.lines import Format, Line, numbered_lines, read_line, repeated_id
from llama.batch.records import error_line, result_line
from llama.batch.replicas import Replicas
from llama.batch.results import LineSet, ResultFile, check_parts, has_parts, join_parts, part, sort_by_line
from llama.chat import Llama2Chat
from llama.checkpoint.checklist import fingerprint
from llama.errors import LlamaError, ParameterError, PeerError
from llama.predictions import completion_tokens
from llama.progress import Progress
from llama.request import SamplingParams

if TYPE_CHECKING:
    from llama.generation import Llama

COUNTS = ("requests", "prompt_tokens", "completion_tokens")  # of all replicas, for the progress
BLOCK = 8  # lines of a block for each sequence that is held at once: at a block's end some slots stay empty


def run_batch(
    llama: "Llama", file: str, file_format: Format, output: str, params: SamplingParams,
    *, fresh_seed: bool = False, ordered: bool = False,
) -> int:  # fmt: skip
    """Complete every line of `file` into `output`; return how many failed (on rank 0; 0 elsewhere).

    Every rank calls this. `fresh_seed`: the seed is new entropy, so a run that was begun keeps its own. Raises
    PromptError or ParameterError where the file cannot be read, the output cannot be written or is of another run.
    """
    out = Path(output)
    replicas = Replicas(llama.model.device)
    first = parallel.rank() == 0
    with contextlib.ExitStack() as files:
        results = files.enter_context(ResultFile(out)) if first else None
        begun = _begin(llama, file, file_format, results, params, fresh_seed) if results else None
        path, seed, total, done, failed = replicas.from_first(begun)
        if results is None and replicas.leads:
            results = files.enter_context(ResultFile(part(out, replicas.index)))
        progress = Progress(total, len(done))
        before = len(done)

        def show() -> None:
            sums = [replicas.add(name, 0) for name in COUNTS]
            progress.show(before + sums[0], *sums[1:])

        try:
            for line, result in _results(llama, replicas, path, file_format, params, seed, done):
                if results:
                    results.append(_record(llama, line, result))
                    _count(replicas, result)
                if first:
                    show()
            if results:
                results.sync()
            for _ in replicas.wait():
                show()
        except KeyboardInterrupt:
            log.say(f"stopped; {output} has what is finished, and the same command again does the rest")
            raise
        except PeerError as error:
            raise PeerError(
                f"{error}; {output} has what is finished, and the same command again does the rest"
            ) from None
        finally:
            progress.close()
        return _end(results, done, replicas, failed, total, ordered) if first and results else 0


def stream_batch(
    llama: "Llama", file: str, file_format: Format, params: SamplingParams, *, ordered: bool = False
) -> int:
    """Complete every line of `file` onto standard output, each when it is finished; return how many failed.

    Every rank calls this. Nothing is kept, so there is nothing to go on with; the records are those of a file.
    `ordered`: those of a block wait for each other. The first rank alone reads the lines, once, a block at a time.
    """
    replicas = Replicas(llama.model.device)
    if replicas.count > 1:
        raise ParameterError(
            f"--output - takes the results of one replica, but {replicas.count} are running: name a file, or leave"
            " model_parallel_size out"
        )
    first = parallel.rank() == 0
    blocks = (list(lines) for _, lines in _blocks(llama, numbered_lines(file) if first else iter(())))
    total = measure(file)[1] if file != "-" and os.path.isfile(file) else None
    progress = Progress(total, 0, hidden=sys.stdout.isatty())
    try:
        while block := replicas.from_first(next(blocks, None)):
            results = _run_block(
                llama, [read_line(number, data, file_format, params, llama.seed) for number, data in block]
            )
            for line, result in sorted(results, key=lambda pair: pair[0].number) if ordered else results:
                if first:
                    sys.stdout.buffer.write(_record(llama, line, result))
                    sys.stdout.buffer.flush()
                    _count(replicas, result)
                    progress.show(*(replicas.add(name, 0) for name in COUNTS))
    finally:
        progress.close()
    failed = replicas.add("failed", 0)
    log.say(f"{replicas.add('requests', 0)} requests on standard output{_failed(failed)}")
    return failed


def _begin(
    llama: "Llama",
    file: str,
    file_format: Format,
    results: ResultFile,
    params: SamplingParams,
    fresh_seed: bool,
) -> tuple[str, int, int, LineSet, int]:
    """(Path of the lines, seed, number of requests, those done before, how many of them failed), after all checks."""
    out, done = results.path, LineSet()
    before = read_identity(out)
    if before is None and out.stat().st_size:
        raise ParameterError(f"{out} exists and is not a run of this command: remove it, or name another --output")
    failed = results.scan(done)
    check_parts(out)
    path = settle_input(file, out)
    digest, total = measure(path)
    identity = _identity(llama, params) | {"input": {"sha256": digest, "format": file_format}}
    if fresh_seed and before:
        identity["settings"]["seed"] = before.get("settings", {}).get("seed")
    begun = out.stat().st_size > 0 or has_parts(out)
    if before and begun:
        check_same(out, before, identity)
    else:
        write_identity(out, identity)
    results.cut_torn_end()
    failed += join_parts(results, done)
    if file_format == "jsonl" and (repeated := repeated_id(path)):
        log.say(f"{file}: {repeated}")
    if done:
        log.say(f"{out} has {len(done)} of {total} requests already")
    return path, identity["settings"]["seed"], total, done, failed


def _identity(llama: "Llama", params: SamplingParams) -> dict[str, Any]:
    """All that decides the bytes of a result, beside the input."""
    model, engine = llama.model, llama.engine
    settings = {
        "seed": llama.seed,
        "dtype": str(model.dtype).removeprefix("torch."),
        "quantize": model.weight_format,
        "device": model.device.type,
        "max_seq_len": engine.max_seq_len,
        "max_batch_size": engine.scheduler.slots,
        "max_step_tokens": engine.scheduler.max_step_tokens,
        "model_parallel_size": parallel.model_parallel_size(),
    }
    if engine.speculation:  # results are the same without
        settings |= {"speculate": engine.speculation.name, "draft_tokens": engine.speculation.most}
    if llama.chat.identity != Llama2Chat.identity:  # which old runs do not name
        settings["chat"] = llama.chat.identity
    identity = {"model": _model(llama), "parameters": asdict(params), "settings": settings}
    as_read_back: dict[str, Any] = json.loads(json.dumps(identity))
    return as_read_back


def _model(llama: "Llama") -> str:
    return fingerprint([*llama.files, llama.tokenizer.model_path])


def _results(
    llama: "Llama", replicas: Replicas, path: str, file_format: Format, params: SamplingParams, seed: int, done: LineSet
) -> Iterator[tuple[Line, Any]]:
    """(Line, its prediction or error) for the lines of this replica that are not done, as they finish."""
    mine = replicas.draw("block")
    for block, numbered in _blocks(llama, numbered_lines(path)):
        while mine < block:  # blocks of blank lines
            mine = replicas.draw("block")
        if mine == block:
            needed = (pair for pair in numbered if not (llama.model.batch_invariant and pair[0] in done))
            lines = [read_line(number, data, file_format, params, seed) for number, data in needed]
            if any(line.number not in done for line in lines):
                yield from ((line, r) for line, r in _run_block(llama, lines) if line.number not in done)
            mine = replicas.draw("block")


def _blocks(llama: "Llama", numbered: Iterator[tuple[int, bytes]]) -> Iterator[tuple[int, Iterator[tuple[int, bytes]]]]:
    """(Number of a block, its lines), for each block that has lines."""
    size = BLOCK * llama.engine.scheduler.slots
    return groupby(numbered, key=lambda pair: (pair[0] - 1) // size)


def _record(llama: "Llama", line: Line, result: Any) -> bytes:
    """The line of the output for what came of one of the input: an error where it was none that could be run."""
    return error_line(line) if result is None else result_line(line, result, llama.tokenizer)


def _run_block(llama: "Llama", lines: list[Line]) -> Iterator[tuple[Line, Any]]:
    good = [(line, line.params) for line in lines if line.error is None and line.params]
    for line in lines:
        if line.error is not None:
            yield line, None
    if not llama.model.batch_invariant:
        llama.turns.do(llama.engine.clear_prefix_cache)
    for index, result in llama.run_each([line.prompt for line, _ in good], [params for _, params in good]):
        yield good[index][0], result


def _count(replicas: Replicas, result: Any) -> None:
    replicas.add("requests", 1)
    if result is None or isinstance(result, LlamaError):
        replicas.add("failed", 1)
        return
    replicas.add("prompt_tokens", result["prompt_tokens"])
    replicas.add("completion_tokens", completion_tokens(result))


def _end(results: ResultFile, done: LineSet, replicas: Replicas, failed: int, total: int, ordered: bool) -> int:
    """Join what the replicas wrote, sort it if asked, and say what came of it."""
    failed += replicas.add("failed", 0)
    results.scan(done)
    join_parts(results, done)
    if ordered:
        sort_by_line(results.path)
    drop_input_copy(results.path)
    log.say(f"{len(done)} of {total} requests in {results.path}{_failed(failed)}")
    return failed


def _failed(count: int) -> str:
    return f", {count} failed: see their records" if count else ""
