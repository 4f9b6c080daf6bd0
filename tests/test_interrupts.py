"""When Ctrl-C is handled: after what it must not disturb, at once where that lets it through."""

import signal
import threading
from collections.abc import Iterator

import pytest

from llama.interrupts import let_through, put_off


def press() -> None:
    signal.raise_signal(signal.SIGINT)


@pytest.fixture(autouse=True)
def handler() -> Iterator[object]:
    """Each test leaves the handler that it found."""
    before = signal.getsignal(signal.SIGINT)
    yield before
    assert signal.getsignal(signal.SIGINT) is before


@pytest.fixture
def handled() -> Iterator[list[str]]:
    """What was done, with each Ctrl-C that a handler of one's own was told."""
    done: list[str] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: done.append("handled"))
    yield done
    signal.signal(signal.SIGINT, before)


def test_it_waits_for_the_end(handled: list[str]) -> None:
    with put_off():
        press()
        handled.append("done")
    assert handled == ["done", "handled"]
    press()
    assert handled == ["done", "handled", "handled"]


def test_it_is_let_through(handled: list[str]) -> None:
    with put_off():
        press()
        handled.append("before")
        with let_through():
            handled.append("within")
            press()
            handled.append("still within")
        press()
        handled.append("after")
    assert handled == ["before", "handled", "within", "handled", "still within", "after", "handled"]


def test_one_within_another(handled: list[str]) -> None:
    """In what lets it through as well: then the inner one's end is where it is handled."""
    with put_off(), put_off():
        press()
        handled.append("done")
    assert handled == ["done", "handled"]
    handled.clear()
    with put_off(), let_through():
        with put_off():
            press()
            handled.append("done")
        handled.append("left")
    assert handled == ["done", "handled", "left"]


def test_what_is_done_on_the_way_out_is_not_disturbed() -> None:
    done = []

    def interrupted() -> None:
        try:
            with let_through():
                press()
        finally:
            press()
            done.append("whole")

    with pytest.raises(KeyboardInterrupt), put_off():
        interrupted()
    assert done == ["whole"]


def test_an_error_of_the_inner_one_changes_nothing(handled: list[str]) -> None:
    with put_off(), let_through():
        with pytest.raises(KeyError), put_off():
            raise KeyError
        press()
        assert handled == ["handled"]


def test_where_nobody_handles_it_and_in_other_threads_nothing_is_done() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    with put_off(), let_through():
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    signal.signal(signal.SIGINT, before)
    seen = []

    def other() -> None:
        with put_off(), let_through():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert seen == [before]


def test_a_handler_set_meanwhile_stays() -> None:
    def mine(number: int, frame: object) -> None: ...

    before = signal.getsignal(signal.SIGINT)
    with put_off():
        signal.signal(signal.SIGINT, mine)
    assert signal.getsignal(signal.SIGINT) is mine
    signal.signal(signal.SIGINT, before)
