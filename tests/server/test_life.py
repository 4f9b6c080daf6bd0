"""How the service lives: its queue, clients that leave, steps that fail, its end; and what keeps it from starting."""

import asyncio
import json
import queue
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import code_llama
import psutil
import pytest
import torch
from checkpoints import save
from conftest import DEMO
from services import Service, command, environment, events, httpx, service

from llama import Llama, SamplingParams
from llama.server import service as server
from llama.server.app import make_app
from llama.server.limits import Limits
from llama.server.worker import Worker

LONG = {"prompt": "Once upon a time", "temperature": 1, "min_gen_len": 1500, "max_tokens": 1500, "stream": True}


@pytest.fixture
def small() -> Iterator[Service]:
    """A service of two slots, with a queue of one."""
    with service("--max_batch_size", "2", "--max_queue", "1", "--drain_seconds", "20") as running:
        yield running


def test_who_finds_the_queue_full_and_who_leaves(small: Service) -> None:
    """The fourth is told to come later; who goes away makes room at once, whether it runs or waits."""
    with httpx.Client(base_url=small.url, timeout=60) as client:
        streams = [client.stream("POST", "/v1/completions", json=LONG) for _ in range(2)]
        parts = [stream.__enter__().iter_bytes() for stream in streams]  # kept: what is dropped is closed
        assert [next(own)[:6] for own in parts] == [b"data: "] * 2
        data = json.dumps({"prompt": "Mia"})
        with socket.create_connection(("127.0.0.1", small.port)) as leaving:
            head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
            leaving.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n{data}".encode())
            small.wait_for("requests_waiting", 1)
        small.wait_for("requests_waiting", 0)
        waiting = threading.Thread(target=lambda: small.complete("Mia"))
        waiting.start()
        small.wait_for("requests_waiting", 1)
        answer = small.post("completions", {"prompt": "a"})
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
        assert answer.json()["error"]["code"] == "queue_full"
        before = small.metric("completion_tokens_total")
        begun = time.monotonic()
        for stream in streams:
            stream.__exit__(None, None, None)
        small.wait_for("requests_running", 0, seconds=10)
        took = time.monotonic() - begun
    waiting.join(30)
    assert not waiting.is_alive()
    made = small.metric("completion_tokens_total") - before
    assert made < 1500, f"they went on for {made} tokens in {took} s"


def read_all(url: str, body: dict[str, Any], got: "queue.Queue[str]") -> None:
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as response:
        got.put("begun")
        got.put("".join(response.iter_text()))


def test_a_signal_lets_finish_what_runs_and_refuses_what_is_new(small: Service) -> None:
    got: queue.Queue[str] = queue.Queue()
    body = {**LONG, "max_tokens": 600, "min_gen_len": 600}
    reader = threading.Thread(target=read_all, args=(small.url, body, got))
    reader.start()
    assert got.get(timeout=30) == "begun"
    small.process.send_signal(signal.SIGTERM)
    refused = small.post("completions", {"prompt": "a"})
    assert refused.status_code == 503 and "the service is ending" in refused.text
    assert small.http.get("/health").status_code == 503
    text = got.get(timeout=60)
    assert text.endswith('"finish_reason": "length"}]}\n\ndata: [DONE]\n\n')
    assert small.process.wait(20) == 0
    assert "ending: nothing new is taken, and 1 running samples have 20" in small.log.read_text()


def test_a_second_signal_ends_it_at_once(small: Service) -> None:
    with httpx.stream("POST", f"{small.url}/v1/completions", json=LONG, timeout=60) as response:
        parts = response.iter_bytes()  # kept: what is dropped is closed
        assert next(parts)
        small.process.send_signal(signal.SIGINT)
        while small.http.get("/health").status_code != 503:
            time.sleep(0.01)
        assert small.process.poll() is None
        small.process.send_signal(signal.SIGINT)
        assert small.process.wait(10) == 0
    assert "Traceback" not in small.log.read_text()


def test_what_does_not_finish_in_time_is_told_so() -> None:
    with service("--drain_seconds", "0") as running:
        got: queue.Queue[str] = queue.Queue()
        reader = threading.Thread(target=read_all, args=(running.url, LONG, got))
        reader.start()
        assert got.get(timeout=30) == "begun"
        assert running.end() == 0
        assert "the service has ended before the answer was complete" in got.get(timeout=30)


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service of the demo in float32, in which the token with which "zzz" ends has an embedding of no numbers."""
    weights = torch.load(DEMO / "consolidated.00.pth", weights_only=True)
    folder = tmp_path_factory.mktemp("damaged")
    shutil.copy(DEMO / "tokenizer.model", folder)
    embeddings = weights["tok_embeddings.weight"]
    params = json.loads((DEMO / "params.json").read_text())
    save(folder, params, {name: tensor.float() for name, tensor in weights.items()})
    llama = Llama.build(str(folder), None, 64, 1, device="cpu")
    last = llama.prompt_tokens("zzz")[-1]
    embeddings[last] = torch.nan
    save(folder, params, {name: tensor.float() for name, tensor in weights.items()})
    with service("--ckpt_dir", str(folder), "--max_seq_len", "128") as running:
        yield running


def test_a_request_whose_logits_fail_fails_alone(damaged: Service) -> None:
    with ThreadPoolExecutor(9) as threads:
        prompts = ["zzz" if number % 3 == 0 else f"Mia had {number} dogs." for number in range(9)]
        bodies = [{"prompt": prompt, "max_tokens": 20, "temperature": 0} for prompt in prompts]
        answers = list(threads.map(lambda body: damaged.post("completions", body), bodies))
        assert [answer.status_code for answer in answers] == [500, 200, 200] * 3
        assert "NaN or infinite logits" in answers[0].json()["error"]["message"]
        assert answers[0].json()["error"]["type"] == "server_error"
        assert all(answer.json()["choices"][0]["text"] for answer in answers if answer.status_code == 200)


@pytest.fixture
def worker(demo: Llama) -> Iterator[tuple[Worker, "queue.Queue[Any]"]]:
    """The engine's thread, and what it tells of outputs."""
    worker, told = Worker(lambda: demo), queue.Queue[Any]()
    assert worker.built.result() is demo
    loop: Any = SimpleNamespace(call_soon_threadsafe=lambda deliver, news: deliver(news))
    worker.attach(loop, lambda news: [told.put(one) for one in news])
    yield worker, told
    worker.close(10)
    assert not worker.ended.exception() and demo.engine.idle


def test_who_leaves_gets_no_further_step(demo: Llama, worker: tuple[Worker, "queue.Queue[Any]"]) -> None:
    """Nor does one who leaves the queue get any."""
    asked, told = worker
    params = SamplingParams(temperature=1, max_gen_len=400, min_gen_len=400)
    jobs = [demo.job("Once upon a time", params) for _ in range(12)]  # for eight slots
    outputs = [job.samples[0] for job in jobs]
    asked.add(outputs, texts=True)
    told.get(timeout=30)
    made: list[int] = []
    asked._posted.put(lambda _: made.extend(len(output.request.tokens) for output in outputs))
    asked.cancel(outputs)
    for output in outputs:
        while told.get(timeout=30) != (output, True):
            pass
    assert made == [len(output.request.tokens) for output in outputs]
    assert 0 < made[0] < 400 and made[-1] == 0
    assert {output.request.finish_reason for output in outputs} == {"cancelled"}


def test_one_beam_search_runs_alone(demo: Llama, worker: tuple[Worker, "queue.Queue[Any]"]) -> None:
    asked, told = worker
    running: list[int] = []
    outputs = [demo.job("Mia", SamplingParams(num_beams=4, max_gen_len=8)).samples[0] for _ in range(3)]
    step = demo.engine.step

    def watched() -> Any:
        made = step()
        running.append(demo.engine.running)
        return made

    demo.engine.step = watched  # type: ignore[method-assign]
    try:
        asked.add(outputs, texts=False)
        for _ in outputs:
            told.get(timeout=30)
    finally:
        del demo.engine.step
    assert set(running) == {0, 1}


def test_what_begins_alike_is_read_once(demo: Llama, worker: tuple[Worker, "queue.Queue[Any]"]) -> None:
    asked, told = worker
    beginning, params = "Tom had a big red kite, and he ran up the hill with it. " * 5, SamplingParams(max_gen_len=1)
    jobs = [demo.job(f"{beginning}{name}", params) for name in ("Mia", "Ben", "Tom", "Sue")]
    before = demo.engine.computed_tokens
    asked.add([job.samples[0] for job in jobs], texts=False)
    for _ in jobs:
        told.get(timeout=30)
    length = len(jobs[0].samples[0].request.prompt)
    assert length <= demo.engine.computed_tokens - before < length + 30


def test_a_step_that_fails_ends_what_ran_and_nothing_else(
    demo: Llama, worker: tuple[Worker, "queue.Queue[Any]"]
) -> None:
    """Out of memory, say: nobody knows whose fault it was. What is asked afterwards is answered."""
    asked, told = worker
    step, failures = demo.engine.step, iter([True])

    def failing() -> Any:
        if next(failures, False):
            raise RuntimeError("out of memory")
        return step()

    demo.engine.step = failing  # type: ignore[method-assign]
    try:
        for fails in (True, False):
            job = demo.job("Once upon a time", SamplingParams(temperature=0, max_gen_len=4, n=2))
            asked.add(job.samples, texts=False)
            assert {told.get(timeout=30) for _ in range(2)} == {(sample, True) for sample in job.samples}
            assert (job.error is not None) is fails
    finally:
        del demo.engine.step


# The first step takes a second and a half. The third one fails, and what runs cannot be ended either.
BROKEN = """
import time
from llama.engine.engine import Engine
def broken(self, *_):
    raise RuntimeError("the device is lost")
def slow(self):
    step(self)
    time.sleep(1.5)
step, left = Engine.step, iter((slow, Engine.step))
Engine.step = lambda self: next(left, broken)(self)
Engine.finish = broken
"""


def test_an_engine_that_cannot_go_on_ends_the_service() -> None:
    """What ran and what waited is answered with an error; the exit code says that it was none of the signals.

    While a step is taken the service answers what needs none.
    """
    with service("--max_batch_size", "1", first=BROKEN) as running, ThreadPoolExecutor(3) as threads:
        answers = threads.map(lambda _: running.post("completions", {"prompt": "Mia", "min_gen_len": 9}), range(3))
        running.wait_for("requests_waiting", 2)
        begun = time.monotonic()
        assert running.http.get("/health").status_code == 200
        assert time.monotonic() - begun < 0.7
        for answer in answers:
            assert answer.status_code in (500, 503), answer.text
        assert running.process.wait(20) == 2
        said = "llama: the engine cannot go on (RuntimeError: the device is lost)"
        assert running.log.read_text().splitlines()[-1].startswith(said)


def test_a_gap_is_filled(tmp_path: Path) -> None:
    """Through the application itself: this model knows infilling, the demo does not."""
    folder = code_llama.checkpoint(tmp_path / "code", code_llama.INFILLING)
    llama = Llama.build(str(folder), None, 64, 2, device="cpu")
    expected = llama.infill(["a b"], ["c"], temperature=0, max_gen_len=8)[0]["generation"]

    async def ask(body: dict[str, Any]) -> list[Any]:
        worker = Worker(lambda: llama)
        app = make_app(server.Service(llama, worker, "code", Limits(64, 64, 4)), None, "127.0.0.1")
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1") as client:
            whole = await client.post("/v1/completions", json=body)
            stream = await client.post("/v1/completions", json={**body, "stream": True})
        worker.close(10)
        return [whole.json()["choices"][0]["text"], "".join(e["choices"][0]["text"] for e in events(stream.text))]

    body = {"prompt": "a b", "suffix": "c", "temperature": 0, "max_tokens": 8}
    assert asyncio.run(ask(body)) == [expected, expected]


async def streamed(port: int, body: dict[str, Any], turn: asyncio.Semaphore) -> str:
    """The text of one stream, whose events belong together."""
    async with turn:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        data = json.dumps({**body, "stream": True}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {len(data)}"
        writer.write(head.encode() + b"\r\n\r\n" + data)
        answer = (await reader.read()).decode()
        writer.close()
    *parts, done = [line.removeprefix("data: ") for line in answer.splitlines() if line.startswith("data: ")]
    assert done == "[DONE]" and len({json.loads(part)["id"] for part in parts}) == 1
    return "".join(json.loads(part)["choices"][0]["text"] for part in parts)


def test_a_load_of_many_streams(damaged: Service) -> None:
    """200 at once, and some hundreds after one another: each gets its own text, and memory stays."""
    process = psutil.Process(damaged.process.pid)

    async def ask(count: int, at_once: int) -> list[str]:
        turn = asyncio.Semaphore(at_once)
        bodies = [{"prompt": f"Tom has {n % 25} dogs.", "temperature": 0, "max_tokens": 8} for n in range(count)]
        return await asyncio.gather(*(streamed(damaged.port, body, turn) for body in bodies))

    expected = asyncio.run(ask(25, at_once=1))
    assert len(set(expected)) > 5
    assert asyncio.run(ask(200, at_once=200)) == expected * 8
    before = process.memory_info().rss
    assert asyncio.run(ask(400, at_once=200)) == expected * 16
    grown = process.memory_info().rss - before
    assert grown < 20e6, f"memory grew by {grown / 1e6:.1f} MB"
    assert damaged.metric("requests_running") == damaged.metric("requests_waiting") == 0


def started(*flags: str, **env: str) -> tuple[int, str]:
    done = subprocess.run(command(*flags), capture_output=True, text=True, timeout=120, env=environment(**env))
    return done.returncode, done.stderr


@pytest.mark.parametrize(("flags", "env", "said"), [
    (["--host", "0.0.0.0"], {}, "can be reached from other machines, and there is no API key: set LLAMA_API_KEY"),
    (["--api_key", "a b"], {}, "--api_key is no key"), (["--api_key", ""], {}, "--api_key is no key"),
    ([], {"LLAMA_API_KEY": "schlüssel"}, "LLAMA_API_KEY is no key"), (["--port", "65536"], {}, "port=65536"),
    (["--host", "no.such.name.invalid"], {}, "is no address of this machine"), (["--max_queue", "-1"], {}, "max_queue"),
    (["--drain_seconds", "-1"], {}, "drain_seconds=-1"), (["--max_prompt_tokens", "0"], {}, "max_prompt_tokens=0"),
    ([], {"WORLD_SIZE": "2"}, "start it without torchrun"),
])  # fmt: skip
def test_what_keeps_it_from_starting(flags: list[str], env: dict[str, str], said: str) -> None:
    code, lines = started(*flags, **env)
    assert code == 2 and said in lines and lines.count("\n") == 1, lines


def test_a_port_in_use() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        code, lines = started("--port", str(taken.getsockname()[1]))
    assert code == 2 and "Address already in use; name another --port" in lines and lines.count("\n") == 1


def test_a_missing_package_is_named() -> None:
    code = "import sys; sys.modules['uvicorn'] = None; sys.argv[1:] = ['serve'];"
    code += " from llama.cli.commands import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment())
    assert done.returncode == 2
    assert done.stderr == 'llama: llama serve needs uvicorn: pip install "llama-runner[serve]"\n'
