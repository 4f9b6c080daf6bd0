"""How long a fresh interpreter takes to the first token of the bundled demo checkpoint, beside `import torch` alone.

python startup.py [--runs 9]

Whole processes, in turns, from their start to their end.
"""

import statistics
import subprocess
import sys
import time

import fire
from report import header, table

GOAL = 1.25  # times `import torch`
COMMANDS = {
    "import torch": ["-c", "import torch"],
    "one token (llama complete)": ["-m", "llama", "complete", "Once upon a time", "--max_gen_len", "1", "--quiet"],
    "a help page (llama --help)": ["-m", "llama", "--help"],
    "import llama": ["-c", "import llama"],
}


def main(runs: int = 9) -> None:
    """Print medians and ratios to `import torch`."""
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(runs + 1):
        for name, words in COMMANDS.items():
            begun = time.perf_counter()
            subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)
            times[name].append(time.perf_counter() - begun)
    medians = {name: statistics.median(every[1:]) for name, every in times.items()}  # the first fills file caches
    base = medians["import torch"]
    print(header())
    print(f"median of {runs}; goal for one token: at most {GOAL} × import torch\n")
    rows = [[name, f"{median:.2f}", f"{median / base:.2f}"] for name, median in medians.items()]
    print(table(["process", "seconds", "ratio"], rows))


if __name__ == "__main__":
    fire.Fire(main)
