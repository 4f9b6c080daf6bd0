"""One model, many threads: results as if alone, whoever leaves, closes, raises, is interrupted or forks meanwhile."""

import contextlib
import gc
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from types import FrameType

import pytest
import torch
from conftest import DEMO

from llama import Llama, SamplingParams
from llama.errors import DeviceError, LlamaError

STORY = "Once upon a time"
PROMPTS = [STORY, "Ben wanted a red kite.", "Mia had a dog.", "Tom was sad because", "The sun", "One day, Lily"]
DIALOG = [{"role": "user", "content": "What sound does a dog make?"}]
LENGTH = 12


def complete(llama: Llama, prompts: list[str], length: int = LENGTH, **more: object) -> list[str]:
    results = llama.text_completion(prompts, temperature=0, max_gen_len=length, **more)
    return [result["generation"] for result in results]


def stream(llama: Llama, length: int = LENGTH, prompt: str = STORY) -> Iterator[str]:
    return llama.stream_text(prompt, temperature=0, max_gen_len=length)


def together(works: list[Callable[[], None]]) -> None:
    """Do each in a thread of its own; the first error of any is raised, and one that never ends is one."""
    errors: list[BaseException] = []

    def guarded(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(work,), daemon=True) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    assert not any(thread.is_alive() for thread in threads), "a call waits for ever"
    if errors:
        raise errors[0]


@pytest.fixture
def shared(demo: Llama) -> Iterator[Llama]:
    """The demo; a test leaves nothing running in it."""
    yield demo
    gc.collect()
    assert demo.engine.idle


@pytest.fixture
def llama(shared: Llama) -> Iterator[Llama]:
    """The same, each caller's thread computing by itself: quick where others use the processor too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield shared
    torch.set_num_threads(before)


@pytest.fixture
def eager_switches() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


# ----------------------------------------------------------------------------------------------------- as if alone


def test_threads_get_what_each_gets_alone(shared: Llama, eager_switches: None) -> None:  # noqa: C901  # a case for each call
    """All entrances at once, hundreds of calls, streams left halfway or closed by another thread among them."""
    llama = shared
    texts = dict(zip(PROMPTS, complete(llama, PROMPTS), strict=True))
    answer = llama.chat_completion([DIALOG], temperature=0, max_gen_len=LENGTH)[0]["generation"]["content"]
    scores = {prompt: llama.score([prompt])[0]["logprobs"][1:] for prompt in PROMPTS}
    found = llama.text_completion([STORY], max_gen_len=LENGTH, num_beams=2)[0]["generation"]
    left: SimpleQueue = SimpleQueue()

    def completes(rng: random.Random) -> None:
        some = rng.choices(PROMPTS, k=4)
        assert complete(llama, some) == [texts[prompt] for prompt in some]

    def chats(rng: random.Random) -> None:
        assert "".join(llama.stream_chat(DIALOG, temperature=0, max_gen_len=LENGTH)) == answer

    def streams(rng: random.Random) -> None:
        prompt = rng.choice(PROMPTS)
        assert "".join(stream(llama, prompt=prompt)) == texts[prompt]

    def leaves(rng: random.Random) -> None:
        pieces = stream(llama, 200, rng.choice(PROMPTS))
        for _ in range(rng.randint(1, 5)):
            next(pieces)
        rng.choice([left.put, lambda _: None])(pieces)  # for another thread to close, or the collector

    def closes(rng: random.Random) -> None:
        while not left.empty():
            with contextlib.suppress(Exception):
                left.get_nowait().close()

    def scores_texts(rng: random.Random) -> None:
        some = rng.choices(PROMPTS, k=3)
        got = [score["logprobs"][1:] for score in llama.score(some)]
        assert got == [pytest.approx(scores[prompt], abs=1e-4) for prompt in some]

    def runs_each(rng: random.Random) -> None:
        some = rng.choices(PROMPTS, k=5)
        params = SamplingParams(temperature=0, max_gen_len=LENGTH)
        got = {index: result["generation"] for index, result in llama.run_each(some, params)}
        assert got == {index: texts[prompt] for index, prompt in enumerate(some)}

    def searches(rng: random.Random) -> None:
        assert llama.text_completion([STORY], max_gen_len=LENGTH, num_beams=2)[0]["generation"] == found

    def nests(rng: random.Random) -> None:
        once = iter([rng])
        got = complete(llama, PROMPTS[:2], on_text=lambda index, text: [completes(rng) for rng in once])
        assert got == [texts[prompt] for prompt in PROMPTS[:2]]

    kinds = [completes, chats, streams, leaves, closes, scores_texts, runs_each, searches, nests]

    def work(seed: int) -> None:
        rng = random.Random(seed)
        for kind in rng.sample(kinds * 4, k=4 * len(kinds)):
            kind(rng)

    together([lambda seed=seed: work(seed) for seed in range(8)])
    closes(random.Random())


def test_streams_run_side_by_side_and_an_unread_one_stalls_nobody(
    llama: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps, real = [], llama.engine.step
    monkeypatch.setattr(llama.engine, "step", lambda: steps.append(None) or real())
    alone = complete(llama, [STORY], 30)[0]
    steps.clear()
    first, second = stream(llama, 30), stream(llama, 30)
    pieces = [next(first)]
    assert "".join(second) == alone
    assert len(steps) <= 32
    assert "".join([*pieces, *first]) == alone
    assert len(steps) <= 32


class Pause:
    """Holds the model's next step, in the thread that takes it, until it may go on."""

    def __init__(self, llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
        self._turns, self._real = llama.turns, llama.engine.step
        self.stepping, self._going_on = threading.Event(), threading.Event()
        monkeypatch.setattr(llama.engine, "step", self._step)

    def _step(self) -> None:
        self.stepping.set()
        assert self._going_on.wait(300)
        self._real()

    def until_waiting(self, calls: int) -> None:
        """Wait until so many calls, the one that steps among them, wait for news."""
        assert self.stepping.wait(300)
        while len(self._turns._waiting) < calls:
            self._going_on.wait(0.001)

    def go_on(self) -> None:
        self._going_on.set()


def test_who_leaves_wakes_another(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """A short call steps while two long ones sleep: they are to step for themselves when it has left."""
    expected, pause = complete(llama, [STORY], 30), Pause(llama, monkeypatch)
    got: list[list[str]] = []

    def sleeps() -> None:
        assert pause.stepping.wait(300)
        got.append(complete(llama, [STORY], 30))

    def lets_go() -> None:
        pause.until_waiting(3)
        pause.go_on()

    together([lambda: complete(llama, [STORY], 2), sleeps, sleeps, lets_go])
    assert got == [expected] * 2


# ---------------------------------------------------------------------------------------------- leaving and closing


def test_a_stream_that_is_left_ends_its_request(llama: Llama) -> None:
    def begun() -> Iterator[str]:
        pieces = stream(llama, 400)
        next(pieces)
        assert not llama.engine.idle
        return pieces

    begun().close()
    assert llama.engine.idle
    begun()  # dropped
    assert llama.engine.idle
    cycle = [begun()]
    cycle.append(cycle)
    del cycle
    together([gc.collect])
    assert llama.engine.idle
    together([begun().close])
    assert llama.engine.idle
    pieces = begun()
    pieces.close()
    pieces.close()
    assert list(pieces) == []
    never_begun = stream(llama, 400)
    never_begun.close()
    assert list(never_begun) == []


def test_a_stream_closed_by_another_thread_ends_where_it_is_read(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """Closed in the middle of a step that its reader takes, and while its reader waits for another's step."""
    real, stepping, closed = llama.engine.step, threading.Event(), threading.Event()
    count = iter(range(1000))

    def step() -> None:
        if next(count) == 5:
            stepping.set()
            assert closed.wait(300)
        real()

    monkeypatch.setattr(llama.engine, "step", step)
    read: list[list[str]] = []
    streams = [stream(llama, 400), stream(llama, 400)]

    def close() -> None:
        assert stepping.wait(300)
        for one in streams:
            one.close()
        closed.set()

    together([*(lambda one=one: read.append(list(one)) for one in streams), close])
    assert len(read) == 2
    assert all(len(pieces) <= 7 for pieces in read)


def test_a_stream_closed_before_its_request_is_in_the_engine(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its reader waits for another's step to end, and goes at once."""
    pause, late, read = Pause(llama, monkeypatch), stream(llama, 400), []

    def reads() -> None:
        assert pause.stepping.wait(300)
        read.append(list(late))
        pause.go_on()

    def closes() -> None:
        pause.until_waiting(2)
        late.close()

    together([lambda: complete(llama, [STORY], 3), reads, closes])
    assert read == [[]]


# --------------------------------------------------------------------------------------------- callbacks and errors


def test_a_callback_may_call_the_model(llama: Llama) -> None:
    text, other = complete(llama, PROMPTS[:2])
    inner: list[str] = []

    def calls(depth: int) -> Callable[[int, str], None]:
        def on_text(index: int, piece: str) -> None:
            if len(inner) < 12:
                deeper = {"on_text": calls(depth + 1)} if depth < 3 else {}
                inner.extend(complete(llama, PROMPTS[1:2], **deeper))
                inner.append("".join(stream(llama, prompt=PROMPTS[1])))

        return on_text

    assert complete(llama, [STORY], on_text=calls(0)) == [text]
    assert len(inner) >= 12
    assert set(inner) == {other}


def test_an_exception_in_a_callback_is_its_callers_own(llama: Llama) -> None:
    expected = complete(llama, PROMPTS, 30)

    def completes() -> None:
        for _ in range(3):
            assert complete(llama, PROMPTS, 30) == expected

    def raises() -> None:
        def on_text(index: int, text: str) -> None:
            raise KeyError("mine")

        for _ in range(6):
            with pytest.raises(KeyError, match="mine"):
                complete(llama, PROMPTS, 400, on_text=on_text)

    together([completes, completes, raises, raises])


def test_an_error_of_a_step_ends_one_call(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of memory, say: the others' requests are computed in the next step."""
    expected = complete(llama, PROMPTS[:3], 20)
    real, count, raised = llama.engine._give, iter(range(10_000)), []

    def give(*args: object) -> object:
        if next(count) == 7:
            raise MemoryError
        return real(*args)

    monkeypatch.setattr(llama.engine, "_give", give)

    def completes() -> None:
        try:
            assert complete(llama, PROMPTS[:3], 20) == expected
        except MemoryError as error:
            raised.append(error)

    together([completes] * 4)
    assert len(raised) == 1


def test_a_call_in_the_middle_of_a_step_is_refused(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a finalizer or a signal's handler: the step that it would wait for is below it on the stack."""
    real = llama.engine.step

    def step() -> None:
        with pytest.raises(LlamaError, match="in the middle of a step of its own"):
            complete(llama, [STORY])
        real()

    monkeypatch.setattr(llama.engine, "step", step)
    pieces = stream(llama, 5)
    next(pieces)
    pieces.close()


def test_a_split_model_is_its_builders_threads(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes could not know in which order the other's threads take their steps."""
    monkeypatch.setattr("llama.parallel.model_parallel_size", lambda: 2)
    complete(llama, [STORY], 3)
    pieces = stream(llama, 9)
    next(pieces)

    def calls() -> None:
        for call in (lambda: complete(llama, [STORY]), lambda: next(pieces), lambda: llama.score([STORY])):
            with pytest.raises(DeviceError, match=r"split over 2 processes.* only the thread that built it"):
                call()

    together([calls])
    pieces.close()


# ------------------------------------------------------------------------------------------------------------ Ctrl-C


def interrupting(at: int) -> Callable[[FrameType, str, object], object]:
    """A trace function that presses Ctrl-C before the instruction of this number in what may be interrupted."""
    count = iter(range(at + 1))

    def trace(frame: FrameType, event: str, argument: object) -> object:
        if not frame.f_code.co_filename.endswith((*FILES, "contextlib.py")):
            return None
        frame.f_trace_opcodes = True
        if event == "opcode" and next(count, None) == at:
            signal.raise_signal(signal.SIGINT)
        return trace

    return trace


FILES = tuple(f"llama/{name}.py" for name in ("turns", "interrupts", "engine", "scheduler", "output", "generation"))


def test_ctrl_c_at_any_instruction_hurts_no_other_call(llama: Llama) -> None:
    """The call that it hits ends, or had ended; a stream in the same steps gets all its text; nothing stays behind."""
    text = complete(llama, [STORY], 4)[0]
    raised = 0
    for at in random.Random(7).sample(range(9000), 120):
        pieces = stream(llama, 4)
        got = [next(pieces)]
        before, tracer = signal.getsignal(signal.SIGINT), sys.gettrace()
        sys.settrace(interrupting(at))
        try:
            complete(llama, PROMPTS[1:3], 3, on_text=lambda index, text: None)
        except KeyboardInterrupt:
            raised += 1
        finally:
            sys.settrace(tracer)
        assert signal.getsignal(signal.SIGINT) is before
        got += pieces
        assert "".join(got) == text, f"interrupted at instruction {at}"
        assert llama.engine.idle, f"interrupted at instruction {at}"
    assert raised > 40


def test_ctrl_c_does_not_wait_for_a_whole_step(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of many tokens of a large model takes its time on a CPU."""
    done: list[str] = []

    def forward(*args: object) -> None:
        signal.raise_signal(signal.SIGINT)
        done.append("the rest of the pass")

    monkeypatch.setattr(type(llama.model), "forward", forward)
    with pytest.raises(KeyboardInterrupt):
        complete(llama, [STORY])
    assert not done


def test_ctrl_c_ends_a_wait_for_anothers_step(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """The main thread waits while another steps: it leaves at once, and the other's text is whole."""
    text = complete(llama, [STORY], 20)[0]
    pause, got = Pause(llama, monkeypatch), []
    other = threading.Thread(target=lambda: got.extend(complete(llama, [STORY], 20)), daemon=True)
    other.start()

    def press() -> None:
        pause.until_waiting(2)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    assert pause.stepping.wait(300)
    threading.Thread(target=press, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        complete(llama, [STORY], 20)
    pause.go_on()
    other.join(300)
    assert got == [text]


# ------------------------------------------------------------------------------------------------------------- forks

FORKS = f"""
import os, sys, threading
from concurrent.futures import ThreadPoolExecutor
from llama import Llama, LlamaError
def build():
    return Llama.build({str(DEMO)!r}, {str(DEMO / "tokenizer.model")!r}, 64, 2, device="cpu", dtype="float32")
def complete(llama):
    return llama.text_completion(["Once upon a time"] * 2, temperature=0, max_gen_len=5)[1]["generation"]
def child(*works):
    if os.fork():
        return os.wait()[1]
    for work in works:
        try:
            print(work(), flush=True)
        except LlamaError as error:
            print(type(error).__name__, error, flush=True)
    os._exit(0)
pool = ThreadPoolExecutor(3)
list(pool.map(str, range(9)))
assert child(lambda: complete(build())) == 0
llama = build()
print(pool.submit(complete, llama).result(), flush=True)
begun = llama.stream_text("Once", max_gen_len=9)
next(begun)
real, stepping, forked = llama.engine.step, threading.Event(), threading.Event()
def step():
    stepping.set()
    assert forked.wait(300)
    return real()
llama.engine.step = step
waiting = pool.submit(complete, llama)
assert stepping.wait(300)
works = lambda: complete(llama), lambda: next(begun), lambda: llama.score(["Once"]), build, begun.close
assert child(*works) == 0
forked.set()
print(waiting.result())
"""


def test_a_forked_child_says_so_or_works() -> None:
    """Forked before a model is built, beside a pool of threads, it works; later, in the middle of a step, it says."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", FORKS], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    first, second, *refused, closed, last = done.stdout.splitlines()
    assert first == second == last != ""
    assert closed == "None"
    assert len(refused) == 4
    assert all(line.startswith("DeviceError this process was forked from process ") for line in refused)
