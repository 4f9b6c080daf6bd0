"""The scores of a file's texts: those of `Llama.score`, an error in the place of a line that has none, and the sums."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from llama import Llama
from llama.batch.lines import Format
from llama.cli.score import AT_ONCE, Total, heading, opened, row, scores
from llama.errors import PromptError

TEXTS = ["Once upon a time", "Ben wanted a red kite.", " Two  spaces", "é😀"]


def scored(llama: Llama, path: Path, lines: Sequence[bytes], form: Format = "text", top: int = 0) -> list[dict]:
    path.write_bytes(b"\n".join(lines))
    return list(scores(llama, opened(str(path)), form, top))


def test_a_score_is_that_of_the_library(demo: Llama, tmp_path: Path) -> None:
    """With its line and text; blank lines have no record, but they count."""
    found = scored(demo, tmp_path / "texts", [b"", *(text.encode() for text in TEXTS), b" "], top=2)
    assert [(record.pop("line"), record.pop("text")) for record in found] == list(enumerate(TEXTS, 2))
    assert found == demo.score(TEXTS, top_logprobs=2)


@pytest.mark.parametrize(
    ("form", "line", "said"),
    [
        ("text", b"\xff", "not UTF-8 text (invalid start byte at byte 0): convert it first"),
        ("jsonl", b'"\xff"', "not UTF-8 text (invalid start byte at byte 1): convert it first"),
        ("jsonl", b"{", "not JSON (Expecting property name"),
        ("jsonl", b"[" * 9999, "not JSON (maximum recursion"),
        ("jsonl", b"[1]", 'expected a JSON string or {"text": "…"}'),
        ("jsonl", b'{"prompt": "x"}', 'expected a JSON string or {"text": "…"}'),
        ("jsonl", b'{"text": 5}', 'expected a JSON string or {"text": "…"}'),
        ("jsonl", rb'"\ud800"', "the text holds half a surrogate pair"),
        ("text", b"x" * 999, "the text has 1001 tokens, more than max_seq_len=512: shorten it, or build with"),
    ],
)
def test_a_line_without_a_score_says_why(demo: Llama, tmp_path: Path, form: Format, line: bytes, said: str) -> None:
    """Those around it have theirs."""
    good = [b'"Once upon a time"', b'{"text": "Once upon a time", "id": 5}'] if form == "jsonl" else [b"Once"] * 2
    first, bad, last = scored(demo, tmp_path / "texts", [good[0], line, good[1]], form)
    assert set(bad) == {"line", "error"} and bad["line"] == 2 and bad["error"].startswith(said)
    assert first["perplexity"] == last["perplexity"] and (first["line"], last["line"]) == (1, 3)


def test_a_file_is_scored_in_pieces(demo: Llama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most AT_ONCE texts go to the engine together, and the records are those of all of them in order."""
    sizes = []
    score_each = demo.score_each
    monkeypatch.setattr(demo, "score_each", lambda texts, **more: sizes.append(len(texts)) or score_each(texts, **more))
    found = scored(demo, tmp_path / "texts", [f"{n}".encode() for n in range(AT_ONCE + 3)])
    assert sizes == [AT_ONCE, 3]
    assert [(record["line"], record["text"]) for record in found] == [(n + 1, f"{n}") for n in range(AT_ONCE + 3)]


def test_a_file_that_cannot_be_read_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match="none cannot be read: No such file"):
        opened(str(tmp_path / "none"))
    (tmp_path / "lines").write_text("a\n\nb")
    assert list(opened(str(tmp_path / "lines"))) == [(1, b"a"), (3, b"b")]


def record(text: str, *logprobs: float) -> dict[str, Any]:
    known = [None, *logprobs]
    perplexity = math.exp(-sum(logprobs) / len(logprobs)) if logprobs else None
    return {"line": 1, "text": text, "tokens": [1] * len(known), "logprobs": known, "perplexity": perplexity}


def test_the_sum_weighs_tokens_not_texts() -> None:
    total = Total()
    assert total.line() == "0 texts, 0 scored tokens, no perplexity"
    total.add(record("a", -1.0))
    assert total.line() == f"1 text, 1 scored tokens, perplexity {math.e:.4f}"
    total.add(record("b", -2.0, -3.0, -4.0))
    total.add({"line": 3, "error": "no"})
    total.add(record(""))
    assert total.line() == f"4 texts, 1 failed, 4 scored tokens, perplexity {math.exp(2.5):.4f}"


def test_rows_stand_under_their_heading() -> None:
    """The text on one line, cut, and harmless to a terminal."""
    assert heading() == "perplexity  tokens  text"
    assert row(record("a\x1b  b\n" + "c" * 80, -1.0, -1.0)) == "     2.718       2  a␛ b " + "c" * 55 + "…"
    assert row(record("")) == "         -       0  "
    assert row({"line": 7, "error": "no"}) == "         -       -  line 7: no"
