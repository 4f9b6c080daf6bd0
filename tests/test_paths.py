"""Paths that people name: ~ in all of them, none empty, and nothing opened that is no file."""

import inspect
import os
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
from conftest import DEMO

from llama import Llama, Tokenizer
from llama.checkpoint.find import find_checkpoint
from llama.checkpoint.writer import reshard
from llama.cli import commands
from llama.cli.arguments import arguments, is_path
from llama.errors import LlamaError, ParameterError
from llama.paths import check_writable, expanded, kind, read

PATHS = {"ckpt_dir", "tokenizer_path", "html", "file", "output", "out", "source", "infill", "prompt_cache", "compare",
         "json_schema", "grammar"}  # fmt: skip
FLAGS = [
    (name, flag)
    for name, command in commands.COMMANDS.items()
    for flag in inspect.signature(command).parameters.values()
    if flag.name in PATHS
]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder in which the demo checkpoint lies as `model`."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").symlink_to(DEMO)
    return tmp_path


# ------------------------------------------------------------------------------------------------- ~, and empty paths


def test_every_path_is_known_as_one() -> None:
    """Of all commands: those of these names, and no others."""
    for name, command in commands.COMMANDS.items():
        for flag in inspect.signature(command).parameters.values():
            assert is_path(flag) == (flag.name in PATHS), (name, flag.name)


@pytest.mark.parametrize(("name", "flag"), FLAGS, ids=[f"{name} {flag.name}" for name, flag in FLAGS])
def test_a_path_has_a_home_and_is_not_empty(home: Path, name: str, flag: inspect.Parameter) -> None:
    """Whichever flag of whichever command it is; the error calls it as the help does."""
    others = [f"--{p.name}=1" for n, p in FLAGS if n == name and p.default is p.empty and p.name != flag.name]
    others += {"reshard": ["--model_parallel_size=1"], "quantize": ["--quantize=int8"], "convert": ["--to=hf"]}.get(
        name, []
    )
    for typed, meant in (("~/a b", f"{home}/a b"), ("~", str(home)), ("./~", "./~"), ("-", "-"), ("a~", "a~")):
        read = arguments(commands.COMMANDS[name], [f"--{flag.name}={typed}", *others], "it")
        assert read is not None and read[1][flag.name] == meant
    with pytest.raises(ParameterError, match=rf"^(--{flag.name}|{flag.name.upper()}) is empty: expected the path"):
        arguments(commands.COMMANDS[name], [f"--{flag.name}=", *others], "it")


def test_the_environment_has_paths_too(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """What is empty there counts as not set."""
    monkeypatch.setenv("LLAMA_CKPT_DIR", "~/model")
    assert find_checkpoint(None, None) == (f"{home}/model", f"{home}/model/tokenizer.model")
    commands.info(json=True)
    assert f'"folder": "{home}/model"' in capsys.readouterr().out
    (home / "other").mkdir()
    monkeypatch.setenv("LLAMA_TOKENIZER_PATH", "~/t.model")
    assert find_checkpoint(str(home / "other"), None)[1] == f"{home}/t.model"
    for name in ("LLAMA_CKPT_DIR", "LLAMA_TOKENIZER_PATH"):
        monkeypatch.setenv(name, "")
    assert find_checkpoint(None, None)[0] == str(DEMO)
    assert capsys.readouterr().err.endswith("running the bundled demo checkpoint\n")


def test_paths_of_python_are_paths_of_the_same_kind(home: Path) -> None:
    llama = Llama.build("~/model", "~/model/tokenizer.model", 64, 1, device="cpu")
    assert llama.ckpt_dir == home / "model" and llama.tokenizer.model_path == home / "model" / "tokenizer.model"
    assert Tokenizer(Path("~/model/tokenizer.model")).n_words == llama.tokenizer.n_words
    for paths, name in ((("", "x"), "ckpt_dir"), ((str(DEMO), ""), "tokenizer_path")):
        with pytest.raises(ParameterError, match=f"^{name} is empty"):
            Llama.build(*paths, 64, 1, device="cpu")


def test_a_home_that_nobody_has_stays_as_it_is_typed() -> None:
    assert expanded("~nobody-has-this-name/x", "x") == "~nobody-has-this-name/x"


# -------------------------------------------------------------------------------------------- what can be written


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one of everything."""
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("kept")
    Path("folder").mkdir()
    os.mkfifo("pipe")
    with socket.socket(socket.AF_UNIX) as made:
        made.bind("socket")
    for name, target in (
        ("to file", "file"), ("to new", "new"), ("to pipe", "pipe"), ("to nowhere", "no/where"), ("loop", "loop"),
        ("to stream", "/dev/stdout"),
    ):  # fmt: skip
        Path(name).symlink_to(target)
    return tmp_path


@pytest.mark.parametrize("path", ["file", "new", "folder/new", "to file", "to new", "./-", "~"])
def test_a_file_can_be_written(places: Path, path: str) -> None:
    """There or not yet there, and through links."""
    before = sorted(places.iterdir())
    check_writable(path)
    assert sorted(places.iterdir()) == before and Path("file").read_text() == "kept"


REFUSED = {
    "folder": "it is a folder",
    "new/": "it ends like the name of a folder",
    "no/where": "there is no folder .*/no",
    "to nowhere": "there is no folder .*/no",
    "file/x": "Not a directory",
    "pipe": "it is a pipe",
    "to pipe": "it is a pipe",
    "socket": "it is a socket",
    "loop": "Too many levels",
    "/dev/null": "it is a device",
    "/dev/stdout": "it is (an open stream|a device|a pipe)",
    "/dev/fd/1": "it is (an open stream|a device|a pipe)",
    "to stream": "it is (an open stream|a device|a pipe)",
    "-": "it stands for a standard stream",
}


@pytest.mark.parametrize("path", REFUSED)
def test_what_is_no_file_is_refused(places: Path, path: str) -> None:
    """In one line, and nothing is made or opened: a pipe would wait for ever."""
    before = sorted(places.iterdir())
    with pytest.raises(ParameterError, match=f"^{path} cannot be written: {REFUSED[path]}.*; name a file$"):
        check_writable(path)
    assert sorted(places.iterdir()) == before


def test_an_open_stream_is_no_file_even_where_it_leads_to_one(places: Path) -> None:
    """`--output /dev/stdout > file` would leave what belongs beside the file in /dev."""
    with open("file") as file:
        for path in (f"/dev/fd/{file.fileno()}", f"/proc/self/fd/{file.fileno()}"):
            if os.path.exists(path):
                assert kind(path) == "an open stream"
                with pytest.raises(ParameterError, match="it is an open stream"):
                    check_writable(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_what_may_not_be_written_is_said_first(places: Path) -> None:
    os.chmod("file", 0o400)
    os.chmod("folder", 0o500)
    for path in ("file", "folder/new"):
        with pytest.raises(ParameterError, match="cannot be written: Permission denied"):
            check_writable(path)


COMMANDS = {
    "html": ["complete", "x", "--quiet", "--html"],
    "output": ["batch", os.devnull, "--quiet", "--output"],
    "reshard": ["reshard", str(DEMO), "--model_parallel_size", "2", "--quiet", "--out"],
    "quantize": ["quantize", str(DEMO), "--quantize", "int8", "--quiet", "--out"],
}


@pytest.mark.parametrize("path", ["pipe", "to pipe", "socket", "/dev/null", "/dev/stdout", "folder"])
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_asks_first(
    places: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], command: str, path: str
) -> None:
    if path == "folder" and command in ("reshard", "quantize"):
        (places / "folder" / "mine").touch()
    before = sorted(places.rglob("*"))
    monkeypatch.setattr("sys.argv", ["llama", *COMMANDS[command], path])
    with pytest.raises(SystemExit) as ended:
        commands.main()
    out, err = capfd.readouterr()
    assert ended.value.code == 2 and out == "" and err.startswith(f"llama: {path} ") and err.count("\n") == 1
    assert sorted(places.rglob("*")) == before


# ------------------------------------------------------------------------------------------------- what is read


@pytest.mark.parametrize("place", ["pipe", "/dev/zero"])
@pytest.mark.parametrize("name", ["consolidated.00.pth", "params.json", "tokenizer.model"])
def test_what_never_ends_or_never_begins_is_not_read(tmp_path: Path, name: str, place: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(DEMO, folder)
    (folder / name).unlink()
    os.mkfifo(tmp_path / "pipe")
    (folder / name).symlink_to(tmp_path / place)
    with pytest.raises(LlamaError, match=rf"{name} cannot be read: it is a (pipe|device), not a file"):
        Llama.build(str(folder), str(folder / "tokenizer.model"), 16, 1, device="cpu")
    with pytest.raises(LlamaError, match=rf"{name} cannot be read: it is a (pipe|device), not a file"):
        reshard(folder, tmp_path / "out", 2)


def test_no_more_is_read_than_a_file_may_have(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"four")
    assert read(path, 4) == b"four"
    with pytest.raises(OSError, match="it has more than 3 bytes"):
        read(path, 3)
    os.truncate(path, 1 << 27)  # of nothing
    with pytest.raises(LlamaError, match=r"tokenizer .* cannot be read: it has more than 67108864 bytes"):
        Tokenizer(str(path))


def test_an_open_stream_is_read() -> None:
    """As a shell's <(…) gives one."""
    there, here = os.pipe()
    os.write(here, b"text")
    os.close(here)
    assert read(f"/dev/fd/{there}", 9) == b"text"
    os.close(there)
