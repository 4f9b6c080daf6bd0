"""What is shown of each token: in a terminal, in the page's HTML, and in a browser that opens the page."""

import math
import re
import unicodedata
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from browsers import asked, contrast, forget_logs, luminance, point_at, prefer, rectangle, resize

from llama import Llama, SamplingParams
from llama.chat import REFUSAL
from llama.cli.token_view import PAINTS, coloured, page

CODE = re.compile(r"\x1b\[[0-9;]*m")
HOSTILE = [
    "<script>document.title='run'</script>", "<img src=x onerror=\"document.title='run'\">", '"><svg onload=alert(1)>',
    "</div></section></style>", "--><!--", "&amp;", " '\"", "$results", "\x1b[31m", "\x1b]0;title\x07", "\x9b1m",
    "\x08", "\r", "\n", "\t", "\n\n", "", " ", "\u202eabc", "\u2066", "\u2028", "\ufeff", "\ufffd", "שלום", "👍",
    "日本", "e\u0301",
]  # fmt: skip


def top(*alternatives: tuple[str, float]) -> list[dict[str, Any]]:
    """Alternatives of (piece, probability) as a prediction has them."""
    return [
        {"token": token, "piece": piece, "logprob": math.log(probability)}
        for token, (piece, probability) in enumerate(alternatives)
    ]


def prediction(places: Sequence[tuple[str, float, list[dict[str, Any]]]]) -> dict[str, Any]:
    """A prediction of (piece, probability, alternatives) a token."""
    pieces = [piece for piece, _, _ in places]
    return {
        "generation": "".join(pieces), "tokens": pieces, "logprobs": [math.log(p) for _, p, _ in places],
        "top_logprobs": [alternatives for _, _, alternatives in places],
        "finish_reason": "length", "seed": 3141, "prompt_tokens": 12, "completion_tokens": len(pieces),
    }  # fmt: skip


CAT = prediction([
    ("A", 0.96, top((" A", 0.96), (" The", 0.03))),
    (" cat", 0.5, top((" dog", 0.5), (" cat", 0.5))),
    (" 猫", 0.2, top((" sat", 0.7), ("<0xE7>", 0.2))),
    ("\n", 0.004, top((".", 0.6), (" on\x1b", 0.0004))),
])  # fmt: skip


def hostile() -> dict[str, Any]:
    """Every hostile string as a token that was taken, and as the other alternative of its neighbour."""
    return prediction([
        (piece, 0.3, top((piece, 0.3), (other, 0.25)))
        for piece, other in zip(HOSTILE, HOSTILE[1:] + HOSTILE[:1], strict=True)
    ])  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- terminal


def test_a_terminal_gets_the_text_and_a_table() -> None:
    """A wide character takes two columns, a newline is seen and made, nothing is rounded down to nothing."""
    assert coloured(CAT, colour=False).split("\n") == [
        "A cat 猫↵",
        "",
        "",
        "A     96.0 % │ ␣A    96.0 %   ␣The          3.0 %",
        "␣cat  50.0 % │ ␣dog  50.0 %   ␣cat         50.0 %",
        "␣猫   20.0 % │ ␣sat  70.0 %   <0xE7>       20.0 %",
        "↵      0.4 % │ .     60.0 %   ␣on‹U+001B› < 0.1 %",
    ]


@pytest.mark.parametrize("of", [CAT, hostile(), prediction([])])
def test_colour_adds_nothing_but_escape_codes(of: dict[str, Any]) -> None:
    assert CODE.sub("", coloured(of, colour=True)) == coloured(of, colour=False)
    assert (coloured(of, colour=True) == coloured(of, colour=False)) is (not of["tokens"])


@pytest.mark.parametrize(
    ("step", "percents"),
    list(enumerate([("100.0", "90.1"), ("89.9", "50.1"), ("49.9", "20.1"), ("19.9", "5.1"), ("4.9", "0.1")])),
)
def test_a_token_has_the_colour_of_its_probability(step: int, percents: tuple[str, str]) -> None:
    """In the text and in the table, and ended before the line ends; what is likely has the terminal's own."""
    paint, end = PAINTS[step], "\x1b[0m" if step else ""
    for percent in percents:
        shown = coloured(prediction([("a\nb", float(percent) / 100, [])]), colour=True)
        assert shown.split("\n") == [f"{paint}a↵{end}", f"{paint}b{end}", "", f"{paint}a↵b {percent:>5} %{end}"]


@pytest.mark.parametrize(
    "char", ["\x00", "\x07", "\b", "\r", "\x1b", "\x7f", "\x9b", "\xad", "\u202e", "\u2066", "\u2028", "\ud800"]
)
def test_no_character_acts_on_the_terminal(char: str) -> None:
    """Neither in the text, nor in the table, nor in the text of what was not run."""
    of = prediction([(f"a{char}b", 0.5, top((f"{char}c", 0.5)))])
    shown = coloured(of, colour=False)
    sign = f"‹U+{ord(char):04X}›"
    assert char not in shown and shown.count(sign) == 3
    refused = {**of, "tokens": [], "logprobs": [], "top_logprobs": []}
    assert coloured(refused, colour=True).rstrip("\n") == f"a{sign}b"


def test_hostile_text_leaves_nothing_that_acts() -> None:
    acting = {char for char in coloured(hostile(), colour=False) if unicodedata.category(char)[0] == "C"}
    assert acting == {"\n", "\t"}


def test_joined_emoji_and_accents_stay_whole_in_the_text() -> None:
    """A joiner alone is named in the table; an accent takes no column of its own, a full-width letter two."""
    pieces = ("👩", "\u200d", "🚀", "e\u0301", "ａ")
    text, _, _, joiner, _, accent, wide = coloured(
        prediction([(piece, 1.0, []) for piece in pieces]), colour=False
    ).split("\n")
    assert text == "👩\u200d🚀e\u0301ａ"
    assert joiner == "‹U+200D› 100.0 %"
    assert accent == "e\u0301        100.0 %" and wide == "ａ       100.0 %"


def test_what_was_not_run_is_shown_as_it_is() -> None:
    refused = {
        "generation": {"role": "assistant", "content": REFUSAL}, "tokens": [], "logprobs": [],
        "finish_reason": "refused", "seed": None, "prompt_tokens": 0, "completion_tokens": 0,
    }  # fmt: skip
    assert coloured(refused, colour=True).rstrip("\n") == REFUSAL
    shown = read(page([("[INST]", refused)]))
    assert shown.completions == [REFUSAL]
    assert shown.facts == ["finish reason refused", "prompt tokens 0", "completion tokens 0"]


# ----------------------------------------------------------------------------------------------------------------- HTML


class Reading(HTMLParser):
    """What a page holds, by its own parser: elements, and the texts of prompts, completions, tips and facts."""

    VOID = ("meta",)

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []  # class, or else tag, of each element that is open
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.prompts: list[str] = []
        self.completions: list[str] = []
        self.tips: list[list[str]] = []  # of each token: its own row, then the alternatives
        self.facts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.elements.append((tag, attributes))
        kind = attributes.get("class") or tag
        if tag not in self.VOID:
            self.open.append(kind)
        texts = {"prompt": self.prompts, "completion": self.completions, "dt": self.facts}
        if kind in texts:
            texts[kind].append("")
        if kind == "tip":
            self.tips.append([])
        if kind.startswith("row"):
            self.tips[-1].append("✓ " if "taken" in kind else "")

    def handle_endtag(self, tag: str) -> None:
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if "tip" in self.open:
            self.tips[-1][-1] += f"{data} " if self.open[-1] == "bdi" else data
        elif "prompt" in self.open:
            self.prompts[-1] += data
        elif "completion" in self.open:
            self.completions[-1] += data
        elif "facts" in self.open:
            self.facts[-1] += data if self.open[-1] == "dt" else f" {data}"


def read(document: str) -> Reading:
    reading = Reading()
    reading.feed(document)
    reading.close()
    assert reading.open == []
    return reading


def test_a_page_shows_prompt_completion_alternatives_and_facts() -> None:
    shown = read(page([("Who sat?\n", CAT), ("<b>", prediction([]))]))
    assert shown.prompts == ["Who sat?\n", "<b>"]
    assert shown.completions == ["A cat 猫\n", ""]
    assert shown.tips == [
        ["A 96.0 %", "✓ ␣A 96.0 %", "␣The 3.0 %"],
        ["␣cat 50.0 %", "␣dog 50.0 %", "✓ ␣cat 50.0 %"],  # as probable: the one that reads the same was taken
        ["␣猫 20.0 %", "␣sat 70.0 %", "✓ <0xE7> 20.0 %"],
        ["↵ 0.4 %", ". 60.0 %", "␣on‹U+001B› < 0.1 %"],  # taken, but not among the most probable
    ]
    assert shown.facts[:4] == ["finish reason length", "prompt tokens 12", "completion tokens 4", "seed 3141"]


def test_hostile_text_stays_text() -> None:
    """It opens no element, adds no attribute, and comes back exactly."""
    shown = read(page([("".join(HOSTILE), hostile())]))
    assert shown.prompts == shown.completions == ["".join(HOSTILE)]
    harmless = read(page([("a", prediction([("a", 0.3, top(("a", 0.3), ("b", 0.25)))]))]))
    assert {tag for tag, _ in shown.elements} == {tag for tag, _ in harmless.elements}
    assert {name for _, attributes in shown.elements for name in attributes} == {
        name for _, attributes in harmless.elements for name in attributes
    } | {"data-sign"}
    assert len(shown.tips) == len(HOSTILE) and all(len(rows) == 3 for rows in shown.tips)


def test_every_token_can_be_pointed_at() -> None:
    """By keyboard too; an empty one by its sign."""
    document = page([("", hostile())])
    tokens = [attributes for _, attributes in read(document).elements if "token" in (attributes.get("class") or "")]
    assert len(tokens) == len(HOSTILE) and all(attributes["tabindex"] == "0" for attributes in tokens)
    assert document.count('data-sign="∅"') == HOSTILE.count("")


def test_a_page_needs_nothing_and_permits_nothing() -> None:
    document = page([("".join(HOSTILE), hostile())])
    elements = read(document).elements
    assert document.startswith('<!doctype html>\n<html lang="en">') and document.count("<title>") == 1
    assert '<meta charset="utf-8">' in document[:100]
    policy = next(attributes["content"] for _, attributes in elements if "http-equiv" in attributes)
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    assert not {"script", "link", "img", "iframe", "object", "a", "form"} & {tag for tag, _ in elements}
    style = document[document.index("<style>") : document.index("</style>")]
    assert not re.search(r"url\(|@import|@font-face|image-set", style)


def test_every_sample_is_on_the_page() -> None:
    one, two = prediction([("one", 0.9, [])]), prediction([("two", 0.9, [])])
    document = page([("p", {**one, "samples": [one, two]})])
    assert read(document).completions == ["one", "two"] and read(document).prompts == ["p"]
    assert "<h2>Sample 1 of 2</h2>" in document and "<h2>Sample 2 of 2</h2>" in document


def test_what_the_demo_writes(demo: Llama) -> None:
    """Greedily, so that each token is the first of its alternatives; a chat's answer as a text."""
    params = SamplingParams(temperature=0, max_gen_len=24, logprobs=True, top_logprobs=3)
    story = demo.text_completion(["Once upon a time"], params=params)[0]
    answer = demo.chat_completion([[{"role": "user", "content": "What sound does a dog make?"}]], params=params)[0]
    shown = read(page([("Once upon a time", story), ("What sound does a dog make?", answer)]))
    assert shown.completions == [story["generation"], answer["generation"]["content"]]
    assert len(shown.tips) == story["completion_tokens"] + answer["completion_tokens"]
    assert all(len(rows) == 4 and rows[1].startswith("✓ ") for rows in shown.tips)
    lines = coloured(story, colour=False).split("\n")
    assert len(lines) == story["generation"].count("\n") + 2 + story["completion_tokens"]
    assert lines[-1].endswith(" %") and lines[-1].count(" %") == 4


# -------------------------------------------------------------------------------------------------------------- browser


def opened(browser: Any, folder: Path, document: str, width: int = 1000, height: int = 700) -> list[Any]:
    """The tokens of a page in a window of that size."""
    path = folder / "page.html"
    path.write_text(document, encoding="utf-8")
    resize(browser, width, height)
    forget_logs(browser)
    browser.get(path.as_uri())
    return browser.find_elements("class name", "token")


def tips(browser: Any) -> list[Any]:
    """Those that can be seen."""
    return browser.execute_script("return [...document.querySelectorAll('.tip')].filter(tip => tip.checkVisibility())")


def long(words: int, alternatives: int) -> dict[str, Any]:
    """A prediction of so many tokens, each with so many alternatives."""
    return prediction([
        (f" word{index}", 0.5, top(*((f" other{index}-{k}", 0.5 / 2**k) for k in range(alternatives))))
        for index in range(words)
    ])  # fmt: skip


def test_pointing_at_a_token_shows_its_alternatives(browser: Any, tmp_path: Path) -> None:
    """Of that token alone, and only while it is pointed at."""
    first, *_, last = opened(browser, tmp_path, page([("Who?", CAT)]))
    assert tips(browser) == []
    point_at(browser, first)
    assert [tip.text.split() for tip in tips(browser)] == [["A", "96.0", "%", "␣A", "96.0", "%", "␣The", "3.0", "%"]]
    point_at(browser, last)
    assert [tip.text.split()[:2] for tip in tips(browser)] == [["↵", "0.4"]]
    point_at(browser, browser.find_element("tag name", "h1"))
    assert tips(browser) == []


def test_the_keyboard_reaches_every_token(browser: Any, tmp_path: Path) -> None:
    """An empty one too. What is pointed at goes before what has the focus."""
    from selenium.webdriver import ActionChains, Keys

    tokens = opened(browser, tmp_path, page([("Who?", prediction([("a", 0.9, []), ("", 0.8, []), ("c", 0.7, [])]))]))
    for expected in (["a", "90.0", "%"], ["∅", "80.0", "%"], ["c", "70.0", "%"]):
        ActionChains(browser).send_keys(Keys.TAB).perform()
        assert [tip.text.split() for tip in tips(browser)] == [expected]
    point_at(browser, tokens[0])
    assert [tip.text.split()[0] for tip in tips(browser)] == ["a"]


@pytest.mark.parametrize("placed", [True, False], ids=["by its token", "in the corner"])
@pytest.mark.parametrize(("width", "height", "alternatives"), [(1000, 700, 5), (360, 640, 5), (1000, 400, 12)])
def test_alternatives_are_never_cut(
    browser: Any, tmp_path: Path, width: int, height: int, alternatives: int, placed: bool
) -> None:
    """Whichever token of a text that is longer than the window; by browsers that cannot place boxes by others too."""
    document = page([("Who?", long(240, alternatives))])
    if not placed:
        document = document.replace("@supports (position-area: top)", "@supports (no-such-property: top)")
    tokens = opened(browser, tmp_path, document, width, height)
    for token in [*tokens[:12], *tokens[-12:]]:
        point_at(browser, token)
        (tip,) = tips(browser)
        assert len(tip.text.split("%")) == alternatives + 2
        left, top, right, bottom = rectangle(browser, tip)
        assert 0 <= left < right <= width and 0 <= top < bottom <= height
        its_left, its_top, its_right, its_bottom = rectangle(browser, token)
        if placed:
            assert bottom <= its_top or top >= its_bottom or right <= its_left or left >= its_right, "hides its token"


def test_the_browser_shows_exactly_the_text(browser: Any, tmp_path: Path) -> None:
    """Spaces, tabs and newlines too; and what acts is there, but does not reorder what stands beside it."""
    text = "  two  spaces\n\n\tand 'quotes' & <b>tags</b>\nשלום 👍 日本  end"
    opened(
        browser, tmp_path, page([(text, prediction([(text[at : at + 3], 0.5, []) for at in range(0, len(text), 3)]))])
    )
    assert [
        browser.find_element("class name", kind).get_property("innerText") for kind in ("prompt", "completion")
    ] == [text] * 2
    opened(browser, tmp_path, page([("", hostile())]))
    code = """
        const copy = document.querySelector(".completion").cloneNode(true);
        for (const tip of copy.querySelectorAll(".tip")) tip.remove();
        return copy.textContent;
    """
    assert browser.execute_script(code) == "".join(HOSTILE)


def test_a_direction_mark_does_not_reorder_what_follows(browser: Any, tmp_path: Path) -> None:
    """Nor is a control character seen, for which browsers have a box: its sign is."""
    pieces = ("abc", "\u202edef", "ghi\x1b")
    tokens = opened(browser, tmp_path, page([("", prediction([(piece, 0.5, []) for piece in pieces]))]))
    edges = [edge for token in tokens for edge in rectangle(browser, token)[::2]]
    assert edges == sorted(edges)
    code = """
        const width = mark => {
            const range = document.createRange();
            range.selectNodeContents(mark);
            return range.getBoundingClientRect().width;
        };
        return [...document.querySelectorAll(".mark")].map(width);
    """
    assert browser.execute_script(code) == [0, 0]


def test_text_from_right_to_left(browser: Any, tmp_path: Path) -> None:
    """The text's own direction counts, not that of what its tips say; and they read from left to right."""
    places = [("1 ", 0.5, top(("abc", 0.5))), ("שלום", 0.5, top(("שלום", 0.5)))]
    opened(browser, tmp_path, page([("", prediction(places))]))
    code = "return [...document.querySelectorAll('.completion, .tip')].map(e => getComputedStyle(e).direction)"
    assert browser.execute_script(code) == ["rtl", "ltr", "ltr"]


def test_the_browser_runs_and_fetches_nothing(browser: Any, tmp_path: Path) -> None:
    tokens = opened(browser, tmp_path, page([("".join(HOSTILE), hostile())] * 2))
    point_at(browser, tokens[0])
    assert browser.title == "Tokens and their alternatives"
    assert browser.execute_script("return document.scripts.length + document.images.length") == 0
    assert browser.execute_script("return performance.getEntriesByType('resource')") == []
    assert asked(browser) == [(tmp_path / "page.html").as_uri()]
    assert browser.get_log("browser") == []


def test_the_page_refuses_scripts_and_requests(browser: Any, tmp_path: Path) -> None:
    """Even if hostile text got through: its policy alone keeps it from running and from asking for anything."""
    open_door = page([("Who?", CAT)]).replace(
        "Who?", "<script>document.title='run'</script><img src=http://127.0.0.1:9>"
    )
    opened(browser, tmp_path, open_door)
    assert browser.title == "Tokens and their alternatives"
    refusals = [entry["message"] for entry in browser.get_log("browser")]
    assert len(refusals) == 2 and all("Content Security Policy" in message for message in refusals)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_readable_on_every_colour(browser: Any, tmp_path: Path, scheme: str) -> None:
    """A contrast of at least 4.5 (WCAG 2.2, AA), and each colour is another."""
    prefer(browser, scheme)
    opened(browser, tmp_path, page([("Who?", CAT)]))
    code = """
        return [...document.querySelectorAll(".legend li")].map(li => [getComputedStyle(li).color,
            getComputedStyle(li).backgroundColor]);
    """
    colours = browser.execute_script(code)
    assert len({background for _, background in colours}) == 5
    for ink, background in colours:
        assert contrast(ink, background) >= 4.5
        assert (luminance(ink) < luminance(background)) is (scheme == "light")
