"""The commands on the demo checkpoint, as people type them: in a process of their own where that matters, else here."""

import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from conftest import DEMO, ROOT, Ended

from llama import Llama, LlamaError
from llama.checkpoint.find import find_checkpoint
from llama.cli import commands
from llama.tokenizer import Tokenizer

COMMAND = [str(Path(sys.executable).with_name("llama"))]
MODULE = [sys.executable, "-m", "llama"]
LIKE_DEMO = ["--dtype", "float32", "--device", "cpu", "--max_seq_len", "512", "--temperature", "0"]  # as the fixture
SHORT = [*LIKE_DEMO, "--max_gen_len", "8"]
TOO_LONG = "word " * 600
LOADED = re.compile(
    r"llama: no --ckpt_dir: running the bundled demo checkpoint\nllama: .+, float32 on cpu, .*, loaded in .* s\n"
)


def start(command: list[str], **options: Any) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **options.pop("env", {})}
    return subprocess.Popen(command, env=environment, cwd=ROOT, **options)


def ended(command: list[str], data: bytes = b"", **options: Any) -> Ended:
    """(Exit code, stdout, stderr) of a process of its own."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = start(command, **pipes, **options)
    out, err = process.communicate(data, timeout=120)
    return process.returncode, out.decode(), err.decode()


def records(out: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.splitlines()]


# ------------------------------------------------------------------------------------------------- prompts are text


@pytest.mark.skipif(not str(ROOT).isascii(), reason="in a locale of ASCII Python finds nothing in such a folder")
def test_prompts_reach_the_model_as_they_were_typed(demo: Llama) -> None:
    """Through the installed command, in a locale of ASCII with another for output: and all that is said is JSON."""
    places = ["123", "[1,2]", "true", "None", "a=b", "", "two\nlines \"'", "é😀", "-", "--json", "- a\n- b"]
    flags = ["-x", "--help", "{'a': 1}", "-"]
    words = ["--json", *places[:8], *(f"--prompt={text}" for text in flags), *SHORT, "--quiet", "--", *places[8:]]
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "latin-1"}
    code, out, err = ended([*COMMAND, "complete", *words], "ü\r\n".encode(), env=locale)
    assert (code, err) == (0, "")
    expected = [text if text != "-" else "ü\r" for text in places] + flags
    assert [record["prompt"] for record in records(out)] == expected
    alone = demo.text_completion(expected, temperature=0, max_gen_len=8)
    assert [record["text"] for record in records(out)] == [result["generation"] for result in alone]


def test_a_pipe_is_a_prompt(tokenizer: Tokenizer) -> None:
    """As `python -m llama`; one newline at its end is left out. What is no result goes to stderr."""
    code, out, err = ended([*MODULE, "complete", "-", *SHORT, "--show_prompt"], b'He said "hi"\n\n')
    tokens = tokenizer.encode('He said "hi"\n', bos=True, eos=False)
    assert code == 0 and out.endswith("\n") and out.count("==>") == 0
    rest = LOADED.sub("", err)
    assert rest.startswith(f"llama: prompt 'He said \"hi\"\\n', {len(tokens)} tokens: {tokens}\nllama: ")
    assert re.fullmatch(r"llama: \d+ tokens in, 8 out in \S+ s .*, the first after \S+ s\n", rest.split("\n", 1)[1])


@pytest.mark.parametrize(
    ("words", "data", "said"),
    [
        ([], b"", "no prompt: give llama complete a text, or - for standard input, or --prompt=TEXT"),
        (["--"], b"text", "no prompt: "),
        (["-"], b"ab\xff", "standard input is not UTF-8 text (invalid start byte at byte 2): convert it first"),
        (["-", "-"], b"text", "- was given 2 times, but standard input is read once: give it once"),
        ([os.fsdecode(b"\xff")], b"", r"the argument '\udcff' is not UTF-8 text"),
        (["text", "--jsn"], b"", "there is no flag '--jsn': did you mean --json?"),
        (["text", "--top_p", "2"], b"", "top_p=2 is out of range"),
        (["-", "--n", "0"], b"", "n=0 is out of range"),
        (["text", "--seed", "x"], b"", "seed='x' is out of range"),
        (["text", "--device", "tpu"], b"", "device='tpu' is not a device: use cuda, mps or cpu"),
        (["text", "--html", "/nowhere/page.html"], b"", "/nowhere/page.html cannot be written: there is no folder /n"),
        (["text", "--html", "/"], b"", "/ cannot be written: it is a folder; name a file"),
    ],
)
def test_what_cannot_run_is_one_line(here: Callable[..., Ended], words: list[str], data: bytes, said: str) -> None:
    code, out, err = here("complete", "--quiet", *words, data=data)
    assert (code, out) == (2, "")
    assert err.startswith(f"llama: {said}") and err.count("\n") == 1


# ----------------------------------------------------------------------------------------------------- how they look


def test_completions_are_those_of_the_library(here: Callable[..., Ended], demo: Llama) -> None:
    """With a heading for each where there are several, and samples one after the other."""
    one, two = (result["generation"] for result in demo.text_completion(["Once upon a", "Ben"], temperature=0))
    code, out, err = here("complete", "Once upon a", "Ben", *LIKE_DEMO)
    assert (code, out) == (0, f"==> Once upon a <==\n{one}\n\n==> Ben <==\n{two}\n")
    assert LOADED.match(err)
    code, out, err = here("complete", "Ben", *SHORT, "--n", "2", "--temperature=1.0")
    assert code == 2 and "--temperature was given 2 times" in err
    code, out, err = here("complete", "Ben", *SHORT[:-4], "--max_gen_len=8", "--n", "2", "--quiet")
    assert code == 0 and re.fullmatch(r"[^\n]+\n--- sample 2\n[^\n]+\n", out) and err == ""


def test_a_prompt_that_cannot_run_does_not_lose_the_others(here: Callable[..., Ended]) -> None:
    code, out, err = here("complete", "Once", TOO_LONG, "Ben", *SHORT, "--json", "--quiet")
    assert code == 2 and [record["prompt"] for record in records(out)] == ["Once", "Ben"]
    assert re.fullmatch(r"llama: prompt 1: the prompt has \d+ tokens, which leaves no room .*\n", err)


@pytest.mark.parametrize("bias", ["{TOKEN: 100}", '{"TOKEN": 100}'])
def test_a_bias_on_the_command_line_is_as_in_files(here: Callable[..., Ended], demo: Llama, bias: str) -> None:
    token = demo.tokenizer.encode("dog", bos=False, eos=False)[-1]
    given = bias.replace("TOKEN", str(token))
    code, out, _ = here("complete", "Ben", "--max_gen_len", "3", "--quiet", "--logit_bias", given)
    assert code == 0 and out.split() == demo.tokenizer.decode([token] * 3).split()


def test_json_has_what_was_asked(here: Callable[..., Ended], demo: Llama) -> None:
    """One object a text, with the library's own fields; the times apart, which are never the same."""
    words = ["--json", "--n", "2", "--top_logprobs", "3", "--stop", "never", "--stop=zzz", "--logit_bias={5:-1}"]
    code, out, _ = here("complete", "Ben", *SHORT, *words)
    (record,) = records(out)
    options = {"n": 2, "logprobs": True, "top_logprobs": 3, "logit_bias": {5: -1}, "seed": record["seed"]}
    (expected,) = demo.text_completion(["Ben"], temperature=0, max_gen_len=8, **options)
    assert code == 0 and list(record)[:2] == ["prompt", "text"] and len(record["samples"]) == 2
    for found, own in zip([record, *record["samples"]], [expected, *expected["samples"]], strict=True):
        assert found["text"] == own["generation"]
        for name in ("tokens", "finish_reason", "seed", "completion_tokens"):
            assert found[name] == own[name]
        assert found["logprobs"] == pytest.approx(own["logprobs"], abs=1e-4)
        tops = zip(found["top_logprobs"], own["top_logprobs"], strict=True)
        assert all([top["piece"] for top in one] == [top["piece"] for top in other] for one, other in tops)


def test_beams_are_given_the_slots_that_they_need(here: Callable[..., Ended], demo: Llama) -> None:
    code, out, _ = here("complete", "Ben", *SHORT, "--num_beams", "9")
    assert (code, out) == (0, f"{demo.text_completion(['Ben'], max_gen_len=8, num_beams=8)[0]['generation']}\n")


def test_tokens_are_shown_with_their_probabilities(here: Callable[..., Ended], tmp_path: Path) -> None:
    """A table on stdout, uncoloured in a pipe; a page beside it, of the same tokens."""
    code, out, _ = here("complete", "Ben", *SHORT, "--top_logprobs", "2", "--html", str(tmp_path / "page.html"))
    table = out.split("\n\n")[1]
    assert code == 0 and len(table.splitlines()) == 8 and "\x1b" not in out
    assert all(len(re.findall(r"\d %", line)) == 3 for line in table.splitlines())
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>") and ">Ben<" in page and page.count('role="tooltip"') == 8
    assert not re.search(r"(src|href)=|@import|url\(", page)
    code, out, _ = here("complete", "Ben", *SHORT, "--logprobs")
    assert code == 0 and all(len(re.findall(r"\d %", line)) == 1 for line in out.split("\n\n")[1].splitlines())


def test_a_page_alone_leaves_the_text_plain(here: Callable[..., Ended], tmp_path: Path) -> None:
    """It has its alternatives, in the order of the prompts; one that could not run is not in it."""
    path = tmp_path / "page.html"
    code, out, _ = here("complete", "Once <upon>", TOO_LONG, "Ben", *SHORT, "--html", str(path))
    page = path.read_text(encoding="utf-8")
    assert code == 2 and out == here("complete", "Once <upon>", TOO_LONG, "Ben", *SHORT)[1]
    assert page.count("<section>") == 2 and page.index("Once &lt;upon&gt;") < page.index(">Ben<")
    assert page.count('class="row') == 16 * (1 + commands.HTML_ALTERNATIVES)


# ------------------------------------------------------------------------------------------------------- in a terminal


@contextmanager
def terminal(*words: str, **environment: str) -> Iterator[tuple[subprocess.Popen, Callable[[], str], int]]:
    """A command in a pseudo-terminal: (process, what it writes next or "" at its end, the terminal's other side)."""
    ours, theirs = os.openpty()
    process = start([*MODULE, *words], stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
                    env={"TERM": "xterm", **environment}, preexec_fn=_take_terminal)  # fmt: skip
    os.close(theirs)

    def read() -> str:
        with suppress(OSError):  # EIO: the other side is closed
            return os.read(ours, 4096).decode()
        return ""

    try:
        yield process, read, ours
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def _take_terminal() -> None:
    """Make the terminal on standard input that of this process, so that Ctrl-C typed there reaches it."""
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def test_a_terminal_shows_text_while_it_is_made_and_ctrl_c_ends_it() -> None:
    """Text comes long before the end of a completion that would take minutes; Ctrl-C leaves nothing but its code."""
    words = ["--max_seq_len", "100000", "--min_gen_len", "90000", "--quiet"]
    with terminal("complete", "Once upon a time", *words) as (process, read, typed):
        shown = [read() for _ in range(5)]
        assert all(shown) and process.poll() is None
        os.write(typed, b"\x03")
        while more := read():
            shown.append(more)
        assert process.wait(timeout=60) == 130
    assert "Traceback" not in "".join(shown)


def test_a_terminal_shows_what_a_pipe_gets_and_cannot_be_steered(demo: Llama) -> None:
    """The same text; control characters of a prompt are shown in its heading. Tokens are coloured."""
    prompts = ["Once upon a", "\x1b[31mBen\x07"]
    with terminal("complete", *prompts, *SHORT, "--quiet") as (process, read, _):
        shown = "".join(iter(read, ""))
        assert process.wait(timeout=60) == 0
    one, two = (result["generation"] for result in demo.text_completion(prompts, temperature=0, max_gen_len=8))
    assert shown == f"==> Once upon a <==\n{one}\n\n==> ␛[31mBen␇ <==\n{two}\n".replace("\n", "\r\n")
    with terminal("complete", "Ben", *SHORT, "--logprobs", "--quiet") as (process, read, _):
        assert "\x1b[" in "".join(iter(read, ""))


# --------------------------------------------------------------------------------------------------------- its help


def test_help_is_quick() -> None:
    """The best of five; by the processor's clock, which others on the machine do not push."""
    times = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([*MODULE, "complete", "--help"], check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(times) < 0.3


def test_help_imports_nothing_heavy() -> None:
    """Of any command; and it goes to stdout."""
    code = (
        "import sys; from llama.cli.commands import COMMANDS, main\n"
        "for words in ([], *([name, '--help'] for name in COMMANDS)):\n"
        "    sys.argv = ['llama', *words]; main()\n"
        "print([m for m in ('torch', 'prompt_toolkit', 'sentencepiece', 'numpy', 'tqdm') if m in sys.modules])"
    )
    done, out, err = ended([sys.executable, "-c", code])
    assert (done, err) == (0, "") and out.endswith("\n[]\n") and out.count("Usage: llama ") == len(commands.COMMANDS)


# -------------------------------------------------------------------------------------------------- several processes


def torchrun(*words: str, data: bytes = b"") -> Ended:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "llama"]
    return ended([*launcher, *words], data)


def test_two_processes_print_what_one_prints(here: Callable[..., Ended]) -> None:
    """Once, and with one standard input for both."""
    words = ["complete", "Once upon", "-", *SHORT]
    code, out, err = torchrun(*words, data=b"Ben wanted")
    assert code == 0, err
    assert out == here(*words, data=b"Ben wanted")[1] and "==> Ben wanted <==" in out
    assert err.count("running the bundled demo") == err.count("split over 2 processes") == err.count("tokens in") == 1


def test_two_processes_score_what_one_scores(here: Callable[..., Ended]) -> None:
    words, data = ["score", "-", *LIKE_DEMO[:-2]], b"Once upon a time\nBen wanted a red kite.\n"
    code, out, err = torchrun(*words, data=data)
    assert code == 0, err
    assert out == here(*words, data=data)[1] and out.count("\n") == 3 and err.count("2 texts, ") == 1


# -------------------------------------------------------------------------------------------------------------- score


def test_score_prints_a_table(here: Callable[..., Ended], demo: Llama, tmp_path: Path) -> None:
    """Of a file or standard input; the sums are on stderr. What has no score is said in its place, and in the code."""
    lines = tmp_path / "texts.jsonl"
    lines.write_text('"Once upon a time"\n\n{"text": "Ben wanted"}\n')
    first, second = (score["perplexity"] for score in demo.score(["Once upon a time", "Ben wanted"]))
    code, out, err = here("score", str(lines), *LIKE_DEMO[:-2])
    rows = out.splitlines()
    assert code == 0 and rows[0].split() == ["perplexity", "tokens", "text"]
    assert [row.split(maxsplit=2) for row in rows[1:]] == [
        [f"{first:.3f}", "4", "Once upon a time"], [f"{second:.3f}", "2", "Ben wanted"],
    ]  # fmt: skip
    assert LOADED.match(err) and re.search(r"^llama: 2 texts, 6 scored tokens, perplexity \d+\.\d{4}$", err, re.M)
    code, out, err = here("score", "-", "--format=jsonl", "--quiet", *LIKE_DEMO[:-2], data=lines.read_bytes() + b"x")
    assert (code, err) == (1, "") and out.splitlines()[:3] == rows and "line 4: not JSON" in out.splitlines()[3]


def test_score_gives_the_library_s_numbers_as_json(here: Callable[..., Ended], demo: Llama) -> None:
    words = ["score", "-", "--json", "--top_logprobs=2", "--quiet", *LIKE_DEMO[:-2]]
    code, out, err = here(*words, data=b"Once upon a time\n" + TOO_LONG.encode())
    good, bad = records(out)
    assert (code, err, bad["line"]) == (1, "", 2) and bad["error"].startswith("the text has ")
    assert good == {"line": 1, "text": "Once upon a time", **demo.score(["Once upon a time"], top_logprobs=2)[0]}


def test_score_takes_a_file_as_one_text(here: Callable[..., Ended], demo: Llama) -> None:
    """Of any length, by windows."""
    text = "Once upon a time there was a small fox named Tom.\n" * 60
    words = ["score", "-", "--whole", "--json", *LIKE_DEMO[:-2]]
    code, out, err = here(*words, data=text.encode())
    expected = demo.score([text], context=512)[0]
    assert code == 0 and records(out) == [{"line": 1, "text": text, **expected}]
    last = f"perplexity {expected['perplexity']:.4f}, {expected['bits_per_byte']:.4f} bits per byte"
    assert err.endswith(f"llama: 1 text, {len(expected['tokens']) - 1} scored tokens, {last}\n")
    code, out, err = here("score", "-", "--stride=4", "--context=8", *LIKE_DEMO[:-2], data=text[:100].encode())
    assert code == 0 and out.count("\n") == 3 and "2 texts, " in err and "bits per byte" in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["none.txt"], "prompts file none.txt cannot be read: No such file or directory"),
        (["/"], "prompts file / cannot be read: Is a directory"),
        ([], "FILE is missing: llama score --help says what it is"),
        (["a", "b"], "nothing takes 'b' here: llama score --help says what there is to give"),
        (["-", "--format=xml"], "format='xml' is not a format: use text (a prompt a line) or jsonl"),
        (["-", "--top_logprobs=2"], "top_logprobs=2 is shown in JSON alone: add --json"),
        (
            ["-", "--whole", "--format=text"],
            "format='text' with --whole, which takes a file as one text: leave one of them out",
        ),
        (["-", "--context=4096"], "context=4096 is out of range: expected an integer from 2 to 2048 (max_seq_len)"),
        (["none.txt", "--whole"], "prompts file none.txt cannot be read: No such file or directory"),
    ],
)
def test_score_says_first_what_it_cannot_do(here: Callable[..., Ended], words: list[str], said: str) -> None:
    """Nothing is loaded."""
    assert here("score", *words, data=b"text") == (2, "", f"llama: {said}\n")


def test_a_reader_may_leave_early(tmp_path: Path) -> None:
    """As head(1) does, while there is far more to print than a pipe holds: no word about it."""
    (tmp_path / "texts").write_text("Once upon a time there was a small fox named Tom.\n" * 150)
    words = ["score", str(tmp_path / "texts"), "--json", "--top_logprobs=20", "--quiet"]
    process = start([*MODULE, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert json.loads(process.stdout.readline())["line"] == 1
    process.stdout.close()
    assert (process.stderr.read(), process.wait(timeout=60)) == (b"", 141)
    process.stderr.close()


# ------------------------------------------------------------------------------------------------- the other commands


def test_batch_runs_a_file(here: Callable[..., Ended], tmp_path: Path) -> None:
    file, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    file.write_text('{"prompt": "Ben wanted", "id": "a"}\nx\n')
    words = ["batch", str(file), "--output", str(out), "--ordered", "--quiet", *SHORT]
    assert here(*words) == (1, "", "")
    good, bad = records(out.read_text(encoding="utf-8"))
    assert (good["id"], good["completion_tokens"], bad["line"]) == ("a", 8, 2) and "not JSON" in bad["error"]
    code, _, err = here("batch", str(file))
    assert (code, err) == (2, "llama: --output is missing: llama batch --help says what it is\n")


def test_chat_needs_a_terminal(here: Callable[..., Ended]) -> None:
    said = "standard input is not a terminal, and a talk needs one: run llama chat in a terminal"
    code, out, err = here("chat")
    assert (code, out) == (2, "") and err.startswith(f"llama: {said}")


def test_chat_says_that_windows_has_no_such_terminal(
    here: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setitem(sys.modules, "termios", None)
    code, out, err = here("chat")
    assert (code, out) == (2, "") and err.startswith("llama: llama chat needs a terminal of Linux or macOS:")


def test_info_describes_without_loading(here: Callable[..., Ended], tmp_path: Path) -> None:
    code, out, err = here("info")
    assert code == 0 and f"{DEMO}" in out and "1,869,504" in out
    assert err == "llama: no checkpoint folder: this is the bundled demo checkpoint\n"
    code, out, err = here("info", str(DEMO), "--json", "--max_seq_len=100", "--max_batch_size", "3", "--quiet")
    (record,) = records(out)
    assert (code, err, record["parameters"], record["max_batch_size"]) == (0, "", 1_869_504, 3)
    code, out, err = here("info", str(tmp_path / "none"))
    assert (code, out, err) == (2, "", f"llama: checkpoint folder {tmp_path}/none does not exist: check ckpt_dir\n")


def test_verify_compares_sums(here: Callable[..., Ended], tmp_path: Path) -> None:
    code, out, err = here("verify", "--quiet")
    assert (code, out, err) == (0, f"{DEMO}: 3 files match checklist.chk\n", "")
    code, out, err = here("verify")
    assert (code, err) == (0, "llama: no checkpoint folder: this is the bundled demo checkpoint\n")
    (tmp_path / "checklist.chk").write_text(f"{'0' * 32}  params.json\n")
    (tmp_path / "params.json").write_text("{}")
    code, out, err = here("verify", str(tmp_path), "--quiet")
    assert (code, out) == (2, "")
    assert err == f"llama: {tmp_path} does not match its checklist.chk: params.json differs; download again\n"


def test_reshard_writes_a_checkpoint(here: Callable[..., Ended], tmp_path: Path) -> None:
    """One that runs; and refuses to write over it."""
    words = ["reshard", str(DEMO), str(tmp_path / "two"), "--model_parallel_size=2", "--quiet"]
    assert here(*words) == (0, f"{tmp_path}/two: 2 shards written\n", "")
    assert here("verify", str(tmp_path / "two"), "--quiet")[0] == 0
    code, out, _ = here("complete", "Ben", "--ckpt_dir", str(tmp_path / "two"), *SHORT)
    assert code == 0 and out == here("complete", "Ben", *SHORT)[1]
    code, out, err = here(*words)
    assert (code, out) == (2, "") and err.startswith(f"llama: {tmp_path}/two is not empty")


def test_demo_shows_the_demo(here: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch) -> None:
    """And no other checkpoint."""
    monkeypatch.setenv("LLAMA_CKPT_DIR", "/nowhere")
    code, out, err = here("demo", "--quiet")
    assert (code, err) == (0, "") and "Assistant: Woof.\n\n" in out and "Try next:\n" in out
    assert here("demo", "more") == (
        2, "", "llama: nothing takes 'more' here: llama demo --help says what there is to give\n",
    )  # fmt: skip


@pytest.mark.parametrize("words", [["info"], ["verify"], ["reshard", "/in", "/out", "--model_parallel_size=2"]])
def test_what_one_process_does_is_not_done_by_others(
    here: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    """As of two that torchrun started by mistake."""
    monkeypatch.setenv("RANK", "1")
    assert here(*words) == (0, "", "")


# -------------------------------------------------------------------------------------------------------------- paths


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder without a tokenizer in it or beside it."""
    (tmp_path / "models" / "llama-2-7b").mkdir(parents=True)
    return tmp_path / "models" / "llama-2-7b"


def test_the_environment_names_a_checkpoint(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is said, for nothing on the command line shows it; a flag is stronger, and an empty variable is none."""
    monkeypatch.setenv("LLAMA_CKPT_DIR", str(folder))
    monkeypatch.setenv("LLAMA_TOKENIZER_PATH", "named.model")
    assert find_checkpoint(None, None) == (str(folder), "named.model")
    assert find_checkpoint(None, "given.model") == (str(folder), "given.model")
    assert capsys.readouterr().err == f"llama: no --ckpt_dir: running LLAMA_CKPT_DIR={folder}\n" * 2
    assert find_checkpoint(str(DEMO), None) == (str(DEMO), str(DEMO / "tokenizer.model"))
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("LLAMA_CKPT_DIR", "")
    assert find_checkpoint(None, None) == (str(DEMO), str(DEMO / "tokenizer.model"))
    with pytest.raises(LlamaError, match="--tokenizer_path was given without --ckpt_dir"):
        find_checkpoint(None, "given.model")


def test_a_tokenizer_is_looked_for_where_it_is_nearest(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Named by a flag, in the folder, named by the environment, beside the folder."""
    monkeypatch.setenv("LLAMA_TOKENIZER_PATH", "")
    beside, inside = folder.parent / "tokenizer.model", folder / "tokenizer.model"
    with pytest.raises(LlamaError, match=r"no tokenizer\.model in .* or beside it: name it with --tokenizer_path"):
        find_checkpoint(str(folder), None)
    beside.touch()
    assert find_checkpoint(str(folder), None)[1] == str(beside)
    monkeypatch.setenv("LLAMA_TOKENIZER_PATH", "named.model")
    assert find_checkpoint(str(folder), None)[1] == "named.model"
    inside.touch()
    assert find_checkpoint(str(folder), None)[1] == str(inside)
    assert find_checkpoint(str(folder), "given.model")[1] == "given.model"


def test_a_command_takes_the_environment_s_checkpoint(
    here: Callable[..., Ended], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAMA_CKPT_DIR", str(folder))
    for command in (["verify"], ["info"], ["complete", "text", "--tokenizer_path", "x"]):
        code, out, err = here(*command)
        assert (code, out) == (2, "") and err.splitlines()[-1].startswith(f"llama: {folder}")
    (folder / "checklist.chk").write_text("")
    assert here("verify", str(DEMO), "--quiet")[0] == 0
