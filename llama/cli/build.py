"""What the flags of a command say, found and built: the checkpoint, its tokenizer, the model."""

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama import log
from llama.cli.shell import without_stderr
from llama.errors import LlamaError
from llama.paths import FilePath, expanded

if TYPE_CHECKING:
    from llama.generation import Llama

DEMO = Path(__file__).parent.parent / "demo"  # the bundled checkpoint


def checkpoint_paths(ckpt_dir: str | None, tokenizer_path: str | None) -> tuple[str, str]:
    """(Checkpoint folder, tokenizer file): those given, else those of LLAMA_CKPT_DIR and LLAMA_TOKENIZER_PATH.

    A tokenizer that was not named is looked for in the folder, in the environment and beside the folder. Without any
    folder it is the demo's, which is said in one line.
    """
    if ckpt_dir is None:
        named = _from_environment("LLAMA_CKPT_DIR")
        if not named and tokenizer_path is not None:
            raise LlamaError("--tokenizer_path was given without --ckpt_dir: give both, or neither for the demo")
        log.say(f"no --ckpt_dir: running {f'LLAMA_CKPT_DIR={named}' if named else 'the bundled demo checkpoint'}")
        ckpt_dir = named or str(DEMO)
    return str(ckpt_dir), str(tokenizer_path or _find_tokenizer(Path(str(ckpt_dir))))


def _from_environment(name: str) -> FilePath | None:
    """The path that a variable names; one that is empty counts as not set."""
    return expanded(value, name) if (value := os.environ.get(name)) else None


def _find_tokenizer(folder: Path) -> Path:
    inside, beside = folder / "tokenizer.model", Path(os.path.abspath(folder)).parent / "tokenizer.model"
    if inside.is_file():
        return inside
    if named := _from_environment("LLAMA_TOKENIZER_PATH"):
        return Path(named)
    if not beside.is_file() and folder.is_dir():  # a folder that is not there is the loader's to report
        raise LlamaError(f"no tokenizer.model in {folder} or beside it: name it with --tokenizer_path")
    return beside


def checkpoint_folder(ckpt_dir: str | None) -> Path:
    """The checkpoint folder of a command that needs no tokenizer."""
    found = ckpt_dir or _from_environment("LLAMA_CKPT_DIR")
    if not found:
        log.say("no checkpoint folder: this is the bundled demo checkpoint")
    return Path(found or DEMO)


def build(model: dict[str, Any], at_once: int) -> "Llama":
    """Build what the flags of a command say; a batch size that was not said is `at_once`."""
    import_libraries()
    from llama import Llama

    paths = checkpoint_paths(model["ckpt_dir"], model.get("tokenizer_path"))
    options = {name: value for name, value in model.items() if name not in ("ckpt_dir", "tokenizer_path")}
    if options.get("max_batch_size") is None:
        options["max_batch_size"] = at_once
    return Llama.build(*paths, **options)


def import_libraries() -> None:
    """Import torch and all that is built on it; with --quiet without what native libraries say by themselves.

    GNU's OpenMP, for one, speaks of each of its variables that it cannot read, in every library that brings it along.
    """
    with contextlib.nullcontext() if log.is_said() else without_stderr():
        import sentencepiece  # noqa: F401

        import llama.generation  # noqa: F401
        from llama.kernels.library import load

        load()
