"""What is asked for: `SamplingParams` by a caller, a `Request` of the engine."""

import hashlib
import json
import math
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, Literal, TypedDict

from llama.errors import LlamaError, ParameterError
from llama.grammar import Form

FinishReason = Literal["stop", "length", "refused", "cancelled", "error"]
_MAX_SEED = 2**64 - 1
_FORMS = ("json_schema", "regex", "choices", "grammar")  # fields, of which one at most is given
_KINDS_OF_TEXT = {"regex": "regular expression", "grammar": "grammar in Lark's notation, or with ::="}
_DECIMAL = re.compile("0|[1-9][0-9]{0,18}")  # a token id as JSON spells a key


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the tokens of one request are chosen; checked where it is made (raises ParameterError).

    Each field's help text is that of the command's flag.

    None stands for a field's default. Numbers, tokens and lists may be numpy's or torch's; the keys of `logit_bias` may
    be JSON's strings.

    The model's logits are changed in this order: `logit_bias`, `repetition_penalty` (prompt and completion,
    https://arxiv.org/abs/1909.05858), `presence_penalty` and `frequency_penalty` (completion only),
    `bad_words`, end and stop tokens before `min_gen_len`, tokens that the form does not allow (one of `json_schema`,
    `regex`, `choices` and `grammar`: see grammar.py). Temperature 0 takes the largest logit. Otherwise
    softmax(logits / temperature) keeps its `top_k` most probable tokens (0: all), of those the most probable whose
    cumulative renormalised probability before them is ≤ `top_p` (https://arxiv.org/abs/1904.09751), of those the
    ones at least `min_p` times as probable as the best, and one is drawn.

    The first `min_gen_len` tokens end no text: no end or stop token is among them, and a stop string that they
    complete is plain text. One that a later token completes ends the text where it begins, be that among them.
    """

    temperature: float = field(
        default=0.6, metadata={"help": "0 always takes the most probable token; higher is more varied."}
    )
    top_p: float = field(
        default=0.9, metadata={"help": "sample from the most probable tokens that together have this probability."}
    )
    top_k: int = field(default=0, metadata={"help": "sample from this many most probable tokens; 0 is off."})
    min_p: float = field(
        default=0.0, metadata={"help": "sample from tokens at least this many times as probable as the best; 0 is off."}
    )
    repetition_penalty: float = field(
        default=1.0, metadata={"help": "makes tokens of the prompt and completion less probable; 1 is off."}
    )
    presence_penalty: float = field(
        default=0.0, metadata={"help": "subtracted once from the logits of tokens in the completion."}
    )
    frequency_penalty: float = field(
        default=0.0, metadata={"help": "subtracted each time from the logits of tokens in the completion."}
    )
    min_gen_len: int = field(
        default=0, metadata={"help": "no end token, stop token or stop string ends it within so many tokens."}
    )
    max_gen_len: int | None = field(
        default=None, metadata={"help": "the most tokens of a completion; up to max_seq_len if left out."}
    )
    stop: Sequence[str] = field(
        default=(),
        metadata={"help": "a text that ends the completion, which is cut before it; may be given several times."},
    )
    stop_token_ids: Sequence[int] = field(
        default=(), metadata={"help": "token ids that end the completion, such as 5,13."}
    )
    bad_words: Sequence[Sequence[int]] = field(
        default=(), metadata={"help": "token sequences that are never produced, such as [[5,13],[7]]."}
    )
    logit_bias: Mapping[int, float] = field(
        default_factory=dict, metadata={"help": "numbers added to the logits of tokens, such as {5:-2.5}."}
    )
    json_schema: Mapping[str, Any] | None = field(
        default=None, metadata={"help": "a file with a JSON schema: the text is JSON that follows it."}
    )
    regex: str | None = field(default=None, metadata={"help": "a regular expression: the text matches it, whole."})
    choices: Sequence[str] = field(
        default=(), metadata={"help": "a text that the completion may be; given several times, it is one of them."}
    )
    grammar: str | None = field(
        default=None, metadata={"help": "a file with a grammar, in Lark's notation or with ::=, that the text follows."}
    )
    seed: int | None = None  # None: derived from the build's seed and a counter of requests
    n: int = field(default=1, metadata={"help": "how many samples of each prompt."})
    num_beams: int = field(default=1, metadata={"help": "beam search with so many beams; 1 is off."})
    length_penalty: float = field(default=1.0, metadata={"help": "of beam search: above 0 favours longer texts."})
    logprobs: bool = field(default=False, metadata={"help": "show the log-probability of each token."})
    top_logprobs: int = field(default=0, metadata={"help": "show so many of the most probable tokens at each place."})

    def __post_init__(self) -> None:
        for own in fields(self):
            value = plain(getattr(self, own.name))
            object.__setattr__(self, own.name, default_of(own) if value is None else value)
        _number("temperature", self.temperature, 0, 1e38, "0 (argmax) to 1e38")
        _number("top_p", self.top_p, 0, 1, "above 0 and at most 1", open_low=True)
        _integer("top_k", self.top_k, 0, 2**31, "0 (off) to 2**31")
        _number("min_p", self.min_p, 0, 1, "0 (off) to 1")
        _number("repetition_penalty", self.repetition_penalty, 1e-30, 1e30, "above 0 (1 is off), 1e-30 to 1e30")
        _number("presence_penalty", self.presence_penalty, -1e30, 1e30, "-1e30 to 1e30 (0 is off)")
        _number("frequency_penalty", self.frequency_penalty, -1e30, 1e30, "-1e30 to 1e30 (0 is off)")
        _number("length_penalty", self.length_penalty, -100, 100, "-100 to 100")
        _integer("min_gen_len", self.min_gen_len, 0, None, "0 or more")
        if self.max_gen_len is not None:
            _integer("max_gen_len", self.max_gen_len, 0, None, "0 or more, or None")
            if self.min_gen_len > self.max_gen_len:
                raise ParameterError(
                    f"min_gen_len={self.min_gen_len} is more than max_gen_len={self.max_gen_len}: lower one of them"
                )
        if self.seed is not None:
            _integer("seed", self.seed, 0, _MAX_SEED, f"0 to {_MAX_SEED}, or None")
        _integer("n", self.n, 1, None, "1 or more")
        _integer("num_beams", self.num_beams, 1, None, "1 (no beam search) or more")
        _integer("top_logprobs", self.top_logprobs, 0, None, "0 (none) or more")
        if self.num_beams > 1 and self.n > 1:
            raise ParameterError(f"num_beams={self.num_beams} with n={self.n}: beam search gives one answer; use n=1")
        if not isinstance(self.logprobs, bool):
            raise ParameterError(f"logprobs={self.logprobs!r} is out of range: expected True or False")
        for own in fields(self):
            if own.type is float:  # an integer may be one that no tensor takes
                object.__setattr__(self, own.name, float(getattr(self, own.name)))
        self._freeze_collections()
        self._check_form()

    def _check_form(self) -> None:
        if self.json_schema is not None:
            object.__setattr__(self, "json_schema", _schema(self.json_schema))
        for name in ("regex", "grammar"):
            if not isinstance(value := getattr(self, name), str | None):
                raise ParameterError(f"{name}={value!r:.60} is not a text: expected a {_KINDS_OF_TEXT[name]}")
        given = [name for name in _FORMS if getattr(self, name) not in (None, ())]
        if len(given) > 1:
            raise ParameterError(f"{' and '.join(given)} were both given: a text has one form; give one of them")
        if given and self.num_beams > 1:
            raise ParameterError(f"{given[0]} with num_beams={self.num_beams}: beam search follows no form; use n")

    def _freeze_collections(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        stop_token_ids, bad_words = plain_each(self.stop_token_ids), plain_each(self.bad_words)
        if _is_list(bad_words):
            bad_words = [plain_each(word) for word in bad_words]
        choices = (self.choices,) if isinstance(self.choices, str) else self.choices
        _each("stop", stop, lambda s: isinstance(s, str) and s, "non-empty strings")
        _each("choices", choices, lambda s: isinstance(s, str) and s, "non-empty strings")
        _each("stop_token_ids", stop_token_ids, _is_token, "token ids")
        _each("bad_words", bad_words, lambda w: _is_list(w) and w and all(map(_is_token, w)), "lists of token ids")
        object.__setattr__(self, "stop", tuple(stop))
        object.__setattr__(self, "choices", tuple(choices))
        object.__setattr__(self, "stop_token_ids", tuple(stop_token_ids))
        object.__setattr__(self, "bad_words", tuple(map(tuple, bad_words)))
        object.__setattr__(self, "logit_bias", _biases(self.logit_bias))

    @property
    def plain(self) -> bool:
        """Whether the model's logits are used as they are, but for what a form does not allow."""
        return not (
            self.logit_bias or self.bad_words or self.min_gen_len or self.presence_penalty or self.frequency_penalty
        ) and (self.repetition_penalty == 1)

    @property
    def form(self) -> tuple[str, Any] | None:
        """(Field, value) of the form that a completion must have; None where it may be any."""
        given = ((name, getattr(self, name)) for name in _FORMS)
        return next(((name, value) for name, value in given if value not in (None, ())), None)


class MoreSampling(TypedDict, total=False):
    """The fields of `SamplingParams` beside those that Meta's runner has as positional parameters; None: left out."""

    top_k: int | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    min_gen_len: int | None
    stop: Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    bad_words: Sequence[Sequence[int]] | None
    logit_bias: dict[int, float] | None
    json_schema: Mapping[str, Any] | None
    regex: str | None
    choices: Sequence[str] | None
    grammar: str | None
    seed: int | None
    n: int | None
    num_beams: int | None
    length_penalty: float | None
    top_logprobs: int | None


class LeftOut(float):
    """The default of a keyword: it equals its value and reads like it, but no value that a caller gives is one."""

    def __init__(self, value: float) -> None:
        self._value = value

    def __repr__(self) -> str:
        return repr(self._value)


TEMPERATURE, TOP_P, LOGPROBS = LeftOut(0.6), LeftOut(0.9), LeftOut(False)  # Meta's; `SamplingParams` has the same
Params = SamplingParams | Sequence[SamplingParams] | None


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a model reads, the tokens that end its completion beside the model's own, and whether it ends `inside` a
    text: then what comes next keeps its first space. Where it is scored, its tokens from place `scored_from` on are."""

    tokens: list[int]
    end_ids: frozenset[int] = frozenset()
    inside: bool = False
    scored_from: int = 1


@dataclass(slots=True)
class Counts:
    """What came of drafts: the steps in which the host chose tokens, the drafts in them, and those that were right."""

    steps: int = 0
    drafted: int = 0
    accepted: int = 0

    def add(self, drafted: int, accepted: int) -> None:
        """A step's."""
        self.steps += 1
        self.drafted += drafted
        self.accepted += accepted

    def __sub__(self, before: "Counts") -> "Counts":
        return Counts(self.steps - before.steps, self.drafted - before.drafted, self.accepted - before.accepted)

    @property
    def tokens_per_step(self) -> float:
        """A step makes a token of its own behind the drafts that were right."""
        return round(1 + self.accepted / self.steps, 3) if self.steps else 0.0


@dataclass(slots=True, eq=False)
class Request:
    """One prompt on its way through the engine: its progress is written here by the engine alone.

    `prompt_logprobs` asks for the log-probability of each prompt token from place `scored_from` on; places before it
    are None. What is scored and generates nothing (`max_gen_len` 0) needs no step for its last token.
    """

    prompt: list[int]
    params: SamplingParams
    seed: int
    stop_tokens: frozenset[int]
    form: Form | None = None  # what the completion must be
    prompt_logprobs: bool = False
    scored_from: int = 1  # or later: nothing precedes place 0
    name: str = "prompt"  # how errors call it, such as "prompt 3"
    tokens: list[int] = field(default_factory=list)  # of the completion so far, without the end token
    logprobs: list[float] = field(default_factory=list)  # one for each of them, where asked
    top_logprobs: list[dict[int, float]] = field(default_factory=list)
    scores: list[float | None] = field(default_factory=list)  # one for each prompt token, where asked
    best: list[int | None] = field(default_factory=list)  # the most probable token in the place of each of them
    top_scores: list[dict[int, float] | None] = field(default_factory=list)
    counts: Counts = field(default_factory=Counts)
    finish_reason: FinishReason | None = None
    error: LlamaError | None = None
    added: float = 0.0  # clock times, in seconds
    first_token: float | None = None
    finished: float | None = None

    @property
    def is_read_only(self) -> bool:
        """Whether its prompt is scored and nothing comes after it."""
        return self.prompt_logprobs and self.params.max_gen_len == 0

    @property
    def computed(self) -> list[int]:
        """The prompt tokens that steps are taken for."""
        return self.prompt[:-1] if self.is_read_only and len(self.prompt) > 1 else list(self.prompt)


def derive_seed(seed: int, counter: int) -> int:
    """A seed of 63 bits for the `counter`-th request or sample under `seed`."""
    digest = hashlib.blake2b(struct.pack("<QQ", seed, counter), digest_size=8, person=b"seed").digest()
    return int.from_bytes(digest, "little") >> 1


def params_for(count: int, params: Params, keywords: Mapping[str, object]) -> list[SamplingParams]:
    """One SamplingParams for each of `count` prompts, from `params=` or from the keywords that were not left out."""
    given: dict[str, Any] = {
        name: value for name, value in keywords.items() if value is not None and not isinstance(value, LeftOut)
    }
    if params is None:
        return [SamplingParams(**given)] * count
    if given:
        raise ParameterError("params= and sampling keywords were both given: put them all into params")
    listed = [params] * count if isinstance(params, SamplingParams) else list(params)
    if len(listed) != count or not all(isinstance(one, SamplingParams) for one in listed):
        raise ParameterError(f"params= has {len(listed)} entries for {count} prompts: give one SamplingParams for each")
    return listed


def default_of(own: Field[Any]) -> Any:
    """The default of a field of `SamplingParams`."""
    return own.default if own.default_factory is MISSING else own.default_factory()


def plain(value: Any) -> Any:
    """A number, array or tensor of numpy's or torch's as Python's own numbers; anything else as it is."""
    return value.tolist() if hasattr(value, "tolist") else value


def plain_each(values: Any) -> Any:
    """The same for a list that may hold some; what is no list is as it is."""
    values = plain(values)
    return list(map(plain, values)) if _is_list(values) else values


def _schema(given: Any) -> dict[str, Any]:
    """A JSON schema, copied."""
    if not isinstance(given, Mapping):
        raise ParameterError(f"json_schema={given!r:.60} is not a JSON schema: expected an object (in Python a dict)")
    try:
        copied: dict[str, Any] = json.loads(json.dumps(dict(given), allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise ParameterError(f"json_schema is not a JSON schema: it cannot be written as JSON ({error})") from None
    return copied


def _biases(given: Any) -> dict[int, float]:
    """Token → bias, checked."""
    if not isinstance(given, Mapping):
        raise ParameterError(f"logit_bias={given!r} is not a table of token id → number")
    biases: dict[int, float] = {}
    for key, value in given.items():
        token, bias = plain(key), plain(value)
        if isinstance(token, str) and _DECIMAL.fullmatch(token):
            token = int(token)
        if not _is_token(token) or not _is_number(bias) or not (bias == -math.inf or -1e30 <= bias <= 1e30):
            raise ParameterError(
                f"logit_bias has {key!r}: {value!r}; expected token id: number from -1e30 to 1e30, or -inf"
            )
        if token in biases:
            raise ParameterError(f"logit_bias names token {token} twice: give it once")
        biases[token] = float(bias)
    return biases


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_token(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _number(name: str, value: Any, low: float, high: float, expected: str, open_low: bool = False) -> None:
    inside = _is_number(value) and low <= value <= high and not (open_low and value == low)
    if not inside:
        raise ParameterError(f"{name}={value!r} is out of range: expected {expected}")


def _integer(name: str, value: Any, low: int, high: int | None, expected: str) -> None:
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or value < low or (high is not None and value > high):
        raise ParameterError(f"{name}={value!r} is out of range: expected an integer, {expected}")


def _each(name: str, values: Any, good: Any, expected: str) -> None:
    if not _is_list(values) or not all(map(good, values)):
        raise ParameterError(f"{name}={values!r} is not a list of {expected}")
