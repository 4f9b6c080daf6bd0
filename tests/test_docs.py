"""README and docs/: what they show is printed, their links lead somewhere, their figures are those of RESULTS.md.

docs/development.md says how a page marks what is run and what is not.
"""

import importlib
import json
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import ROOT
from talks import CTRL_D, HAS_READ, READS, end, start

sys.path.insert(0, str(ROOT / "tools"))
figures = importlib.import_module("figures")
PAGES = [*figures.pages(), ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
BLOCK = re.compile(
    r"(?P<mark><!-- not run: [^\n]+ -->\n)?^```(?P<kind>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)
TIME = re.compile(r"\b[\d.]+(?= s\b| tokens/s)")  # differs from run to run
DECIMAL = re.compile(r"\d+\.\d+")


@dataclass(frozen=True, slots=True)
class Shown:
    """Something to run, and what a page says that it prints."""

    where: str
    kind: str  # sh, python, chat
    text: str
    expected: str


def line_of(page: str, place: int) -> int:
    return page.count("\n", 0, place) + 1


def commands(text: str) -> list[tuple[str, str]]:
    """(Command, what it prints) of a console block."""
    parts = re.split(r"^\$ ", text, flags=re.MULTILINE)
    assert parts[0] == "", "a console block begins with a command"
    return [tuple(part.split("\n", 1)) for part in parts[1:]]


def shown_on(path: Path) -> list[Shown]:
    """All that a page shows and that is run, in its order."""
    page, found = path.read_text(encoding="utf-8"), []
    for block in BLOCK.finditer(page):
        where, kind, text = f"{path.name}:{line_of(page, block.start())}", block["kind"], block["text"]
        if block["mark"]:
            continue
        if kind == "console":
            for command, expected in commands(text):
                found.append(Shown(where, "chat" if command.startswith("llama chat") else "sh", command, expected))
        elif kind == "python":
            found.append(Shown(where, "python", text, ""))
        elif kind == "output":
            assert found and found[-1].kind == "python", f"{where}: output of what?"
            found[-1] = Shown(found[-1].where, "python", found[-1].text, text)
        else:
            raise AssertionError(f"{where}: a block is console, python or output, or has a comment before it: not run")
    return found


def as_python(shown: Shown) -> tuple[str, str]:
    """(Kind, text) as transcripts.py takes it. `cat` writes the file that is not there yet."""
    program, *words = shlex.split(shown.text) if shown.kind == "sh" else ("", "")
    if program != "cat":
        return shown.kind, shown.text
    return "python", (
        f"from pathlib import Path; file = Path({words[0]!r})\n"
        f"if not file.exists(): file.write_text({shown.expected!r}, encoding='utf-8')\n"
        "print(file.read_text(encoding='utf-8'), end='')"
    )


def agree(expected: str, printed: str) -> bool:
    """Whether a page shows what is printed: but for times, the last digit of decimals, and what … stands for."""
    expected, printed = (TIME.sub("0", text).strip() for text in (expected, printed))
    pattern = "".join(
        ".*" if part == "…" else r"(\d+\.\d+)" if DECIMAL.fullmatch(part) else re.escape(part)
        for part in re.split(r"(…|\d+\.\d+)", expected)
    )
    matched = re.fullmatch(pattern, printed, re.DOTALL)
    return matched is not None and all(map(near, DECIMAL.findall(expected), matched.groups()))


def near(expected: str, printed: str) -> bool:
    places = len(expected.partition(".")[2])
    return len(printed.partition(".")[2]) == places and abs(float(expected) - float(printed)) < 1.5 * 10**-places


@pytest.mark.parametrize(
    ("expected", "printed", "same"),
    [
        ("a 1.25 b\n", "a 1.26 b", True),
        ("a 1.25 b", "a 1.27 b", False),
        ("a 1.25 b", "a 1.250 b", False),
        ("12 out in 0.04 s (27.4 tokens/s)", "12 out in 1.5 s (3.1 tokens/s)", True),
        ("12 out", "13 out", False),
        ("…/demo: 3 files", "/a/b/demo: 3 files", True),
        ("one\n…\nfour", "one\ntwo\nthree\nfour", True),
        ("one\n…\nfour", "one\ntwo\nthree\nfive", False),
    ],
)
def test_pages_and_prints_are_compared_so(expected: str, printed: str, same: bool) -> None:
    assert agree(expected, printed) is same


def test_what_the_pages_show_is_what_is_printed() -> None:
    pages = [[one for one in shown_on(path) if one.kind != "chat"] for path in PAGES]
    assert sum(map(len, pages)) >= 20
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "transcripts.py")], capture_output=True, encoding="utf-8", timeout=300,
        input=json.dumps([[as_python(one) for one in page] for page in pages]),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for page, printed in zip(pages, json.loads(done.stdout), strict=True):
        for one, text in zip(page, printed, strict=True):
            assert "Traceback" not in text, f"{one.where}: {one.text}\n{text}"
            assert agree(one.expected, text), f"{one.where}: {one.text}\nprints:\n{text}\nnot:\n{one.expected}"


TALKS = [one for path in PAGES for one in shown_on(path) if one.kind == "chat"]


@pytest.mark.parametrize("talk", TALKS, ids=[talk.where for talk in TALKS])
def test_the_talks_that_the_pages_show(talk: Shown, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is typed stands after "> "; the screen shows the rest."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # the pages show a CPU
    greeting, *turns = re.split(r"^> ", talk.expected, flags=re.MULTILINE)
    program, *words = shlex.split(talk.text)
    child = start(tmp_path, "-m", program, *words)
    assert agree(greeting, screen(child.before))
    for turn in turns:
        typed, expected = turn.split("\n", 1)
        child.send(typed + "\r")
        child.expect_exact(HAS_READ)
        child.expect_exact(READS)
        assert agree(expected, screen(child.before)), f"{talk.where}: {typed}\nprints:\n{child.before}"
    child.send(CTRL_D)
    assert end(child) == 0


def screen(sent: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", sent).replace("\r", "")


def anchors(page: str) -> set[str]:
    """The names of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", page, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", PAGES, ids=[path.name for path in PAGES])
def test_links_lead_to_pages_and_headings(path: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        if not link.startswith("https://"):
            name, _, heading = link.partition("#")
            target = (path.parent / name).resolve() if name else path
            assert target.exists(), f"{path.name}: {link}"
            assert not heading or heading in anchors(target.read_text(encoding="utf-8")), f"{path.name}: {link}"


@pytest.mark.parametrize("path", PAGES, ids=[path.name for path in PAGES])
def test_files_that_a_page_names_are_there(path: Path) -> None:
    """Scripts and folders in `…`, from the root of the repository."""
    text = path.read_text(encoding="utf-8")
    for name in re.findall(r"`((?:llama|tests|tools|benchmarks|examples|docs)/[\w./]*)`", text):
        assert (ROOT / name).exists(), f"{path.name}: {name}"


@pytest.mark.parametrize("path", figures.pages(), ids=[path.name for path in figures.pages()])
def test_figures_are_those_of_the_results(path: Path) -> None:
    """If this fails: python tools/figures.py"""
    page = path.read_text(encoding="utf-8")
    assert figures.filled(page) == page


def test_the_design_page_names_every_room() -> None:
    rooms = importlib.import_module("test_layout").FLOORS
    page = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    table = page[page.index("| room") : page.index("`llama/demo/`")]
    assert {name for floor in rooms for name in floor} == set(re.findall(r"`(\w+)/?`", "\n".join(firsts(table)))) - {
        "llama"
    }


def firsts(table: str) -> list[str]:
    """The first cell of each row."""
    return [line.split("|")[1] for line in table.splitlines() if line.startswith("| ")]


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 160
