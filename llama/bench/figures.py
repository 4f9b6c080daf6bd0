"""What is measured, the most wanted first."""

from collections.abc import Sequence
from dataclasses import dataclass

PROMPTS = (512, 128, 2048)
CONTEXTS = (0, 2048)
STEPS = 32  # of a decode run; fewer where they take long
RUN_SECONDS, FEWEST_STEPS = 1.0, 4  # a run that would take longer has fewer steps, but so many
LONGEST = 2048 + 2 * STEPS  # max_seq_len where nobody says: room for the longest context and what is decoded after it
MOST_BATCH = 64  # sequences at once where nobody says


@dataclass(frozen=True, slots=True)
class Figure:
    """Tokens/s of one prompt of `tokens` (batch 0), or of decoding `batch` sequences that have `tokens` before."""

    tokens: int
    batch: int = 0

    @property
    def name(self) -> str:
        return f"decode, batch {self.batch}, context {self.tokens}" if self.batch else f"prefill {self.tokens}"

    @property
    def needed(self) -> int:
        """The least max_seq_len that it can be measured with."""
        return max(self.tokens, 1) + (STEPS + 1 if self.batch else 1)


def steps_within(estimate: float) -> int:
    """Of a decode run, where one takes about so many seconds."""
    return max(FEWEST_STEPS, min(STEPS, int(RUN_SECONDS / max(estimate, 1e-6))))


def batches(most: int) -> list[int]:
    """1, 2, 4, 8, … up to `most`, and that."""
    return sorted({most, *(1 << n for n in range(most.bit_length()))})


def wanted(most: int) -> list[Figure]:
    """All figures for up to `most` sequences: what a long context needs comes last, behind the prompt that makes it."""
    order = sorted(batches(most), key=lambda batch: (batch not in (1, 8), batch))
    first, *others = (Figure(n) for n in PROMPTS)
    short, long = ([Figure(context, batch) for batch in order] for context in CONTEXTS)
    return [first, *short[:2], *others[:1], *short[2:], *others[1:], *long]


def too_long(figures: Sequence[Figure], max_seq_len: int) -> dict[Figure, str]:
    """Those that do not fit, and why."""
    return {one: f"needs --max_seq_len {one.needed}" for one in figures if one.needed > max_seq_len}
