"""What every command shares: the paths it runs on, and how it ends. Parse, call, print, exit code."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import fire

from llama.errors import LlamaError

DEMO = Path(__file__).parent / "demo"  # the bundled checkpoint


def run(command: Callable[..., None]) -> None:
    """Run a command with the arguments of the shell (fire's). An error of the user's is one line and exit code 2."""
    try:
        fire.Fire(command)
    except LlamaError as error:
        if _is_first_to_fail():
            print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)  # as a shell reports a command that Ctrl-C ended
    _leave_group()


def checkpoint_paths(ckpt_dir: str | None, tokenizer_path: str | None) -> tuple[str, str]:
    """(Checkpoint folder, tokenizer file): those given; without any the demo's, which is said in one line.

    A tokenizer that was not named is looked for in the checkpoint folder and beside it.
    """
    if ckpt_dir is None and tokenizer_path is None:
        if is_main():
            print("llama: no --ckpt_dir: running the bundled demo checkpoint", file=sys.stderr, flush=True)
        return str(DEMO), str(DEMO / "tokenizer.model")
    if ckpt_dir is None:
        raise LlamaError("--tokenizer_path was given without --ckpt_dir: give both, or neither for the demo checkpoint")
    if tokenizer_path is None:
        folder = Path(str(ckpt_dir))
        places = [folder / "tokenizer.model", Path(os.path.abspath(folder)).parent / "tokenizer.model"]
        found = [place for place in places if place.is_file()]
        if not found and folder.is_dir():  # a folder that is not there is the loader's to report
            raise LlamaError(f"no tokenizer.model in {ckpt_dir} or beside it: name it with --tokenizer_path")
        tokenizer_path = str((found or places)[0])
    return str(ckpt_dir), str(tokenizer_path)


def is_main() -> bool:
    """Whether this process talks to the person: rank 0 of those that torchrun started, or the only one."""
    return int(os.environ.get("RANK", 0)) == 0


def _is_first_to_fail() -> bool:
    parallel = sys.modules.get("llama.parallel")
    return parallel.is_first_to_fail() if parallel else is_main()


def _leave_group() -> None:
    if parallel := sys.modules.get("llama.parallel"):
        parallel.leave()
