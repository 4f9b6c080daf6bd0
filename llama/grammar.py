"""Forms: what a text must be (JSON of a schema, a regex, a choice, of a grammar), and which tokens may follow.

A form is of the text that is shown. So each token is known to llguidance (https://github.com/guidance-ai/llguidance) by
the exact bytes that it adds to that text. At its start a text may drop a space of its first token: then the tokens that
may come first are those of a second vocabulary, in which they lack it.
"""

import json
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import accumulate, chain, islice, takewhile
from typing import TYPE_CHECKING, Any

from llama.errors import ParameterError
from llama.tokenizer import BaseTokenizer, StreamDecoder

if TYPE_CHECKING:
    import llguidance
    import numpy
    from numpy.typing import NDArray

# Between the parts of JSON: one space, or a line break and what indents the next line. More could go on for ever.
WHITESPACE = r" ?|\r?\n[ \t]{0,32}"
_JSON = {"whitespace_flexible": True, "whitespace_pattern": WHITESPACE, "lenient": False, "coerce_one_of": False}
_BYTES = 256  # tokens behind the tokenizer's own, each of one byte: they spell a first token without its space
_MOST_COMPILED = 64  # forms that are kept
_MOST_TRIES = 1000  # parts of a schema that are compiled alone, to find the one that is wrong
_IN_REGEX = re.compile(r"regex parse error:\n {4}(?P<regex>.*)\n {4}(?P<before> *)\^+\nerror: (?P<why>[^\n]+)")
_IN_LINE = re.compile(r"(?:at )?(?P<line>\d+)\((?P<column>\d+)\): (?P<why>.*?)(?:\n|$)")


class Forms:
    """The forms of one tokenizer's texts, for a model of `vocab_size` tokens. Any thread may use them."""

    def __init__(self, tokenizer: BaseTokenizer, vocab_size: int) -> None:
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._vocabulary: Vocabulary | None = None
        self._compiled = lru_cache(_MOST_COMPILED)(self._compile)
        self._lock = threading.Lock()

    def form(self, name: str, given: Any, stop_tokens: frozenset[int] = frozenset(), inside: bool = False) -> "Form":
        """What a completion must be that ends with one of `stop_tokens`: `given` is the value of the parameter `name`.

        `inside`: it goes on in a text, so its first space is kept. Raises ParameterError as `check`.
        """
        with self._lock:
            vocabulary, compiled = self._compiled(name, json.dumps(given))
        return Form(vocabulary, compiled, stop_tokens, inside)

    def _compile(self, name: str, given: str) -> "tuple[Vocabulary, Compiled]":
        source = _source(name, json.loads(given))
        if self._vocabulary is None:
            self._vocabulary = Vocabulary(self._tokenizer, self._vocab_size)
        return self._vocabulary, Compiled(self._vocabulary, source, name)


def check(name: str, given: Any) -> None:
    """Raise ParameterError where a form cannot be followed, whatever the tokenizer, or llguidance is not there."""
    _source(name, given)


class Vocabulary:
    """A tokenizer's tokens by the bytes that they add to a text, within it and at its start, as llguidance takes them.

    Behind them stand one token for each byte, and one for the end of a text; none of these is ever allowed.
    """

    def __init__(self, tokenizer: BaseTokenizer, vocab_size: int) -> None:
        import numpy

        self.size, self.vocab_size, self.end = tokenizer.n_words, vocab_size, tokenizer.n_words + _BYTES
        self._tokenizer = tokenizer
        decoder = StreamDecoder(tokenizer, inside=True)
        self._within = [_as_bytes(decoder.added(token)) for token in range(self.size)]
        self._tokens = _by_text(self._within)
        self.within = self._of(self._within, self._encoded)
        self._first, self._first_tokens, self.first = self._within, self._tokens, self.within
        if tokenizer.strips_first_space:
            self._first = [_as_bytes(StreamDecoder(tokenizer).added(token)) for token in range(self.size)]
            self._first_tokens = _by_text(self._first)
            self.first = self._of(self._first, self._encoded_first)
        self.silent: NDArray[numpy.bool_] = numpy.array([not text for text in self._within])
        self.words = self.end // 32 + 1  # of 32 bits each, in a mask of all of them
        visible = numpy.zeros(32 * max(self.words, vocab_size // 32 + 1), dtype=numpy.bool_)
        visible[: self.size] = ~self.silent
        self.visible: NDArray[numpy.uint32] = numpy.packbits(visible, bitorder="little").view(numpy.uint32)

    def spelled(self, token: int, first: bool) -> list[int]:
        """The tokens that stand for one: itself, or the bytes that it adds as the first of a text."""
        if not first or self._first[token] == self._within[token]:
            return [token]
        return [self.size + byte for byte in self._first[token]]

    def _of(self, texts: list[bytes], encoded: Callable[[str], list[int]]) -> "llguidance.LLTokenizer":
        from llguidance import LLTokenizer

        return LLTokenizer(_Described([*texts, *(bytes([byte]) for byte in range(_BYTES)), b""], encoded))  # type: ignore[arg-type]  # it takes what has these attributes

    def _encoded(self, text: str) -> list[int]:
        """How the tokenizer itself spells a text, or the longest tokens where it would change the text."""
        tokens, data = self._tokenizer.encode_inside(text), text.encode()
        if b"".join(self._within[token] for token in tokens) == data:
            return tokens
        return list(self._longest_tokens(data, self._tokens))

    def _encoded_first(self, text: str) -> list[int]:
        """The same at a text's start, of which the first token alone is used."""
        tokens, data = self._tokenizer.encode(text, bos=False, eos=False), text.encode()
        first = next((token for token in tokens if self._first[token]), None)
        if first is None or not data.startswith(self._first[first]):
            first = next(self._longest_tokens(data, self._first_tokens))
            size = len(self._first[first]) if first < self.size else 1
            return [first, *(self.size + byte for byte in data[size:])]
        return [first, *(self.size + byte for byte in data[len(self._first[first]) :])]

    def _longest_tokens(self, data: bytes, tokens: dict[bytes, int]) -> Iterator[int]:
        longest = max(map(len, tokens), default=1)
        while data:
            sizes = range(min(longest, len(data)), 0, -1)
            size = next((size for size in sizes if data[:size] in tokens), 1)
            yield tokens.get(data[:size], self.size + data[0])
            data = data[size:]


class _Described:
    """A vocabulary as llguidance asks for it."""

    is_tokenizer_wrapper, bos_token_id = True, None

    def __init__(self, tokens: list[bytes], encoded: Callable[[str], list[int]]) -> None:
        self.tokens = tokens
        self.eos_token_id = len(tokens) - 1
        self.special_token_ids = [self.eos_token_id]
        self._encoded = lru_cache(1024)(encoded)  # what a form leaves no choice of comes again and again

    def __call__(self, text: str | bytes) -> list[int]:
        return self._encoded(text.decode() if isinstance(text, bytes) else text)


class Compiled:
    """A form that is ready to be followed by any number of texts."""

    def __init__(self, vocabulary: Vocabulary, source: str, name: str) -> None:
        from llguidance import LLMatcher

        self.name = name
        self.within = LLMatcher(vocabulary.within, source, log_level=0)
        self.first = self.within
        if vocabulary.first is not vocabulary.within:
            self.first = LLMatcher(vocabulary.first, source, log_level=0)
        for matcher in (self.within, self.first):
            if matcher.is_error():
                raise ParameterError(f"{name} cannot be followed: {_place(matcher.get_error())}")


class Form:
    """What one completion must be, for the thread that steps the engine. What it is asked for has no lasting effect.

    The completion's tokens only ever grow in number: those that were seen before are not looked at again.
    """

    def __init__(
        self, vocabulary: Vocabulary, compiled: Compiled, stop_tokens: frozenset[int], inside: bool
    ) -> None:  # fmt: skip
        import numpy

        self._vocabulary, self._compiled = vocabulary, compiled
        self._stops = numpy.zeros_like(vocabulary.visible)
        for token in stop_tokens:
            self._stops[token // 32] |= numpy.uint32(1 << token % 32)
        self._texts = vocabulary.visible & ~self._stops
        self._strips = not inside and compiled.first is not compiled.within
        self._matcher = compiled.within.deep_copy()
        self._known = 0  # how many tokens of the completion the matcher has taken
        self._ahead: list[int] = []  # drafts behind them that it has taken too

    def mask(self, tokens: Sequence[int], drafts: Sequence[int] = ()) -> "NDArray[numpy.uint32]":
        """Which tokens may follow a completion and the drafts behind it; none, where it cannot go on.

        Token t may if bit t % 32 of word t // 32 is 1. Those that end the text may follow where it is complete.
        """
        import numpy

        vocabulary = self._vocabulary
        self._go_to(tokens, drafts)
        matcher = self._matcher
        if self._strips and not tokens and not drafts:
            matcher = self._compiled.first.deep_copy()
        words = numpy.empty_like(vocabulary.visible)
        matcher.unsafe_compute_mask_ptr(words.ctypes.data, 4 * vocabulary.words)
        if matcher.is_error():
            words[:] = 0
        complete = words[vocabulary.end // 32] >> vocabulary.end % 32 & 1
        words &= self._texts
        if complete:
            words |= self._stops
        return words

    def allowed(self, tokens: Sequence[int], drafts: Sequence[int]) -> int:
        """How many of the drafts may follow the completion, each behind those before it."""
        self._go_to(tokens, ())
        visible = takewhile(lambda draft: draft < self._vocabulary.size and not self._vocabulary.silent[draft], drafts)
        spelled = [self._spelled(len(tokens) + n, draft) for n, draft in enumerate(visible)]
        left = 0 if self._matcher.is_error() else self._matcher.validate_tokens(list(chain(*spelled)))
        return sum(1 for end in accumulate(map(len, spelled)) if end <= left)

    def ended(self, tokens: Sequence[int]) -> bool:
        """Whether the completion is complete, and nothing can follow."""
        self._go_to(tokens, ())
        return self._matcher.is_stopped() and not self._matcher.is_error()

    @property
    def fault(self) -> str:
        """Why no token may follow."""
        error = self._matcher.get_error()
        name = self._compiled.name
        return f"its {name} cannot be followed any further ({_place(error)}): simplify it" if error else ""

    def _go_to(self, tokens: Sequence[int], drafts: Sequence[int]) -> None:
        """Bring the matcher behind these tokens and drafts, from where it is."""
        ahead = [*tokens[self._known :], *drafts]
        pairs = zip(self._ahead, ahead, strict=False)
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        back = sum(len(self._spelled(self._known + n, self._ahead[n])) for n in range(same, len(self._ahead)))
        if back:
            self._matcher.rollback(back)
        for n in range(same, len(ahead)):
            self._matcher.consume_tokens(self._spelled(self._known + n, ahead[n]))
        self._ahead = ahead[len(tokens) - self._known :]
        self._known = len(tokens)

    def _spelled(self, place: int, token: int) -> list[int]:
        if token >= self._vocabulary.size:  # of a padded table: it has no text, so it is refused
            return [self._vocabulary.end]
        return self._vocabulary.spelled(token, first=self._strips and place == 0)


# ------------------------------------------------------------------------------------------------- what was asked for


def _by_text(texts: list[bytes]) -> dict[bytes, int]:
    """Text → the first token that has it."""
    return {text: token for token, text in reversed(list(enumerate(texts))) if text}


def _as_bytes(added: str | bytes) -> bytes:
    return added if isinstance(added, bytes) else added.encode()


def _source(name: str, given: Any) -> str:
    """A form as llguidance reads it. Raises ParameterError that points to what is wrong with it."""
    try:
        from llguidance import LLMatcher
    except ImportError:
        raise ParameterError(
            f'{name} needs the package llguidance, which is not here: pip install "llama-runner[grammar]"'
        ) from None
    try:
        json.dumps(given, ensure_ascii=False).encode()
        source = _READ[name](given)
        failed, said = LLMatcher.validate_grammar_with_warnings(source)
        place = _pointer(given, said[0]) if failed and name == "json_schema" else ""
    except UnicodeEncodeError:
        raise ParameterError(f"{name} has half of a surrogate pair, which is no character: give whole ones") from None
    except RecursionError:
        raise ParameterError(f"{name} is nested too deeply to be followed: give one of fewer levels") from None
    if failed:
        raise ParameterError(f"{name} cannot be followed: {place}{_place(said[0])}")
    return source


def _json_schema(schema: Any) -> str:
    from llguidance import LLMatcher

    return LLMatcher.grammar_from_json_schema(schema, overrides=_JSON)  # type: ignore[arg-type]  # a TypedDict of these


def _regex(regex: str) -> str:
    from llguidance import LLMatcher

    return LLMatcher.grammar_from_regex(regex)


def _choices(choices: Sequence[str]) -> str:
    return "start: " + " | ".join(json.dumps(choice, ensure_ascii=False) for choice in choices)


def _grammar(grammar: str) -> str:
    """Lark's notation as it is; that with ::= and a rule `root` is translated."""
    from llguidance.gbnf_to_lark import any_to_lark

    if "::=" not in grammar:
        return grammar
    try:
        return any_to_lark(grammar)
    except Exception as error:  # it has no class for all of its own
        raise ParameterError(f"grammar cannot be followed: {error}") from None


_READ: dict[str, Callable[[Any], str]] = {
    "json_schema": _json_schema, "regex": _regex, "choices": _choices, "grammar": _grammar
}  # fmt: skip


def _place(error: str) -> str:
    """An error of llguidance's in one line: what is wrong, after where that is."""
    error = error.partition("\n<state>")[0]
    if found := _IN_REGEX.search(error):
        return f"{found['regex']!r}, character {len(found['before']) + 1}: {found['why']}"
    if found := _IN_LINE.match(error):
        return f"line {found['line']}, column {found['column']}: {found['why']}"
    return " ".join(error.split())


def _pointer(schema: dict[str, Any], error: str) -> str:
    """The JSON pointer of the smallest part of a schema that is refused for the same reason, as "/a/b: "."""
    shared: dict[str, Any] = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    at, part = "", schema
    while smaller := next(
        (one for one in islice(_objects(part), _MOST_TRIES) if _refused({**shared, **one[1]}) == error), None
    ):
        at, part = at + smaller[0], smaller[1]
    return f"{at}: " if at else ""


def _objects(value: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects within a value of JSON, and the pointer to each."""
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, part in parts:
        pointer = "/" + str(name).replace("~", "~0").replace("/", "~1")
        if isinstance(part, dict):
            yield pointer, part
        yield from ((pointer + below, found) for below, found in _objects(part))


def _refused(schema: dict[str, Any]) -> str | None:
    from llguidance import LLMatcher

    failed, said = LLMatcher.validate_grammar_with_warnings(_json_schema(schema))
    return said[0] if failed else None
