"""A process of its own in which damaged checkpoints go through the command, one by one, and what it says is seen.

One that crashes or never comes back ends that process, not the one that asks; a new one takes over.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
PATIENCE = 120  # seconds after which an example counts as one that never comes back; it takes a fifth of one


def commands(folder: Path) -> Iterator[list[str]]:
    """What is done with a checkpoint, in the words of the shell."""
    sizes = ["--device", "cpu", "--threads", "1", "--max_seq_len", "32", "--max_batch_size", "1"]
    limits = ["--temperature", "0", "--max_gen_len", "4", "--top_logprobs", "2"]
    yield ["complete", "a \u00e9 \u2028", "--ckpt_dir", str(folder), *sizes, *limits]
    yield ["info", str(folder)]
    yield ["verify", str(folder)]
    yield ["reshard", str(folder), str(folder / "out"), "--model_parallel_size", "2"]
    yield ["quantize", str(folder), str(folder / "q"), "--quantize", "int8"]


def outcomes(folder: Path) -> dict[str, str]:
    """Command → "ran", or the line by which it was refused. Raises AssertionError that says what else happened."""
    found = {}
    for words in commands(folder):
        code, said = run(lambda words=words: command([*words, "--quiet"]))
        if code == 0:
            assert not said, f"{words[0]}: exit code 0, and on stderr {said!r}"
        else:
            line = said.removesuffix("\n")
            one = said.endswith("\n") and line.isprintable() and line.startswith("llama: ")
            assert code == 2 and one, f"{words[0]}: exit code {code}, on stderr {said!r}"
            assert len(line) < 4000, f"{words[0]}: a line of {len(line)} characters"
        found[words[0]] = said.strip().replace(str(folder), "…") or "ran"
    if found["complete"] == "ran":
        read_all(folder)
    return found


def read_all(folder: Path) -> None:
    """What a run may come to later: every token is decoded."""
    from llama.text.tokenizer_files import open_tokenizer

    tokenizer = open_tokenizer(str(folder))
    space = tokenizer.sp_model.piece_to_id("\u2581")
    tokens = list(range(tokenizer.n_words))
    for some in (tokens, [*tokens[260:400], space], [space, *tokens], [0, space, 0]):
        assert "".join(tokenizer.pieces(some)) == tokenizer.decode(some), some
    for token in tokens:
        tokenizer.piece(token).encode()


def command(words: list[str]) -> int:
    """The exit code of the command, as a shell would see it; what it raises instead is a fault."""
    from llama.cli.commands import main

    sys.argv = ["llama", *words]
    try:
        main()
    except SystemExit as left:
        return left.code or 0
    return 0


def run(call: Callable[[], int]) -> tuple[int, str]:
    """What a call returns, and what this process writes to its stderr meanwhile, native code included."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        kept = os.dup(1), os.dup(2)
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        try:
            result = call()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, stream in enumerate(kept, 1):
                os.dup2(stream, number)
                os.close(stream)
        err.seek(0)
        return result, err.read().decode(errors="surrogateescape")


def answer(asked: int | str, sounds: Path) -> None:
    """Write what was damaged for a seed (nothing, where a sound checkpoint is named), then `found` or the `fault`."""
    from damage import damage

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "damaged"
        if isinstance(asked, int):
            what = damage(asked, sounds, folder)
        else:
            what = ("nothing", "sound")
            shutil.copytree(sounds / asked, folder)
        print(json.dumps(what), flush=True)  # before anything can crash
        try:
            found = {"found": outcomes(folder)}
        except Exception:
            found = {"fault": traceback.format_exc()}
        print(json.dumps(found), flush=True)


class Witness:
    """Asks the process, and starts it anew where it died."""

    def __init__(self, sounds: Path) -> None:
        self.sounds = sounds
        self.process: subprocess.Popen | None = None

    def ask(self, asked: int | str) -> tuple[list[str], dict]:
        """What was damaged, and `found` or `fault`: a crash and a run that never comes back are faults too."""
        if self.process is None:
            self.process = subprocess.Popen(
                [sys.executable, __file__, str(self.sounds)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
        watch = threading.Timer(PATIENCE, self.process.kill)
        watch.start()
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(f"{json.dumps(asked)}\n")
            self.process.stdin.flush()
        what, found = self.process.stdout.readline(), self.process.stdout.readline()
        watch.cancel()
        if found:
            return json.loads(what), json.loads(found)
        code = self.close()
        return json.loads(what or '["?", "?"]'), {"fault": f"the process ended with {code} (-9: it never came back)"}

    def close(self) -> int:
        """End the process, if there is one; returns its exit code."""
        if self.process is None:
            return 0
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.stdout.close()
        code = self.process.wait()
        self.process = None
        return code


def main() -> None:
    sounds, asked = Path(sys.argv[1]), os.fdopen(os.dup(0))  # standard input and argv are the command's
    for line in asked:
        answer(json.loads(line), sounds)


if __name__ == "__main__":
    main()
