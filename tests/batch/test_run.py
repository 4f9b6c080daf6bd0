"""Files of prompts: every request exactly once, the same bytes whatever happens on the way."""

import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from batch_files import environment, lines, records, sorted_lines
from conftest import DEMO, ROOT, Ended

from llama import Llama, SamplingParams, log
from llama.batch.identity import identity_path
from llama.batch.input import check_paths
from llama.batch.run import BLOCK, run_batch, stream_batch
from llama.errors import ParameterError, PromptError
from llama.kernels.library import load


@pytest.fixture(scope="module")
def bfloat16() -> Llama:
    """The demo in its own dtype, in which what shares a batch may change a result."""
    return Llama.build(str(DEMO), str(DEMO / "tokenizer.model"), 256, 4, device="cpu")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(lines(70)) + "\n")
    return file


def run(llama: Llama, file: Path, output: Path, form: str = "jsonl", **options: Any) -> int:
    params = options.pop("params", SamplingParams(max_gen_len=12))
    with log.quiet():
        return run_batch(llama, str(file), form, str(output), params, **options)


# ----------------------------------------------------------------------------------------------------- what comes out


def test_every_line_gets_its_record(demo: Llama, tmp_path: Path) -> None:
    """With its number, its id, and what `Llama` itself gives for its prompt under its own parameters."""
    file, output = tmp_path / "p.jsonl", tmp_path / "out.jsonl"
    dialog = [{"role": "user", "content": "What sound does a dog make?"}]
    file.write_text(
        "\n".join([json.dumps({"prompt": "Ben", "id": 7, "temperature": 0}), "", json.dumps(dialog), "[1"]) + "\n"
    )
    failed = run(demo, file, output, params=SamplingParams(max_gen_len=12, temperature=0))
    text, chat, bad = sorted(records(output), key=lambda record: record["line"])
    expected = demo.text_completion(["Ben"], temperature=0, max_gen_len=12)[0]
    assert failed == 1
    assert (text["line"], text["id"], text["text"]) == (1, 7, expected["generation"])
    assert text["completion_tokens"] == expected["completion_tokens"] and text["finish_reason"] in ("stop", "length")
    answer = demo.chat_completion([dialog], temperature=0, max_gen_len=12)[0]["generation"]["content"]
    assert (chat["line"], chat["id"], chat["text"]) == (3, None, answer)
    assert bad["line"] == 4 and bad["error"].startswith("not JSON") and set(bad) == {"line", "id", "error"}


def test_seeds_come_from_the_line_number(demo: Llama, tmp_path: Path) -> None:
    """So a line's result does not depend on the lines before it; its own seed goes before."""
    params = SamplingParams(temperature=1.0, max_gen_len=20)
    for name, text in (("a", "Ben\nBen\nBen\n"), ("b", "Mia went\nBen\n\n")):
        (tmp_path / name).write_text(text)
        run(demo, tmp_path / name, tmp_path / f"{name}.out", "text", params=params)
    a, b = (sorted(records(tmp_path / f"{name}.out"), key=lambda r: r["line"]) for name in "ab")
    assert a[1] == b[1] and len({record["seed"] for record in a}) == 3
    seeded = tmp_path / "c.jsonl"
    seeded.write_text(json.dumps({"prompt": "Ben", "seed": a[2]["seed"]}) + "\n")
    run(demo, seeded, tmp_path / "c.out", params=params)
    assert records(tmp_path / "c.out")[0]["text"] == a[2]["text"]


def test_ordered_sorts_at_the_end(bfloat16: Llama, prompts: Path, tmp_path: Path) -> None:
    run(bfloat16, prompts, tmp_path / "as it comes")
    run(bfloat16, prompts, tmp_path / "sorted", ordered=True)
    assert sorted_lines(tmp_path / "as it comes") == sorted_lines(tmp_path / "sorted")
    numbers = [r.get("line") or int(r["id"].removeprefix("batch_req_")) for r in records(tmp_path / "sorted")]
    assert numbers == sorted(numbers) and len(numbers) == 60
    assert not list(tmp_path.glob("*.sorting"))


def test_a_finished_run_is_left_as_it_is(bfloat16: Llama, prompts: Path, tmp_path: Path) -> None:
    failed = run(bfloat16, prompts, tmp_path / "out")
    before = (tmp_path / "out").read_bytes()
    computed = bfloat16.engine.computed_tokens
    assert run(bfloat16, prompts, tmp_path / "out") == failed > 0
    assert (tmp_path / "out").read_bytes() == before and bfloat16.engine.computed_tokens == computed


def test_what_flows_in_is_copied_first(bfloat16: Llama, prompts: Path, tmp_path: Path) -> None:
    """A pipe can be read but once; its copy is gone at the end."""
    run(bfloat16, prompts, tmp_path / "from file")
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with subprocess.Popen(["cp", str(prompts), str(pipe)]):
        run(bfloat16, pipe, tmp_path / "from pipe")
    assert sorted_lines(tmp_path / "from file") == sorted_lines(tmp_path / "from pipe")
    assert not (tmp_path / "from pipe.input").exists()


# -------------------------------------------------------------------------------------------- onto standard output


@pytest.mark.parametrize("source", ["file", "pipe"])
def test_standard_output_gets_the_records_of_a_file(
    bfloat16: Llama, prompts: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], source: str
) -> None:
    """The same bytes, once each, sorted where asked; and nothing is left anywhere."""
    failed = run(bfloat16, prompts, tmp_path / "out", ordered=True)
    whole, before, pipe = (tmp_path / "out").read_text(), sorted(tmp_path.iterdir()), tmp_path / "pipe"
    for ordered in (False, True):
        if source == "pipe":
            os.mkfifo(pipe)
            writer = subprocess.Popen(["cp", str(prompts), str(pipe)])
        flows = str(pipe if source == "pipe" else prompts)
        with log.quiet():
            assert stream_batch(bfloat16, flows, "jsonl", SamplingParams(max_gen_len=12), ordered=ordered) == failed
        if source == "pipe":
            writer.wait()
            pipe.unlink()
        out, err = capfd.readouterr()
        assert err == "" and sorted(out.splitlines()) == sorted(whole.splitlines())
        assert not ordered or out == whole
    assert sorted(tmp_path.iterdir()) == before


def test_standard_output_takes_one_replica(
    bfloat16: Llama, prompts: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("llama.batch.run.Replicas", lambda device: SimpleNamespace(count=2))
    with pytest.raises(ParameterError, match="--output - takes the results of one replica, but 2 are running"):
        stream_batch(bfloat16, str(prompts), "jsonl", SamplingParams())
    assert capfd.readouterr().out == ""


def test_a_reader_that_has_had_enough_ends_the_run(tmp_path: Path) -> None:
    """As head(1) does: with the first line read, without a word, and with nothing left behind."""
    (tmp_path / "p.txt").write_text("Ben\n" * 500)
    read, write = os.pipe()
    words = command(tmp_path / "p.txt", Path("-"), "--quiet")
    running = subprocess.Popen(words, stdout=write, stderr=subprocess.PIPE, cwd=tmp_path, env=environment())
    os.close(write)
    with open(read) as lines:
        assert json.loads(lines.readline())["id"] is None
    assert running.communicate(timeout=300)[1] == b"" and running.returncode == 141
    assert [path.name for path in tmp_path.iterdir()] == ["p.txt"]


def test_the_prompts_are_not_what_standard_output_goes_to(tmp_path: Path) -> None:
    """It would never end."""
    file = tmp_path / "p.txt"
    file.write_text("Ben\n")
    words = command(file, Path("-"))
    with open(file, "a") as out:
        done = subprocess.run(words, stdout=out, stderr=subprocess.PIPE, text=True, env=environment())
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and "is the prompts file itself" in done.stderr


def test_a_link_stays_where_its_file_is_sorted(bfloat16: Llama, prompts: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("target")
    run(bfloat16, prompts, tmp_path / "link", ordered=True)
    assert (tmp_path / "link").is_symlink() and len(records(tmp_path / "target")) == 60


# ------------------------------------------------------------------------------------------------- after being killed


@pytest.mark.parametrize("torn", [b"", b'{"line": 3, "id"', b"\0" * 40, b'{"line": 3}'])
def test_a_cut_output_is_finished_to_the_same_bytes(
    bfloat16: Llama, prompts: Path, tmp_path: Path, torn: bytes
) -> None:
    """Wherever it was cut, and whatever the cut left behind."""
    run(bfloat16, prompts, tmp_path / "whole")
    whole = (tmp_path / "whole").read_bytes().splitlines(keepends=True)
    for kept in (0, 1, 17, 33, len(whole) - 1):
        output = tmp_path / f"cut {kept}"
        output.write_bytes(b"".join(whole[:kept]) + torn)
        identity_path(output).write_bytes(identity_path(tmp_path / "whole").read_bytes())
        run(bfloat16, prompts, output)
        assert sorted_lines(output) == sorted(whole)


def test_another_run_than_the_one_begun_is_refused(bfloat16: Llama, prompts: Path, tmp_path: Path) -> None:
    """Said with what differs; and nothing is changed."""
    output = tmp_path / "out"
    run(bfloat16, prompts, output)
    begun = output.read_bytes()
    with pytest.raises(ParameterError, match=r"different parameters: temperature was 0\.6 and is 0\.5"):
        run(bfloat16, prompts, output, params=SamplingParams(max_gen_len=12, temperature=0.5))
    other = Llama.build(str(DEMO), str(DEMO / "tokenizer.model"), 256, 4, device="cpu", dtype="float32", seed=2)
    with pytest.raises(ParameterError, match='different settings: dtype was "bfloat16" and is "float32", seed was 1'):
        run(other, prompts, output)
    other = Llama.build(str(DEMO), str(DEMO / "tokenizer.model"), 256, 4, device="cpu", quantize="int8")
    with pytest.raises(ParameterError, match='different settings: quantize was null and is "int8"'):
        run(other, prompts, output)
    prompts.write_text(prompts.read_text() + "[]\n")
    with pytest.raises(ParameterError, match="different input: sha256 was"):
        run(bfloat16, prompts, output)
    assert output.read_bytes() == begun


@pytest.mark.parametrize("speculate", ["lookup", str(DEMO)], ids=["lookup", "model"])
def test_drafts_change_no_byte(prompts: Path, tmp_path: Path, speculate: str) -> None:
    """In steps whose tokens are each computed alike; and a run that was begun with drafts goes on with them."""
    if load()[0] is None:
        pytest.skip(f"PyTorch's products round by the number of their rows: {load()[1]}")
    plain, drafting = (
        Llama.build(
            str(DEMO), str(DEMO / "tokenizer.model"), 256, 4, device="cpu", quantize="int8", max_step_tokens=8,
            speculate=way,
        )
        for way in (None, speculate)
    )  # fmt: skip
    outputs = [tmp_path / name for name in ("plain.jsonl", "drafts.jsonl")]
    for llama, output in zip((plain, drafting), outputs, strict=True):
        run(llama, prompts, output, params=SamplingParams(max_gen_len=40))
    assert drafting.engine.counts.drafted > 0
    expected = sorted_lines(outputs[0])
    assert sorted_lines(outputs[1]) == expected
    written = outputs[1].read_bytes()
    outputs[1].write_bytes(written[: len(written) // 2])
    with pytest.raises(ParameterError, match=f'speculate was "{re.escape(speculate)}" and is null'):
        run(plain, prompts, outputs[1], params=SamplingParams(max_gen_len=40))
    run(drafting, prompts, outputs[1], params=SamplingParams(max_gen_len=40))
    assert sorted_lines(outputs[1]) == expected


def test_another_model_is_refused(build: Callable[..., Llama], ckpt_dir: Path, prompts: Path, tmp_path: Path) -> None:
    """Of the same sizes, with other weights."""
    llama = build()
    run(llama, prompts, tmp_path / "out")
    copied = tmp_path / "fine-tuned"
    copied.mkdir()
    for path in ckpt_dir.iterdir():
        (copied / path.name).write_bytes(path.read_bytes())
    weights = bytearray((copied / "consolidated.00.pth").read_bytes())
    weights[len(weights) // 2] ^= 1
    (copied / "consolidated.00.pth").write_bytes(weights)
    with pytest.raises(ParameterError, match="different model"):
        run(build(copied), prompts, tmp_path / "out")


def test_a_file_that_is_no_run_is_not_touched(bfloat16: Llama, prompts: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious\n")
    with pytest.raises(ParameterError, match="exists and is not a run of this command"):
        run(bfloat16, prompts, tmp_path / "mine")
    assert (tmp_path / "mine").read_text() == "precious\n"
    with pytest.raises(ParameterError, match="cannot be written: No such file"):
        run(bfloat16, prompts, tmp_path / "nowhere" / "out")
    for file, output, said in (
        (tmp_path / "missing", tmp_path / "new", "missing cannot be read: no such file"),
        (tmp_path, tmp_path / "new", "is a folder"),
        (prompts, tmp_path / "nowhere" / "out", "there is no folder .*/nowhere; name a file for --output, or -"),
        (prompts, tmp_path, "it is a folder"),
        (prompts, prompts, "is the prompts file itself"),
    ):
        with pytest.raises((PromptError, ParameterError), match=said):
            check_paths(str(file), str(output))
    assert not (tmp_path / "new").exists()


def test_a_damaged_output_is_left_as_it_is(bfloat16: Llama, prompts: Path, tmp_path: Path) -> None:
    """The results, what says which run it is, and no copy of the input."""
    output = tmp_path / "out"
    run(bfloat16, prompts, output)
    lines = output.read_bytes().splitlines(keepends=True)
    output.write_bytes(b"".join([*lines[:4], b"\0" * 9 + b"\n", *lines[5:20], b'{"line"']))
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ParameterError, match="out line 5 is damaged"):
        run(bfloat16, prompts, output)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    output.write_bytes(b"".join([*lines[:4], *lines[5:20], b'{"line"']))
    run(bfloat16, prompts, output)
    assert sorted(output.read_bytes().splitlines(keepends=True)) == sorted(lines)


def test_a_repeated_custom_id_is_said_once_and_every_line_answered(
    bfloat16: Llama, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file, output = tmp_path / "in.jsonl", tmp_path / "out"
    names = ["a", "b", "ü", "b", "c", "ü", "b"]
    call = {"url": "/v1/completions", "body": {"prompt": "Tom", "max_tokens": 2}}
    lines = [{"prompt": "custom_id", "max_gen_len": 2}, *({**call, "custom_id": name} for name in names)]
    file.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    run_batch(bfloat16, str(file), "jsonl", str(output), SamplingParams())
    said = [line for line in capfd.readouterr().err.splitlines() if "custom_id " in line]
    assert said == [
        f"llama: {file}: custom_id 'b' stands on line 3 and on line 5, 2 more lines repeat one: every line is answered"
    ]
    assert [line.get("custom_id") for line in records(output)].count("b") == 3 and len(records(output)) == 8


def test_a_seed_of_new_entropy_is_kept(prompts: Path, tmp_path: Path) -> None:
    """seed=None: the second half of a run has the seed of the first."""
    paths = (str(DEMO), str(DEMO / "tokenizer.model"), 256, 4)
    first, second = (Llama.build(*paths, seed=None) for _ in range(2))
    assert first.seed != second.seed
    run(first, prompts, tmp_path / "out", fresh_seed=True)
    whole = sorted_lines(tmp_path / "out")
    (tmp_path / "out").write_bytes(b"".join(whole[:20]))
    run(second, prompts, tmp_path / "out", fresh_seed=True)
    assert sorted_lines(tmp_path / "out") == whole


# ----------------------------------------------------------------------------------------------- through the command


def words(file: Path | str, output: Path, *more: str) -> list[str]:
    flags = ["--max_seq_len", "256", "--max_batch_size", "4", "--max_gen_len", "40", "--output", str(output)]
    return ["batch", str(file), *flags, *more]


def command(*arguments: Any) -> list[str]:
    return [sys.executable, "-m", "llama", *words(*arguments)]


def call(*arguments: Any, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments), capture_output=True, encoding="utf-8", timeout=300, cwd=ROOT, env=environment(), **options
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[bytes]]:
    """A file of prompts, some of them bad, and the lines that a process writes for it which nothing stops."""
    folder = tmp_path_factory.mktemp("whole")
    file = folder / "prompts.jsonl"
    file.write_text("\n".join(lines(210)) + "\n")
    assert call(file, folder / "out").returncode == 1
    return file, sorted_lines(folder / "out")


def test_the_command_says_what_came_of_it(here: Callable[..., Ended], tmp_path: Path) -> None:
    """Exit code 0 where all is well, 1 where some lines failed, 2 where nothing can be run."""
    file, output = tmp_path / "p.txt", tmp_path / "out.jsonl"
    file.write_text("Ben\n\nMia\n")
    code, out, err = here(*words(file, output))
    assert (code, out) == (0, ""), err
    assert err.splitlines()[-1] == f"llama: 2 of 2 requests in {output}"
    file.write_bytes(b"Ben\n\xff\n")
    code, _, err = here(*words(file, output))
    assert code == 2 and len(err.splitlines()) == 3, err
    assert "different input" in err
    data = b"Ben\nMia\n" + b"word " * 300
    assert here(*words("-", tmp_path / "other.jsonl", "--quiet"), data=data) == (1, "", "")
    assert sorted(record["line"] for record in records(tmp_path / "other.jsonl")) == [1, 2, 3]
    assert "leaves no room" in next(r["error"] for r in records(tmp_path / "other.jsonl") if r["line"] == 3)


def written(output: Path) -> int:
    return output.stat().st_size if output.exists() else 0


def test_killed_at_random_moments_it_finishes_with_the_same_bytes(
    whole: tuple[Path, list[bytes]], tmp_path: Path
) -> None:
    """kill -9, four times, when the output has grown by some part; a run that ended is followed by a fresh one."""
    file, expected = whole
    size, noise = sum(map(len, expected)), random.Random(4)
    kills, number, interrupted = 0, 0, 0
    while kills < 4:
        output = tmp_path / f"out {number}"
        enough = written(output) + noise.randrange(size // 3)
        process = subprocess.Popen(command(file, output, "--quiet"), cwd=ROOT, env=environment())
        while process.poll() is None and written(output) < enough:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        if process.wait() == -signal.SIGKILL:
            kills += 1
            interrupted += 0 < written(output) < size
        else:
            assert process.returncode == 1 and sorted_lines(output) == expected
            number += 1
    assert call(file, tmp_path / f"out {number}").returncode == 1
    assert sorted_lines(tmp_path / f"out {number}") == expected
    assert interrupted >= 2  # most kills hit a run that had written some of its results


def test_ctrl_c_keeps_what_is_finished(whole: tuple[Path, list[bytes]], tmp_path: Path) -> None:
    output, pipe = tmp_path / "out.jsonl", subprocess.PIPE
    process = subprocess.Popen(command(whole[0], output), cwd=ROOT, env=environment(), stderr=pipe, text=True)
    while process.poll() is None and not written(output):
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "stopped" in said and "the same command again does the rest" in said and "Traceback" not in said
    assert all(record for record in records(output))


def test_a_full_disk_is_reported_and_what_was_written_stays(whole: tuple[Path, list[bytes]], tmp_path: Path) -> None:
    """A limit on the size of files stands for the end of the disk."""
    file, expected = whole
    output = tmp_path / "out.jsonl"
    limited = call(file, output, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000)))
    assert limited.returncode == 2, limited.stderr
    assert "File too large; what is finished is kept" in limited.stderr and "Traceback" not in limited.stderr
    kept = output.read_bytes()
    assert 3000 < len(kept) <= 4000 and len(records(output)) > 5
    assert call(file, output).returncode == 1
    assert output.read_bytes().startswith(kept)
    assert sorted_lines(output) == expected


def test_two_runs_do_not_write_one_output(bfloat16: Llama, prompts: Path, tmp_path: Path) -> None:
    fcntl = pytest.importorskip("fcntl")
    with open(tmp_path / "out", "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(ParameterError, match="is being written by another run"):
            run(bfloat16, prompts, tmp_path / "out")


def test_memory_does_not_grow_with_the_file(bfloat16: Llama, tmp_path: Path) -> None:
    """Of a file of many lines all are read, and never more than a block is held."""
    import tracemalloc

    file = tmp_path / "big.jsonl"
    with open(file, "w") as out:
        out.writelines('{"torn": \n' for _ in range(15_000))
    (tmp_path / "few.jsonl").write_text('{"torn": \n' * 200)
    run(bfloat16, tmp_path / "few.jsonl", tmp_path / "warm up")  # imports and caches
    tracemalloc.start()
    assert run(bfloat16, file, tmp_path / "out") == 15_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 600_000, peak  # the results have 2.5 MB


def test_blocks_do_not_depend_on_what_ran_before(bfloat16: Llama, prompts: Path, tmp_path: Path) -> None:
    """A block's results are the same in a used engine: its slots' prefixes are forgotten, its steps are the same."""
    run(bfloat16, prompts, tmp_path / "first")
    bfloat16.text_completion(["Once upon a time there was a small fox named Tom."] * 3)
    run(bfloat16, prompts, tmp_path / "second")
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()
    assert len(lines(70)) > 2 * BLOCK * 4
