"""A fixed time shared over the figures: in rounds, the most wanted first, and nothing that would not end in time."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from llama.bench.figures import Figure, steps_within

ROUNDS = 5
MARGIN = 1.25  # a longer prompt takes more a token
CHEAP = 0.05  # of the whole time: a figure that takes no more has a first run that does not count
PROBE = Figure(64)

Clock = Callable[[], float]
Run = Callable[[Figure, float], float]  # a figure, and its estimate → seconds of a prompt, or of a decode step


@dataclass(slots=True)
class Samples:
    """Seconds by figure, and what was missed for want of time."""

    runs: dict[Figure, list[float]] = field(default_factory=dict)
    missed: dict[Figure, str] = field(default_factory=dict)
    uncounted: dict[Figure, float] = field(default_factory=dict)

    def known(self, figure: Figure) -> float | None:
        runs = self.runs.get(figure)
        return statistics.median(runs) if runs else self.uncounted.get(figure)

    def estimate(self, figure: Figure) -> float:
        """Seconds of a prompt, or of a step: its own, else those of the nearest that was measured, scaled up."""
        own = self.known(figure)
        if own is not None:
            return own
        found = [one for one in {**self.uncounted, **self.runs} if bool(one.batch) == bool(figure.batch)]
        if figure.batch:
            near = max(found, key=lambda one: (one.batch <= figure.batch, one.tokens == figure.tokens, one.batch))
            return (self.known(near) or 0) * max(1, figure.batch / near.batch)
        near = max(found, key=lambda one: (one.tokens <= figure.tokens, one.tokens))
        return (self.known(near) or 0) * figure.tokens / near.tokens * MARGIN

    def turn(self, figure: Figure) -> float:
        """Seconds of one run of a figure, with what it needs before."""
        if not figure.batch:
            return self.estimate(figure)
        step = self.estimate(figure)
        return (steps_within(step) + 4) * step + (self.estimate(Figure(figure.tokens)) if figure.tokens else 0)


def probe(run: Run, samples: Samples) -> None:
    """Small runs, from which the time of others is estimated."""
    for figure in (PROBE, Figure(0, 1)):
        samples.uncounted[figure] = min(run(figure, 1.0) for _ in range(2))


def measure(
    run: Run, figures: Sequence[Figure], seconds: float, left: Clock, tell: Callable[[Figure, Samples], object]
) -> Samples:
    """Run each figure up to ROUNDS times, in turns, within what is `left` of `seconds`."""
    samples = Samples()
    if left() <= 0:
        samples.missed = dict.fromkeys(figures, "no time was left")
        return samples
    probe(run, samples)
    for _ in range(ROUNDS):
        for figure in figures:
            takes, rest = samples.turn(figure), left()
            first = figure not in samples.runs
            if takes > rest:
                if first:
                    samples.missed[figure] = f"would take about {takes:.1f} s, {max(rest, 0):.1f} s were left"
                continue
            if first and takes < min(CHEAP * seconds, rest / 2):
                samples.uncounted[figure] = run(figure, samples.estimate(figure))
            took = run(figure, samples.estimate(figure))
            samples.runs.setdefault(figure, []).append(took)
            samples.missed.pop(figure, None)
            tell(figure, samples)
    return samples
