"""What the service counts, in Prometheus's text format.

Format: https://prometheus.io/docs/instrumenting/exposition_formats/
"""

import math
import time
from bisect import bisect_left
from collections import Counter, deque

from llama.request import Request

FIRST_TOKEN_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, math.inf)  # upper bounds
WINDOW = 10  # seconds over which tokens/s are taken


class Metrics:
    """Counters since the start. `sample` is to be called once a second."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()  # by path and status
        self.prompt_tokens = self.completion_tokens = 0  # of samples that have ended
        self._first_token = [0] * len(FIRST_TOKEN_SECONDS)
        self._first_token_sum = 0.0
        self._samples: deque[tuple[float, int]] = deque(maxlen=WINDOW + 1)

    def count(self, request: Request, asked: float) -> None:
        """A request of the engine that has ended; `asked` is when it came, on the clock of its own times."""
        self.prompt_tokens += len(request.prompt)
        self.completion_tokens += len(request.tokens)
        if request.first_token is not None:
            seconds = request.first_token - asked
            self._first_token[bisect_left(FIRST_TOKEN_SECONDS, seconds)] += 1
            self._first_token_sum += seconds

    def sample(self, tokens: int) -> None:
        """Note how many tokens have been made so far."""
        self._samples.append((time.monotonic(), tokens))

    @property
    def tokens_per_second(self) -> float:
        if len(self._samples) < 2:
            return 0.0
        (first, before), (last, now) = self._samples[0], self._samples[-1]
        return (now - before) / (last - first)

    def text(self, running: int, waiting: int, completion_tokens: int) -> str:
        """All of them, with what only who runs the samples knows."""
        lines = _metric("requests_total", "counter", "Answers, by path and HTTP status.", {
            f'{{path="{path}",status="{status}"}}': count for (path, status), count in sorted(self.requests.items())
        })  # fmt: skip
        for name, kind, said, value in (
            ("requests_running", "gauge", "Samples that have a slot.", running),
            ("requests_waiting", "gauge", "Samples that wait for one.", waiting),
            ("prompt_tokens_total", "counter", "Prompt tokens of the samples that have ended.", self.prompt_tokens),
            ("completion_tokens_total", "counter", "Tokens made.", completion_tokens),
            ("completion_tokens_per_second", "gauge", f"Over {WINDOW} seconds.", round(self.tokens_per_second, 2)),
        ):
            lines += _metric(name, kind, said, {"": value})
        return "\n".join([*lines, *self._first_token_lines(), ""])

    def _first_token_lines(self) -> list[str]:
        name, total, values = "time_to_first_token_seconds", 0, dict[str, float]()
        for bound, count in zip(FIRST_TOKEN_SECONDS, self._first_token, strict=True):
            total += count
            values[f'_bucket{{le="{"+Inf" if bound == math.inf else bound}"}}'] = total
        values |= {"_sum": round(self._first_token_sum, 6), "_count": total}
        return _metric(name, "histogram", "From queueing to the first token, of samples that have ended.", values)


def _metric(name: str, kind: str, said: str, values: "dict[str, int] | dict[str, float]") -> list[str]:
    name = f"llama_{name}"
    return [
        f"# HELP {name} {said}",
        f"# TYPE {name} {kind}",
        *(f"{name}{key} {value}" for key, value in values.items()),
    ]
