"""`Step`: the contents of one pass through the model, a packed list of tokens of any number of sequences."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

SHORT = 16  # a span of up to so many tokens is computed on a CPU exactly as they are one after the other


@dataclass(frozen=True, slots=True)
class Span:
    """One sequence's tokens in a step: rows first_row … first_row + n − 1, at positions start … start + n − 1."""

    slot: int
    first_row: int
    n: int
    start: int

    @property
    def length(self) -> int:
        """How many of the slot's positions are in use once this span's keys are written."""
        return self.start + self.n

    @property
    def rows(self) -> slice:
        return slice(self.first_row, self.first_row + self.n)


@dataclass(frozen=True, slots=True)
class Step:
    """N packed tokens, and the R rows whose logits are wanted.

    Example: slot 3 starts a prompt [1, 7, 8] while slot 0, which holds 5 tokens, decodes token 9:
    tokens [1, 7, 8, 9], slots [3, 3, 3, 0], positions [0, 1, 2, 5], logit_rows [2, 3],
    spans (Span(3, 0, 3, 0), Span(0, 3, 1, 5)).
    """

    tokens: Tensor  # (N,) int64
    slots: Tensor  # (N,) int64
    positions: Tensor  # (N,) int64
    logit_rows: Tensor  # (R,) int64
    spans: tuple[Span, ...]
    all_logits: bool  # the logits of all tokens are wanted, in their order
    decodes: bool  # that, and each sequence has one token

    @classmethod
    def pack(
        cls, parts: Iterable[tuple[int, int, Sequence[int]]], logit_rows: Sequence[int], device: torch.device
    ) -> "Step":
        """Pack parts (slot, position of the first token, tokens), each of another slot, none empty."""
        tokens: list[int] = []
        slots: list[int] = []
        positions: list[int] = []
        spans: list[Span] = []
        for slot, start, part in parts:
            spans.append(Span(slot, len(tokens), len(part), start))
            tokens += part
            slots += [slot] * len(part)
            positions += range(start, start + len(part))
        assert all(span.n > 0 and span.start >= 0 for span in spans)
        assert len({span.slot for span in spans}) == len(spans), "one span a slot"
        assert all(0 <= row < len(tokens) for row in logit_rows)
        host = torch.tensor([tokens, slots, positions], dtype=torch.int64).to(device)
        rows = torch.tensor(logit_rows, dtype=torch.int64).to(device)
        all_logits = list(logit_rows) == list(range(len(tokens)))
        return cls(host[0], host[1], host[2], rows, tuple(spans), all_logits, all_logits and len(spans) == len(tokens))

    def to(self, device: torch.device) -> "Step":
        """The same step with its tensors on that device."""
        if self.tokens.device == device:
            return self
        names = ("tokens", "slots", "positions", "logit_rows")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})
