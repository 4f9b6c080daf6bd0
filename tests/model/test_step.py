"""`Step.pack`: what the docstring's example says, and what it does not accept."""

import pytest
import torch

from llama.model.step import Span, Step

CPU = torch.device("cpu")


def test_the_docstrings_example() -> None:
    step = Step.pack([(3, 0, [1, 7, 8]), (0, 5, [9])], [2, 3], CPU)
    assert step.tokens.tolist() == [1, 7, 8, 9]
    assert step.slots.tolist() == [3, 3, 3, 0]
    assert step.positions.tolist() == [0, 1, 2, 5]
    assert step.logit_rows.tolist() == [2, 3]
    assert step.spans == (Span(3, 0, 3, 0), Span(0, 3, 1, 5))
    assert [span.length for span in step.spans] == [3, 6]
    assert [span.rows for span in step.spans] == [slice(0, 3), slice(3, 4)]
    assert all(t.dtype == torch.int64 for t in (step.tokens, step.slots, step.positions, step.logit_rows))


@pytest.mark.parametrize(
    ("parts", "rows"),
    [([(0, 0, [])], []), ([(0, 0, [1]), (0, 1, [2])], []), ([(0, 0, [1])], [1]), ([(0, -1, [1])], [0])],
)
def test_what_no_step_can_be_is_our_own_mistake(parts: list, rows: list[int]) -> None:
    """An empty part, two parts of one slot, a row that is not there, a position before the first."""
    with pytest.raises(AssertionError):
        Step.pack(parts, rows, CPU)
