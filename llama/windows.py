"""Texts that are longer than a model's context, scored by windows that slide over them."""

import math
from dataclasses import dataclass

from llama.errors import ParameterError
from llama.request import Prompt


@dataclass(frozen=True, slots=True)
class Windows:
    """Windows of `context` tokens, each of which begins `stride` tokens behind the one before it."""

    stride: int
    context: int

    @classmethod
    def of(cls, stride: int | None, context: int | None, max_seq_len: int, *, always: bool = False) -> "Windows | None":
        """None where neither is given, unless `always`. Left out, `context` is max_seq_len, and `stride` half of it.

        Raises ParameterError.
        """
        if stride is None and context is None and not always:
            return None
        context = _whole("context", max_seq_len if context is None else context, 2, max_seq_len, "max_seq_len")
        stride = _whole("stride", context // 2 if stride is None else stride, 1, context - 1, "context - 1")
        return cls(stride, context)

    def over(self, tokens: list[int]) -> list[Prompt]:
        """The windows of a text, in each of which those tokens are scored that no earlier one has.

        With a context of 4 and a stride of 2 the tokens 0 … 6 are read as 0 1 2 3, where 1 to 3 are scored, 2 3 4 5,
        where 4 and 5 are, and 4 5 6, where 6 is. So a scored token has at least context - stride tokens before it,
        but in the first window, in which no more are there.
        """
        more = max(0, len(tokens) - self.context)
        starts = range(0, self.stride * math.ceil(more / self.stride) + 1, self.stride)
        return [
            Prompt(tokens[start : start + self.context], scored_from=self.context - self.stride if start else 1)
            for start in starts
        ]


def bits_per_byte(logprobs: list[float | None], text: str) -> float | None:
    """What a text costs: −Σ log₂ p over its bytes in UTF-8; None for a text of none."""
    size = len(text.encode())
    return -math.fsum(logprob for logprob in logprobs if logprob is not None) / math.log(2) / size if size else None


def _whole(name: str, value: int, low: int, high: int, limit: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ParameterError(f"{name}={value!r} is out of range: expected an integer from {low} to {high} ({limit})")
    return value
