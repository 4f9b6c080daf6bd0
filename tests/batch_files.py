"""Files of prompts, and runs over them as the command makes them."""

import json
import os
from pathlib import Path
from typing import Any

NAMES = ["Tom", "Mia", "Ben", "Zoë", "Peter", "Vera", "Noah", "Ada"]
FIRST = "Once upon a time there was a small {animal} named {name}."
ANIMALS = ["fox", "bear", "owl", "cat", "beaver", "rabbit", "dog"]


def lines(count: int) -> list[str]:
    """Requests of every kind, a bad one now and then; blank lines too."""
    made = []
    for i in range(count):
        text = FIRST.format(animal=ANIMALS[i % 7], name=NAMES[i % 8])
        dialog = [{"role": "user", "content": f"What sound does a {ANIMALS[i % 7]} make?"}]
        body = {"model": "demo", "messages": dialog, "max_tokens": 5 + i % 20, "temperature": 0.7}
        made.append(
            [
                json.dumps({"prompt": text, "id": f"story {i}", "max_gen_len": 10 + i % 30}),
                json.dumps({"messages": dialog, "id": i, "logprobs": True, "top_logprobs": 2, "max_gen_len": 20}),
                json.dumps(dialog),
                json.dumps({"custom_id": f"c{i}", "method": "POST", "url": "/v1/chat/completions", "body": body}),
                json.dumps({"prompt": text, "n": 2, "seed": i, "max_gen_len": 8}),
                '{"prompt": torn',
                "",
            ][i % 7]
        )
    return made


def records(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.read_text().splitlines()]


def sorted_lines(output: Path) -> list[bytes]:
    return sorted(output.read_bytes().splitlines(keepends=True))


def environment() -> dict[str, str]:
    """No flags of the user's; but the kernels are those of the tests, with which a process is compared."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("LLAMA_") or key == "LLAMA_KERNELS"}
    return {**kept, "OMP_NUM_THREADS": "1"}
