"""`llama serve` beside llama-cpp-python's server, on the same model and the same load: one command.

python serve.py
python serve.py --streams 1,16 --new 32
python serve.py --requests 0               # without the long run on the demo

Each stream asks one request after another for a greedy completion of so many tokens after a prompt of its own, as
events; the load is the same for both, and runs in this process. Throughput is all tokens over the time from the first
request to the last event; the time to the first token is from the request to the first event with text. Then 200
streams ask the demo checkpoint for 5,000 short completions: each must get the text of its own prompt, and the memory of
the service is taken after the first 500 and after the last. `pip install "llama-cpp-python[server]"` brings the peer.
"""

import asyncio
import importlib.util
import json
import os
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fire
import psutil
from gguf_files import make_gguf
from models import make_checkpoint
from report import header, table

from llama.checkpoint.find import DEMO

ROOT = Path(__file__).parent.parent
GOAL, GOAL_STREAMS = 2.0, 16  # times the peer's throughput, at so many streams
CONCURRENT, WARM = 200, 500  # streams of the long run, and requests before memory is taken
WORDS = ("red", "dog", "kite", "ran", "home", "two", "big", "sun", "was", "blue", "tree", "saw", "old", "cat", "boat")


@dataclass
class Answer:
    """What one request got, on the clock of `time.perf_counter`."""

    begun: float
    first: float
    ended: float
    text: str


async def ask(port: int, body: dict[str, Any]) -> Answer:
    """The answer to one request for events."""
    data = json.dumps({**body, "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
    begun, first, texts = time.perf_counter(), 0.0, []
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"{head}Connection: close\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)
    done = False
    while line := await reader.readline():
        if line.startswith(b"data: [DONE]"):
            done = True
        elif line.startswith(b"data: "):
            choices = json.loads(line[6:])["choices"]
            if choices and choices[0]["text"]:
                first = first or time.perf_counter()
                texts.append(choices[0]["text"])
    writer.close()
    if not done:
        raise RuntimeError("a stream ended without [DONE]")
    return Answer(begun, first, time.perf_counter(), "".join(texts))


async def load(port: int, streams: int, each: int, body: Callable[[int], dict[str, Any]]) -> list[Answer]:
    """So many streams at once, each of so many requests; `body` makes the one of a number."""

    async def stream(number: int) -> list[Answer]:
        return [await ask(port, body(number * each + count)) for count in range(each)]

    return [answer for own in await asyncio.gather(*map(stream, range(streams))) for answer in own]


def prompt(number: int) -> str:
    """A prompt of 48 words, whose beginning no other shares."""
    return " ".join(WORDS[(number * 7 + place * (number % 5 + 1)) % len(WORDS)] for place in range(48)) + f" {number}"


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


@contextmanager
def running(words: list[str], port: int) -> Iterator["subprocess.Popen[bytes]"]:
    """A server in a process of its own, once it answers."""
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    process = subprocess.Popen(
        [sys.executable, "-m", *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=env
    )
    try:
        until = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=5).close()
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > until:
                    raise RuntimeError(f"{' '.join(words)} does not answer") from None
                time.sleep(0.1)
        yield process
    finally:
        process.terminate()
        process.wait(30)


def measured(runner: str, folder: Path, streams: list[int], each: int, new: int) -> dict[int, list[Answer]]:
    """The answers at each number of streams."""
    port = free_port()
    if runner == "llama serve":
        words = ["llama", "serve", "--ckpt_dir", str(folder), "--max_seq_len", "512", "--device", "cpu"]
        words += ["--port", str(port)]
    else:
        threads = str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
        words = ["llama_cpp.server", "--model", str(make_gguf(folder, "bf16")), "--n_ctx", "512", "--port", str(port),
                 "--n_threads", threads, "--n_threads_batch", threads, "--interrupt_requests", "False",
                 "--verbose", "False"]  # fmt: skip

    def body(number: int) -> dict[str, Any]:
        # Without its end token a text has all the tokens that are asked for.
        return {"prompt": prompt(number), "max_tokens": new, "temperature": 0, "logit_bias": {"2": -100}}

    found, asked = {}, 1
    with running(words, port):
        asyncio.run(load(port, 2, 1, body))
        for count in streams:
            first = asked = asked + 1000  # no prompt twice
            found[count] = asyncio.run(load(port, count, each, lambda number, first=first: body(first + number)))
    return found


def throughput(answers: list[Answer], new: int) -> float:
    seconds = max(answer.ended for answer in answers) - min(answer.begun for answer in answers)
    return len(answers) * new / seconds


def first_token(answers: list[Answer]) -> float:
    return statistics.median(answer.first - answer.begun for answer in answers)


def percentiles(values: list[float]) -> list[str]:
    """The median, and what 90, 99 and 100 of 100 do not exceed, in milliseconds."""
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return [f"{1000 * value:.0f}" for value in (cuts[49], cuts[89], cuts[98], max(values))]


def compare(folder: Path, streams: list[int], each: int, new: int) -> None:
    """Print throughput and latency of both servers."""
    runners = ["llama serve"]
    if importlib.util.find_spec("llama_cpp") and importlib.util.find_spec("sse_starlette"):
        runners.append("llama_cpp.server")
    found = {runner: measured(runner, folder, streams, each, new) for runner in runners}
    rows = []
    for count in streams:
        row = [str(count), *(f"{throughput(found[runner][count], new):.1f}" for runner in runners)]
        if len(runners) > 1:
            ratio = throughput(found[runners[0]][count], new) / throughput(found[runners[1]][count], new)
            goal = f"{'met' if ratio >= GOAL else 'missed'}: ≥ {GOAL:g}" if count == GOAL_STREAMS else ""
            row += [f"{ratio:.2f}", goal]
        rows.append(row)
    heads = ["streams", *(f"{runner} (tokens/s)" for runner in runners), "ratio", "goal"][: len(rows[0])]
    print(table(heads, rows), end="\n\n")
    rows = []
    for runner in runners:
        for count in streams:
            answers = found[runner][count]
            rows.append([runner, str(count), *percentiles([a.first - a.begun for a in answers]),
                         *percentiles([a.ended - a.begun for a in answers])])  # fmt: skip
    names = [f"{what} {share} (ms)" for what in ("first token", "whole") for share in ("p50", "p90", "p99", "max")]
    print(table(["runner", "streams", *names], rows), end="\n\n")
    if len(runners) > 1 and 1 in streams:
        ours, theirs = (first_token(found[runner][1]) for runner in runners)
        verdict = "met" if ours <= theirs else "missed"
        print(f"first token at one stream: {1000 * ours:.1f} ms, theirs {1000 * theirs:.1f} ms; goal (≤): {verdict}\n")


def long_run(requests: int) -> None:
    """Print what became of many short requests to the demo checkpoint, and of the memory of the service."""
    port, kinds = free_port(), 50

    def body(number: int) -> dict[str, Any]:
        return {"prompt": f"Tom has {number % kinds} dogs.", "temperature": 0, "max_tokens": 8}

    words = ["llama", "serve", "--ckpt_dir", str(DEMO), "--dtype", "float32", "--device", "cpu", "--max_seq_len", "256"]
    with running([*words, "--port", str(port)], port) as process:
        expected = [answer.text for answer in asyncio.run(load(port, 1, kinds, body))]
        asyncio.run(load(port, CONCURRENT, max(1, WARM // CONCURRENT), body))
        before = psutil.Process(process.pid).memory_info().rss
        begun = time.perf_counter()
        each = requests // CONCURRENT
        answers = asyncio.run(load(port, CONCURRENT, each, body))
        seconds = time.perf_counter() - begun
        after = psutil.Process(process.pid).memory_info().rss
    wrong = sum(answer.text != expected[number % kinds] for number, answer in enumerate(answers))
    rows = [
        ["requests, of which wrong or mixed up", f"{len(answers)}, {wrong}"],
        ["requests/s", f"{len(answers) / seconds:.0f}"],
        ["whole answers p50, p90, p99, max (ms)", ", ".join(percentiles([a.ended - a.begun for a in answers]))],
        ["memory before and after (MB)", f"{before / 1e6:.1f}, {after / 1e6:.1f}"],
    ]
    print(table([f"{CONCURRENT} streams on the demo", ""], rows))


def main(
    folder: str = "/tmp/llama-benchmarks", shape: str = "134M", streams: tuple[int, ...] | int = (1, 4, 16),
    each: int = 3, new: int = 48, requests: int = 5000,
) -> None:  # fmt: skip
    """Compare both servers at so many streams, each of `each` requests for `new` tokens; then the long run."""
    print(header(), end="\n\n")
    counts = [streams] if isinstance(streams, int) else list(streams)
    print(f"{shape} in bfloat16, {each} requests a stream, {new} new tokens each\n")
    compare(make_checkpoint(Path(folder), shape), counts, each, new)
    if requests:
        long_run(requests)


if __name__ == "__main__":
    fire.Fire(main)
