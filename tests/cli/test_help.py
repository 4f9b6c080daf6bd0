"""What the help pages say: every command, every flag once, within the terminal's width."""

import inspect
import re
from collections.abc import Mapping, Sequence

import pytest

from llama.cli import help
from llama.cli.commands import COMMANDS


@pytest.fixture(params=[50, 80, 300])
def columns(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """The width that lines may have in a terminal of so many columns."""
    monkeypatch.setenv("COLUMNS", str(request.param))
    return min(request.param, help.MOST_COLUMNS)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_page_has_every_parameter_with_its_meaning(name: str, columns: int) -> None:
    """Once, as it is given: a place in capitals, a switch without a value. Nothing is offered that -h would be."""
    text = help.page(COMMANDS[name], f"llama {name}")
    assert text.startswith(f"Usage: llama {name} ") and max(map(len, text.split("\n")[1:])) <= columns
    entries = re.findall(r"^  (\S+)  +(\S.*)", text, re.MULTILINE)
    shown = [re.sub(r"^--|=.*", "", label).lower() for label, _ in entries]
    assert sorted(shown) == sorted(inspect.signature(COMMANDS[name]).parameters)


def test_the_first_page_has_every_command_and_a_way_to_start(columns: int) -> None:
    text = help.overview(COMMANDS)
    assert re.findall(r"^  ([a-z]+)  ", text.split("Commands:\n")[1], re.MULTILINE)[: len(COMMANDS)] == list(COMMANDS)
    for said in ('llama complete "Once upon a time"', "llama COMMAND --help", "llama --version", "--completion bash"):
        assert said in text


def command(  # noqa: PLR0913  # a parameter of each kind
    file: str, to: str = "here", *texts: str, output: str, n: int = 1, x: float | None = None, json: bool = False,
    ready: bool = True, stop: Sequence[str] = (), ids: Sequence[int] = (), bias: Mapping[int, float] = {},
) -> None:  # fmt: skip
    """Do it.

    Once.

    Twice: or more.

    Args:
        file: the file.
        texts: the texts.
        output: where to.
        n: how many.
    """


PAGE = """\
Usage: it FILE [TO] [TEXTS]... --output=TEXT [FLAGS]

Do it.

Once.

Twice: or more.

Arguments:
  FILE           the file.
  TO             Default: here.
  TEXTS          the texts.
  --output=TEXT  where to.
  --n=N          how many. Default: 1.
  --x=X
  --json
  --ready        Default: True.
  --stop=TEXT
  --ids=LIST
  --bias=LIST"""


def test_a_page_is_made_of_signature_and_docstring() -> None:
    assert help.page(command, "it") == PAGE
