"""Check that the set-up commands work on every supported Python of this machine: python tools/check_install.py

For each Python: a dry run of pip's resolver over constraints.txt with the extras test and bench, and whatever build of
torch it finds. For the oldest: its own pip reads the package. For the newest but the default (or the one that --demo
names): the whole of `make demo`, in a folder named llama whose path has a space and an umlaut, and then the package
used from the folder above. The last line counts the checks.
"""

import argparse
import atexit
import functools
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SUPPORTED = range(10, 15)  # of Python 3
AT_ONCE = 2  # checks: each waits for the network half of its time
NOT_COPIED = shutil.ignore_patterns(".git", ".venv", "build", "dist", "*.egg-info", "*.so", "__pycache__", ".*_cache")


def pythons() -> dict[str, str]:
    """Version → path of each supported Python: on the path, or beside this one, as version managers lay them."""
    found: dict[str, str] = {}
    for minor in SUPPORTED:
        name = f"python3.{minor}"
        beside = sorted(Path(sys.base_prefix).parent.glob(f"*/bin/{name}"))
        for path in filter(None, [shutil.which(name), *map(str, beside)]):
            if f"3.{minor}" not in found and _runs(path):
                found[f"3.{minor}"] = path
    return found


def _runs(python: str) -> bool:
    """Whether it starts, with what a virtual environment needs; a version manager's placeholder does not."""
    return subprocess.run([python, "-c", "import ensurepip, venv"], capture_output=True).returncode == 0


@functools.cache
def newest_pip() -> Path:
    """The newest pip, which resolves in half the time of those that the Pythons bring, in an environment of its own."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)
    run(sys.executable, "-m", "venv", folder)
    pip = folder / "bin" / "pip"
    run(pip, "install", "--quiet", "--upgrade", "pip")
    return pip


def resolves(python: str, folder: Path) -> None:
    """One set of versions fits the constraints and the extras."""
    run(python, "-m", "venv", "--without-pip", folder / "venv")
    program = folder / "venv" / "bin" / "python"
    constraints = ROOT / "constraints.txt"
    run(newest_pip(), "--python", program, "install", "--quiet", "--dry-run", "-c", constraints, f"{ROOT}[test,bench]")


def own_pip_reads(python: str, folder: Path) -> None:
    """The pip that a Python brings understands how the package is described."""
    run(python, "-m", "venv", folder / "venv")
    run(folder / "venv" / "bin" / "pip", "install", "--quiet", "--dry-run", "--no-deps", ROOT)


def demo_runs(python: str, folder: Path) -> None:
    """`make demo`, and then the package from the folder above its clone, which Python could take for the package."""
    clone = folder / "a folder of Jürgen's" / "llama"
    shutil.copytree(ROOT, clone, ignore=NOT_COPIED)
    run("make", "demo", f"PYTHON={python}", at=clone)
    above, programs = clone.parent, clone / ".venv" / "bin"
    run(programs / "python", "-c", "from llama import Llama", at=above)
    run(programs / "llama", "complete", "Ben wanted a red kite.", "--quiet", at=above)
    run(programs / "torchrun", "--nproc_per_node", "1", "-m", "llama", "complete", "Ben had", "--quiet", at=above)


def run(*command: str | Path, at: Path | None = None) -> str:
    """What a command prints; raises CalledProcessError, which holds it too, unless it succeeds."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("LLAMA_", "PYTHONPATH"))}
    done = subprocess.run(
        list(map(str, command)), cwd=at, env=environment, check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        encoding="utf-8", errors="replace",
    )  # fmt: skip
    return done.stdout


def checks(demo: str | None) -> Iterator[tuple[str, Callable[[str, Path], None], str]]:
    """(What is said of it, check, Python) for all that this machine can show."""
    found = pythons()
    default = f"3.{sys.version_info.minor}"
    others = [version for version in found if version != default]
    if not others:
        print(f"only Python {default} is here: no other one is checked")
    version = demo or (others or [default])[-1]
    yield f"Python {version}: make demo, and the package from elsewhere", demo_runs, found[version]
    for version, python in found.items():
        yield f"Python {version}: the constraints fit together", resolves, python
    oldest = next(iter(found))
    yield f"Python {oldest}: its own pip reads the package", own_pip_reads, found[oldest]


def answer(title: str, check: Callable[[str, Path], None], python: str) -> bool:
    """Make one check, and say how it went."""
    began, folder = time.monotonic(), Path(tempfile.mkdtemp())
    try:
        check(python, folder)
    except subprocess.CalledProcessError as error:
        print(f"{title}: NO\n{error}\n{error.stdout}", flush=True)
        return False
    finally:
        shutil.rmtree(folder)
    print(f"{title}: yes ({time.monotonic() - began:.0f} s)", flush=True)
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", metavar="3.N", choices=pythons(), help="the Python of make demo")
    demo = parser.parse_args().demo
    with ThreadPoolExecutor(AT_ONCE) as pool:
        answers = [asked.result() for asked in [pool.submit(answer, *check) for check in checks(demo)]]
    print(f"{sum(answers)} passed, {answers.count(False)} failed")
    return 0 if all(answers) else 1


if __name__ == "__main__":
    sys.exit(main())
