"""Completions token by token, coloured by probability, with the alternatives: for a terminal, and as a page of HTML."""

import math
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from itertools import zip_longest
from pathlib import Path
from string import Template
from typing import Any

from llama.predictions import samples_of

Prediction = Mapping[str, Any]  # as text_completion(…, logprobs=True, top_logprobs=K) makes it
Place = tuple[str, float, Sequence[Mapping[str, Any]]]  # a piece, its log-probability, the most probable tokens there

STEPS = (0.9, 0.5, 0.2, 0.05)  # at least the first probability is step 0, less than the last is step 4
PAINTS = ("", *(f"\x1b[38;5;16;48;5;{pale}m" for pale in (229, 215, 203, 169)))  # black on pale; the likely as it is
TEMPLATE = Path(__file__).with_name("token_view.html")
FACTS = ("finish_reason", "prompt_tokens", "completion_tokens", "seed")
SIGNS = {"\n": "↵", "\t": "⇥"}  # of what lays a text out; it stands beside its sign
ACTING = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # controls, directions and other formats, half surrogates, separators
JOINERS = "\u200c\u200d"  # of emoji and of some scripts: they act, but only within a word


def coloured(prediction: Prediction, colour: bool) -> str:
    """The text of one sample, then a line for each token: piece, probability, the most probable at that place.

    No character of a piece that would act on a terminal is left in it. Without `colour` the same, but no escape codes.
    """
    return "\n".join([_painted_text(prediction, colour), "", *_table(_places(prediction), colour)])


def page(results: Sequence[tuple[str, Prediction]]) -> str:
    """A document of HTML for (prompt, prediction) pairs, in which hovering or focusing a token shows its alternatives.

    It needs nothing from elsewhere and runs no script. The text of a completion's tokens is exactly the completion,
    but for U+0000, which no HTML can hold.
    """
    labels = [*(f"≥ {100 * step:.0f} %" for step in STEPS), f"< {100 * STEPS[-1]:.0f} %"]
    legend = "".join(f'<li class="step{step}">{escape(label)}</li>' for step, label in enumerate(labels))
    sections = [_section(prompt, samples_of(prediction)) for prompt, prediction in results]
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(legend=legend, results="\n".join(sections))


# ---------------------------------------------------------------------------------------------------------- predictions


def _places(sample: Prediction) -> list[Place]:
    """No places where nothing was run, as for a refused dialog."""
    pieces = sample.get("tokens", [])
    tops = sample.get("top_logprobs") or [[]] * len(pieces)
    return list(zip(pieces, sample.get("logprobs", []), tops, strict=True))


def _text(sample: Prediction) -> str:
    generation = sample["generation"]
    return generation if isinstance(generation, str) else generation["content"]


def _taken(place: Place) -> int | None:
    """Which of the alternatives was taken, if it is among them. A prediction does not say: their numbers are equal.

    Of several as probable, the one that reads like the piece (which may lack the space that begins a text).
    """
    piece, logprob, top = place
    equal = [index for index, other in enumerate(top) if other["logprob"] == logprob]
    return min(equal, key=lambda index: top[index]["piece"].strip() != piece.strip(), default=None)


def _step(logprob: float) -> int:
    return sum(math.exp(logprob) < step for step in STEPS)


def _percent(logprob: float) -> str:
    probability = math.exp(logprob)
    return f"{100 * probability:.1f} %" if probability >= 0.001 else "< 0.1 %"


# ----------------------------------------------------------------------------------------------------------- characters


def _sign(char: str) -> str:
    """What stands for a character that acts instead of showing; nothing for one that shows."""
    acts = unicodedata.category(char) in ACTING and char not in JOINERS
    return SIGNS.get(char) or (_named(char) if acts else "")


def _named(char: str) -> str:
    return f"‹U+{ord(char):04X}›"


def _visible(piece: str) -> str:
    """A piece by itself, on one line, with every character to be seen."""
    signs = ("␣" if char == " " else _sign(char) or (char if char.isprintable() else _named(char)) for char in piece)
    return "".join(signs) or "∅"


def _width(text: str) -> int:
    """How many columns of a terminal a text takes."""
    return sum(
        0 if unicodedata.category(char) in ("Mn", "Me") else 1 + (unicodedata.east_asian_width(char) in ("W", "F"))
        for char in text
    )


# ------------------------------------------------------------------------------------------------------------- terminal


def _painted_text(sample: Prediction, colour: bool) -> str:
    places = _places(sample)
    return "".join(_painted(_safe(piece), logprob, colour) for piece, logprob, _ in places) or _safe(_text(sample))


def _safe(text: str) -> str:
    return "".join(_sign(char) + char if char in SIGNS else _sign(char) or char for char in text)


def _painted(text: str, logprob: float, colour: bool) -> str:
    """Each line by itself: a background that is open at a line's end would run to the terminal's edge."""
    paint = PAINTS[_step(logprob)] if colour else ""
    return "\n".join(f"{paint}{line}\x1b[0m" if paint and line else line for line in text.split("\n"))


def _table(places: Sequence[Place], colour: bool) -> Iterator[str]:
    rows = [
        [(_visible(piece), logprob), *((_visible(other["piece"]), other["logprob"]) for other in top)]
        for piece, logprob, top in places
    ]
    widths = [max(_width(piece) for piece, _ in column) for column in zip_longest(*rows, fillvalue=("", 0.0))]
    for row in rows:
        own, *others = (
            piece + " " * (width - _width(piece)) + f" {_percent(logprob):>7}"
            for (piece, logprob), width in zip(row, widths, strict=False)
        )
        painted = _painted(own, row[0][1], colour)
        yield f"{painted} │ {'   '.join(others)}" if others else painted


# ----------------------------------------------------------------------------------------------------------------- HTML


def _section(prompt: str, samples: Sequence[Prediction]) -> str:
    parts = ["<section>", "<h2>Prompt</h2>", f'<div class="prompt" dir="auto">{_marked(prompt)}</div>']
    for number, sample in enumerate(samples, 1):
        title = "Completion" if len(samples) == 1 else f"Sample {number} of {len(samples)}"
        text = "".join(map(_token, _places(sample))) or _marked(_text(sample))
        parts += [f"<h2>{title}</h2>", f'<div class="completion" dir="auto">{text}</div>', _facts(sample)]
    return "\n".join([*parts, "</section>"])


def _facts(sample: Prediction) -> str:
    known = {name: sample[name] for name in FACTS if sample.get(name) is not None}
    rows = (f"<div><dt>{name.replace('_', ' ')}</dt><dd>{escape(str(fact))}</dd></div>" for name, fact in known.items())
    return f'<dl class="facts">{"".join(rows)}</dl>'


def _token(place: Place) -> str:
    piece, logprob, top = place
    taken = _taken(place)
    rows = [_row("row own", piece, logprob)]
    for index, other in enumerate(top):
        rows.append(_row("row taken" if index == taken else "row", other["piece"], other["logprob"]))
    tip = f'<span class="tip" role="tooltip" dir="ltr">{"".join(rows)}</span>'
    return f'<span class="token step{_step(logprob)}" tabindex="0">{_marked(piece) or _mark("∅", "")}{tip}</span>'


def _row(kind: str, piece: str, logprob: float) -> str:
    """`--part` is how much of the row its bar fills."""
    cells = f"<bdi>{escape(_visible(piece))}</bdi><span>{escape(_percent(logprob))}</span>"
    return f'<span class="{kind}" style="--part:{100 * math.exp(logprob):.1f}%">{cells}</span>'


def _marked(text: str) -> str:
    """The text itself; beside each character that acts, its sign, which is not part of the text and is not copied."""
    return "".join(_mark(sign, char) if (sign := _sign(char)) else escape(char) for char in text)


def _mark(sign: str, char: str) -> str:
    """A character beside its sign, or under it. A raw carriage return would be read as a line feed."""
    kind = "mark" if char in SIGNS else "mark hidden"
    return f'<span class="{kind}" data-sign="{escape(sign)}">{char.replace(chr(13), "&#13;")}</span>'
