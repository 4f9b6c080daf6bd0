"""What was measured, as a record for JSON, and as a table for people; beside an earlier record."""

import json
import math
import statistics
from typing import Any, TypedDict

from llama.errors import ParameterError
from llama.gate import one_line
from llama.paths import read
from llama.wording import in_units

KIND = "llama bench"  # how our records begin
NOISY = 0.1  # of a median
MOST_BYTES = 1 << 20
LIMIT = (
    "limit: a decode step reads the weights and each sequence's keys and values, at the read rate, or multiplies each"
    " sequence's row with every matrix, at the matmul rate, whichever takes longer; a prompt likewise"
)
HEAD = ["figure", "median", "spread", "runs", "limit", "of the limit"]


class Measured(TypedDict):
    """A figure: the median of its runs, and the most that the machine's rates allow (None: not known)."""

    name: str
    unit: str  # tokens/s, s or bytes
    median: float
    spread: float | None  # (most − least) / median; None of a single run
    runs: list[float]
    limit: float | None


class Report(TypedDict):
    kind: str
    run: dict[str, Any]  # what was run, and where
    read_rates: list[float]  # bytes/s, at the start and at the end
    matmul_rate: float  # FLOP/s
    figures: list[Measured]
    missing: dict[str, str]  # name → why
    noise: str | None


def measured(name: str, unit: str, runs: list[float], limit: float | None = None) -> Measured:
    median = statistics.median(runs)
    spread = (max(runs) - min(runs)) / median if len(runs) > 1 else None
    return Measured(name=name, unit=unit, median=median, spread=spread, runs=runs, limit=limit)


def noise(read_rates: list[float], figures: list[Measured]) -> str | None:
    """A line, where the machine was not always as fast."""
    said = []
    if max(read_rates) > (1 + NOISY) * min(read_rates):
        said.append(f"the read rate was {' and then '.join(f'{rate / 1e9:.1f} GB/s' for rate in read_rates)}")
    spread = [one for one in figures if (one["spread"] or 0) > NOISY]
    if spread:
        worst = max(spread, key=lambda one: one["spread"] or 0)
        said.append(
            f"{len(spread)} of {len(figures)} figures varied by more than {NOISY:.0%}, most of all {worst['name']}"
            f" ({worst['spread']:.0%})"
        )
    return f"noisy: {'; '.join(said)}" if said else None


def earlier(path: str) -> Report:
    """The record of an earlier run. Raises ParameterError where the file holds none."""
    advice = "name a file that llama bench --json wrote"
    try:
        found = json.loads(read(path, MOST_BYTES).decode())
    except OSError as error:
        raise ParameterError(f"{path} cannot be read: {error.strerror}; {advice}") from None
    except (ValueError, RecursionError):
        raise ParameterError(f"{path} is not JSON: {advice}") from None
    if not isinstance(found, dict) or found.get("kind") != KIND or not _has_figures(found):
        raise ParameterError(f"{path} is no record of a benchmark: {advice}")
    return found  # type: ignore[return-value]  # what is read of it was checked


def _has_figures(found: dict[str, Any]) -> bool:
    figures = found.get("figures")
    return isinstance(found.get("run"), dict) and isinstance(figures, list) and all(map(_is_figure, figures))


def _is_figure(one: Any) -> bool:
    if not isinstance(one, dict) or not isinstance(one.get("name"), str):
        return False
    median = one.get("median")
    return isinstance(median, int | float) and not isinstance(median, bool) and 0 < median < math.inf


def differences(report: Report, before: Report) -> str | None:
    """A line, where the earlier run was of something else."""
    own, other = report["run"], before["run"]
    said = [f"{name} {other.get(name)!s:.60} (now {own[name]!s:.60})" for name in own if own[name] != other.get(name)]
    return f"the earlier run had {', '.join(said)}" if said else None


# ------------------------------------------------------------------------------------------------------ for people


def rows(report: Report, before: Report | None) -> list[list[str]]:
    """A head, and a row for each figure; beside an earlier run, this one's medians over that one's."""
    old = {one["name"]: one["median"] for one in before["figures"]} if before else {}
    table = [[*HEAD, "× earlier"] if before else HEAD]
    for one in report["figures"]:
        limit, spread = one["limit"], one["spread"]
        cells = [
            one["name"], _shown(one["median"], one["unit"]), "-" if spread is None else f"{spread:.1%}",
            str(len(one["runs"])), _shown(limit, one["unit"]) if limit else "-",
            f"{one['median'] / limit:.2f}" if limit else "-",
        ]  # fmt: skip
        ratio = [f"{one['median'] / old[one['name']]:.2f}" if one["name"] in old else "-"] if before else []
        table.append(cells + ratio)
    return table


def text(report: Report, before: Report | None, *, markdown: bool = False) -> str:
    """Tables and lines for people, or in Markdown."""
    table = rows(report, before)
    if markdown:
        lines = ["| " + " | ".join(cells) + " |" for cells in (table[0], ["---"] * len(table[0]), *table[1:])]
    else:
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ["  ".join(_aligned(cells, widths)).rstrip() for cells in table]
    rate = max(report["read_rates"])
    facts = ", ".join(f"{name} {value}" for name, value in report["run"].items())
    machine = f"machine: reads {rate / 1e9:.1f} GB/s, multiplies {report['matmul_rate'] / 1e9:.1f} GFLOP/s"
    notes = [LIMIT, *(f"missing: {name}: {why}" for name, why in report["missing"].items())]
    notes += filter(None, (report["noise"], differences(report, before) if before else None))
    between = "\n\n" if markdown else "\n"
    return "\n\n".join(
        [between.join(map(one_line, (facts, machine))), "\n".join(lines), between.join(map(one_line, notes))]
    )


def _aligned(cells: list[str], widths: list[int]) -> list[str]:
    """The first to the left, numbers to the right."""
    first, *others = zip(cells, widths, strict=True)
    return [f"{first[0]:<{first[1]}}", *(f"{cell:>{width}}" for cell, width in others)]


def _shown(value: float, unit: str) -> str:
    return in_units(int(value)) if unit == "bytes" else f"{value:.2f} s" if unit == "s" else f"{value:.1f} tokens/s"
