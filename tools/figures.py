"""Copy figures from benchmarks/RESULTS.md into README and docs/: python tools/figures.py

A page says where: what stands between `<!-- figures: NAME -->` and `<!-- end -->` is written anew, by the function of
that name below.
"""

import re
import textwrap
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MARKED = re.compile(r"(?<!`)(<!-- figures: (\S+) -->)(\n?).*?(<!-- end -->)", re.DOTALL)
Table = list[list[str]]  # the head, then the rows
PROCESSORS = {  # sections of the same comparison
    "Beside the peers on a CPU": "Intel Xeon, AMX",
    "Beside the peers in bf16 on an AMD EPYC of Zen 5": "AMD EPYC, Zen 5",
    "Beside the peers in bf16 on an AMD EPYC of Zen 4": "AMD EPYC, Zen 4",
}


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def filled(text: str) -> str:
    """A page with its figures as RESULTS.md has them."""

    def fill(found: re.Match[str]) -> str:
        begin, name, line, end = found.groups()
        return f"{begin}{line}{FIGURES[name]()}{line}{end}"

    return MARKED.sub(fill, text)


def table_after(section: str, label: str) -> Table:
    """The first table after a line that begins with `label`, in the section whose title begins so."""
    results = (ROOT / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8")
    own = next(part for part in results.split("\n## ") if part.startswith(section))
    after = own[re.search(rf"^{re.escape(label)}", own, re.MULTILINE).start() :]
    lines = re.search(r"^(\|.*\n)+", after, re.MULTILINE)[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [rows[0], *rows[2:]]


def markdown(table: Table) -> str:
    lines = [table[0], ["---"] * len(table[0]), *table[1:]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def peers() -> str:
    """The runners beside each other on the first CPU."""
    return markdown(table_after("Beside the peers on a CPU", "1.1B:"))


def processors() -> str:
    """The runners beside each other in bfloat16, on each processor."""
    tables = {name: table_after(section, "1.1B:") for section, name in PROCESSORS.items()}
    head = next(iter(tables.values()))[0]
    rows = [[name, row[0], *row[2:6]] for name, (_, *own) in tables.items() for row in own if row[1] == "bf16"]
    return markdown([["processor", head[0], *head[2:6]], *rows])


def quality() -> str:
    return markdown(table_after("Quality of quantised weights", ""))


def startup() -> str:
    return next(ratio for name, _, ratio in table_after("Start-up", "") if name.startswith("one token"))


def decode(weights: str) -> dict[tuple[str, str], tuple[str, str]]:
    """(Batch, context) → (tokens a second, share of the limit) on the GPU."""
    rows = table_after("On an H200", f"{weights}, decode")[1:]
    return {(batch, context): (speed, share) for batch, context, speed, _, share, *_ in rows}


def gpu() -> str:
    """Llama-2-7B on one GPU: a table of selected lines."""
    contexts = ("128", "1024", "3900")
    bf16, rows = decode("bf16"), []
    for batch in ("1", "32"):
        speeds, shares = zip(*(bf16[batch, context] for context in contexts), strict=True)
        rows.append([f"bf16, batch {batch}, context {'; '.join(contexts)}", "; ".join(speeds), "; ".join(shares)])
    rows += [[f"{weights}, batch 1, context 1024", *decode(weights)["1", "1024"]] for weights in ("int8", "int4")]
    prompt = table_after("On an H200", "| prompt |")[1]
    rows.append([f"prefill of {prompt[0]}", prompt[1], prompt[4]])
    return markdown([["7B", "tokens/s", "of the limit"], *rows, _requests()])


def _requests() -> list[str]:
    results = (ROOT / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8")
    found = re.search(r"^256 requests, 64 at once: (\d+) new tokens/s, (\S+) of the limit", results, re.MULTILINE)
    return ["256 requests of 100 to 1024 tokens, 64 at once", f"{found[1]} new", found[2]]


def gpu_sentence() -> str:
    """The same in a sentence."""
    (one, its), (many, theirs) = (decode("bf16")[batch, "1024"] for batch in ("1", "32"))
    sentence = (
        f"On one NVIDIA H200, Llama-2-7B's shape in bfloat16 decodes {one} tokens a second for one sequence, and {many}"
        f" for 32 sequences, each with 1,024 tokens of context. That is {float(its):.0%} and {float(theirs):.0%} of"
        " what the rates of its memory and its products, measured in the same run, allow."
    )
    return textwrap.fill(sentence, 120)


FIGURES: dict[str, Callable[[], str]] = {
    "cpu": processors,
    "cpu-all": peers,
    "quality": quality,
    "startup": startup,
    "gpu": gpu,
    "gpu-sentence": gpu_sentence,
}


if __name__ == "__main__":
    for page in pages():
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
