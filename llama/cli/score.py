"""Files of texts → how probable the model finds each: records for JSON, rows for people."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

from llama.batch.lines import Format, numbered_lines, whole_file
from llama.errors import LlamaError
from llama.gate import harmless
from llama.windows import Windows
from llama.wording import utf8

if TYPE_CHECKING:
    from llama.generation import Llama

AT_ONCE = 64  # texts handed to the engine together
_SHOWN = 60  # characters of a text in a row


@dataclass(slots=True)
class Total:
    """The sums of a file. Perplexity is exp(−mean log p) over all of its tokens but each text's first.

    `bytes` are those of texts that were scored by windows.
    """

    texts: int = 0
    failed: int = 0
    tokens: int = 0
    logprob: float = 0.0
    bytes: int = 0

    def add(self, record: dict[str, Any]) -> None:
        self.texts += 1
        if "error" in record:
            self.failed += 1
            return
        self.tokens += len(_known(record))
        self.logprob += sum(_known(record))
        if "bits_per_byte" in record:
            self.bytes += len(record["text"].encode())

    def line(self) -> str:
        perplexity = f"perplexity {math.exp(-self.logprob / self.tokens):.4f}" if self.tokens else "no perplexity"
        failed = f", {self.failed} failed" if self.failed else ""
        texts = "1 text" if self.texts == 1 else f"{self.texts} texts"
        bits = f", {-self.logprob / math.log(2) / self.bytes:.4f} bits per byte" if self.bytes else ""
        return f"{texts}{failed}, {self.tokens} scored tokens, {perplexity}{bits}"


def opened(file: str, whole: bool = False) -> Iterator[tuple[int, bytes]]:
    """The lines of a file, or, `whole`, all of it as its first; what cannot be read raises PromptError now."""
    if whole:
        return iter([(1, whole_file(file))])
    lines = numbered_lines(file)
    return chain(list(islice(lines, 1)), lines)


def scores(
    llama: "Llama",
    lines: Iterator[tuple[int, bytes]],
    file_format: Format,
    top_logprobs: int,
    windows: Windows | None = None,
) -> Iterator[dict[str, Any]]:
    """A record for every line that is not blank, in order: its score, or its "error".

    Of several processes it is the first one's lines that all of them score.
    """
    from llama import parallel

    while some := parallel.broadcast(list(islice(lines, AT_ONCE)), llama.model.device):
        texts = [_text(data, file_format) for _, data in some]
        good = [text for text in texts if isinstance(text, str)]
        own = {"stride": windows.stride, "context": windows.context} if windows else {}
        results = iter(llama.score_each(good, top_logprobs=top_logprobs, **own))
        for (number, _), text in zip(some, texts, strict=True):
            result = next(results) if isinstance(text, str) else text
            if isinstance(result, LlamaError):
                yield {"line": number, "error": str(result)}
            else:
                yield {"line": number, "text": text, **result}


def _text(data: bytes, file_format: Format) -> str | LlamaError:
    """The text of a line, or why it is none."""
    try:
        value = utf8(data)
        if file_format == "jsonl":
            value = json.loads(value)
    except LlamaError as error:
        return error
    except (ValueError, RecursionError) as error:
        return LlamaError(f'not JSON ({error}): expected a string or {{"text": "…"}}')
    if isinstance(value, dict):
        value = value.get("text")
    return value if isinstance(value, str) else LlamaError('expected a JSON string or {"text": "…"}')


def heading() -> str:
    return "perplexity  tokens  text"


def row(record: dict[str, Any]) -> str:
    """One line of the table under `heading`."""
    if "error" in record:
        return f"{'-':>10}  {'-':>6}  line {record['line']}: {record['error']}"
    text = " ".join(record["text"].split())
    perplexity = "-" if record["perplexity"] is None else f"{record['perplexity']:.3f}"
    shown = harmless(text[:_SHOWN] + ("…" if len(text) > _SHOWN else ""))
    return f"{perplexity:>10}  {len(_known(record)):>6}  {shown}"


def _known(record: dict[str, Any]) -> list[float]:
    """The log-probabilities of a text's tokens but the first, which nothing precedes."""
    return [logprob for logprob in record["logprobs"] if logprob is not None]
