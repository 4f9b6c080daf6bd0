"""Code Llama's infilling: a prefix and a suffix → the prompt for what belongs between them.

Source: section 2.3 of https://arxiv.org/abs/2308.12950, and Meta's reference (facebookresearch/codellama).
"""

from dataclasses import dataclass

from llama.errors import PromptError
from llama.request import Prompt
from llama.tokenizer import SPACE, BaseTokenizer

MARKS = tuple(f"{SPACE}<{name}>" for name in ("PRE", "SUF", "MID", "EOT"))  # pieces of the tokenizer
FILL = "<FILL_ME>"  # where the gap is, in a text that has one


@dataclass(frozen=True, slots=True)
class Infilling:
    """A text with a gap. The model reads the prefix first, or, `suffix_first`, the suffix."""

    prefix: str
    suffix: str
    suffix_first: bool = False

    def __str__(self) -> str:
        return f"{self.prefix}{FILL}{self.suffix}"


def at_mark(text: str, where: str) -> Infilling:
    """A text whose gap is marked once. Raises PromptError, which calls the text `where`."""
    if (count := text.count(FILL)) != 1:
        raise PromptError(f"{where} has {FILL} {count} times: put it once, where text is to be filled in")
    prefix, suffix = text.split(FILL)
    return Infilling(prefix, suffix)


def infilling_prompt(infilling: Infilling, tokenizer: BaseTokenizer, name: str) -> Prompt:
    """BOS PRE prefix SUF suffix MID; or, suffix first, BOS PRE SUF suffix MID prefix. It ends at EOT.

    Raises PromptError where the tokenizer has no such marks, which a model that was not made for it lacks.
    """
    for text in (infilling.prefix, infilling.suffix):
        if not isinstance(text, str):
            raise PromptError(f"{name} has a {type(text).__name__}, not a string, beside its gap: {text!r:.60}")
    found = [tokenizer.id_of(mark) for mark in MARKS]
    if None in found:
        missing = MARKS[found.index(None)]
        raise PromptError(
            f"{name} cannot be filled in: the tokenizer has no piece {missing}, so this model was not made for it;"
            " use Code Llama 7B or 13B"
        )
    pre, suf, mid, end = (token for token in found if token is not None)
    prefix = tokenizer.encode(infilling.prefix, bos=False, eos=False)
    suffix = tokenizer.encode_inside(infilling.suffix)
    order = [pre, suf, *suffix, mid, *prefix] if infilling.suffix_first else [pre, *prefix, suf, *suffix, mid]
    return Prompt([*tokenizer.encode("", bos=True, eos=False), *order], frozenset({end}), inside=True)
