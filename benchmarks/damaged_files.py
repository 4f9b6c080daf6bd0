"""Damaged checkpoints, many of them: each must run, or be refused in one line with exit code 2.

    python benchmarks/damaged_files.py --examples 10000 --first 0

Example n is `damage(n)` of tests/damage.py: a small checkpoint with one file damaged goes through `llama complete`,
`info`, `verify`, `reshard` and `quantize`, in a process beside this one, so that a crash ends that one. Seeds at which
anything else happened are printed with what did; exit code 1 where any did. The table counts by how `complete` ended,
for damaged checklists by `verify`.
"""

import argparse
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from damage import sound
from witness import Witness

ENDS = ("ran", "refused in one line", "anything else")
ALL = ("all", "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=10000)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    given = parser.parse_args()
    seeds = range(given.first, given.first + given.examples)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        witness = Witness(sound(Path(scratch)))
        counts = Counter(counted(seed, *witness.ask(seed)) for seed in seeds)
        witness.close()
    faults = sum(count for key, count in counts.items() if key[2] == ENDS[2])
    print(f"{table(counts)}\n\nseeds {seeds[0]} to {seeds[-1]} in {time.monotonic() - began:.0f} s, {faults} faults")
    sys.exit(bool(faults))


def counted(seed: int, what: list[str], answer: dict) -> tuple[str, str, str]:
    """(Kind of file, damage, how it ended) of an example; what else happened is printed."""
    if "fault" in answer:
        print(f"seed {seed}, {', '.join(what)}: {answer['fault']}", flush=True)
        return (*what, ENDS[2])
    said = answer["found"]["verify" if what[0] == "checklist" else "complete"]
    return (*what, ENDS[said != "ran"])


def table(counts: Counter) -> str:
    """A row for each kind of file and of damage, and one for all."""
    lines = [f"| file | damage | {' | '.join(ENDS)} |", "| --- | --- | --- | --- | --- |"]
    for what in (*sorted({key[:2] for key in counts}), ALL):
        numbers = [sum(n for key, n in counts.items() if key[2] == end and what in (key[:2], ALL)) for end in ENDS]
        lines.append(f"| {' | '.join((*what, *map(str, numbers)))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
