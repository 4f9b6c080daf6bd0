"""Check that the lower bounds in pyproject.toml are true: python tools/check_lowest.py (minutes, gigabytes to load)

Installs the lowest versions that the bounds allow, on the oldest Python of this machine that is supported, then runs
both example scripts and the tests of what those versions could break. Needs Python 3.11 or later itself, for tomllib.
"""

import shutil
import sys
import tempfile
from pathlib import Path
from subprocess import CalledProcessError

import tomllib
from check_install import NOT_COPIED, ROOT, pythons, run

TESTS = [
    *(f"tests/test_{name}.py" for name in ("generation", "tokenizer", "progress", "infilling", "chat")),
    "tests/checkpoint", "tests/text", "tests/cli/test_commands.py", "tests/engine/test_sampling.py",
]  # fmt: skip


def requirements() -> list[str]:
    """What the package and its tests ask for, but Triton: torch pins that itself, and older ones are told apart."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = project["dependencies"] + project["optional-dependencies"]["test"]
    return [requirement for requirement in asked if not requirement.startswith("triton")]


def main() -> None:
    version, python = next(iter(pythons().items()))
    print(f"Python {version}, at {python}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "llama"
        shutil.copytree(ROOT, clone, ignore=NOT_COPIED)
        run(python, "-m", "venv", ".venv", at=clone)
        own = clone / ".venv" / "bin"
        run(own / "pip", "install", "--quiet", "uv", at=clone)
        run(own / "uv", "pip", "install", "--resolution", "lowest-direct", *requirements(), at=clone)
        run(own / "pip", "install", "--quiet", "--no-deps", "-e", ".", at=clone)
        print(run(own / "uv", "pip", "list", at=clone), flush=True)
        for script in ("example_text_completion.py", "example_chat_completion.py"):
            run(own / "python", script, at=clone)
            print(f"{script}: runs", flush=True)
        try:
            print(run(own / "python", "-m", "pytest", "-q", *TESTS, at=clone))
        except CalledProcessError as failed:
            sys.exit(failed.stdout)


if __name__ == "__main__":
    sys.exit(main())
