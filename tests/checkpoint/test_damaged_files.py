"""Whatever becomes of a checkpoint's files: each command runs, or says why not in one line, with exit code 2.

benchmarks/damaged_files.py runs 10,000 such examples.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import witness as watched
from damage import sound
from hypothesis import given, settings
from hypothesis import strategies as st
from witness import Witness


@pytest.fixture(scope="module")
def witness(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Witness]:
    witness = Witness(sound(tmp_path_factory.mktemp("sound")))
    yield witness
    witness.close()


@pytest.mark.parametrize("name", ["plain", "two", "int8", "int4", "huggingface", "gguf", "gguf4"])
def test_sound_files_run(witness: Witness, name: str) -> None:
    """All that is done with a damaged checkpoint is done with one that is not."""
    _, answer = witness.ask(name)
    refused = {command for command, said in answer["found"].items() if said != "ran"}
    assert refused == ({"quantize"} if name.endswith(("int8", "4")) else set()), answer


@settings(max_examples=120, derandomize=True, database=None)
@given(st.integers(0, 2**31))
def test_damaged_files_run_or_are_refused_in_one_line(witness: Witness, seed: int) -> None:
    what, answer = witness.ask(seed)
    assert "found" in answer, f"seed {seed}, {what}: {answer}"


def test_a_crash_is_a_fault_and_the_next_is_asked_anew(witness: Witness) -> None:
    witness.ask("plain")
    witness.process.kill()
    assert "the process ended with -9" in witness.ask(1)[1]["fault"]
    assert "found" in witness.ask("plain")[1]


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (0, b"noise\n"), (1, b"llama: x\n"), (2, b""), (2, b"llama: x"), (2, b"llama: x\nllama: y\n"),
        (2, b"llama: \x1b[2J\n"), (2, b"llama: \xff\n"), (2, b"x\n"), (2, b"llama: " + b"x" * 5000 + b"\n"),
    ],
)  # fmt: skip
def test_what_is_no_refusal_is_a_fault(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: int, said: bytes) -> None:
    def command(words: list[str]) -> int:
        os.write(2, said)
        return code

    monkeypatch.setattr(watched, "command", command)
    with pytest.raises(AssertionError, match="complete: "):
        watched.outcomes(tmp_path)
