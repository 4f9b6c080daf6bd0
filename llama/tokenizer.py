"""Text ↔ tokens, with SentencePiece here; and tokens → text while they are being made."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llama.errors import PromptError, TokenizerError
from llama.paths import expanded, read

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

SPACE = "\u2581"  # how SentencePiece writes a space inside a piece
REPLACEMENT = "\ufffd"  # what it makes of a byte that is not UTF-8
_MOST_BYTES = 1 << 26  # of the file; Llama-2's has half a million
_BYTE = re.compile("<0x[0-9A-F]{2}>")
_BEFORE = "\u263a"  # ☺, which no tokenizer joins with what follows it


class BaseTokenizer:
    """What every kind of tokenizer offers; `surface` of a token is what its kind decides.

    Tokens that the weights have beyond the tokenizer's (padded tables) have no text.
    """

    model_path: Path
    n_words: int  # tokens, which are 0 … n_words − 1
    bos_id: int  # −1: there is none
    eos_id: int
    pad_id: int
    specials: Mapping[str, int]  # how a template writes the tokens that no text can mean
    strips_first_space = strips_first_spaces = False  # of a whole text: one, or all
    replaces_each_byte = True  # that is not UTF-8 by U+FFFD; else one for each sequence that is cut short
    adds_bos = True  # before a plain text

    def __init__(self) -> None:
        self._surfaces: dict[int, str | int | bytes] = {}

    def encode(self, s: str, bos: bool, eos: bool) -> list[int]:
        """The tokens of a text, with the begin and end tokens where asked and there. Raises PromptError on half a
        surrogate. Text is text: what looks like a special token becomes ordinary tokens."""
        if not isinstance(s, str):
            raise PromptError(f"only text can be encoded, but this is {type(s).__name__}: {s!r:.60}")
        try:
            s.encode()
        except UnicodeEncodeError:
            raise PromptError("the text holds half a surrogate pair, which has no UTF-8 form: remove it") from None
        begin, end = [self.bos_id] * (bos and self.adds_bos), [self.eos_id] * (eos and self.eos_id >= 0)
        return begin + self._encode(s) + end

    def encode_template(self, text: str, mark: str = "") -> list[int]:
        """The tokens of what a template wrote: special tokens that it spells are those tokens.

        One that is not meant has a `mark` within it, which belongs to no text.
        """
        tokens: list[int] = []
        for number, part in enumerate(filter(None, re.split(f"({_either(self.specials)})", text))):
            token = self.specials.get(part)
            plain = part.replace(mark, "") if mark else part
            tokens += self._encode_part(plain, number == 0) if token is None else [token]
        return tokens

    def encode_inside(self, text: str) -> list[int]:
        """The tokens of a text that goes on where another ended: no space is put before it."""
        mark, tokens = (self.encode(s, bos=False, eos=False) for s in (_BEFORE, _BEFORE + text))
        if tokens[: len(mark)] != mark:
            raise TokenizerError(f"tokenizer {self.model_path} joins {_BEFORE} with what follows: use the model's own")
        return tokens[len(mark) :]

    def id_of(self, piece: str) -> int | None:
        """The token with this name (spaces as SPACE); None where there is none."""
        raise NotImplementedError

    def _encode_part(self, text: str, first: bool) -> list[int]:
        """The tokens of a part of a longer text, which stands at its beginning or behind a special token."""
        raise NotImplementedError

    def _encode(self, text: str) -> list[int]:
        raise NotImplementedError

    def decode(self, t: Sequence[int]) -> str:
        """The text of tokens; control tokens (begin, end) have none."""
        return "".join(self.pieces(t))

    def pieces(self, tokens: Sequence[int], inside: bool = False) -> list[str]:
        """One string a token, whose concatenation is exactly `decode(tokens)`; `inside` a text it keeps a first space.

        A character made of several byte tokens stands in the piece of the last of them.
        """
        decoder = StreamDecoder(self, inside=inside)
        pieces = [decoder.feed(token) for token in tokens]
        rest = decoder.flush()
        if pieces:
            pieces[-1] += rest
        return pieces

    def token_bytes(self, tokens: Sequence[int]) -> list[bytes]:
        """The bytes that each token adds to the text that `decode` makes of all; of a byte token its one byte.

        Joined they are that text in UTF-8, but that the text has U+FFFD for what is not UTF-8.
        """
        decoder = StreamDecoder(self)
        return [added if isinstance(added, bytes) else added.encode() for added in map(decoder.added, tokens)]

    def piece(self, token: int) -> str:
        """How one token reads by itself: its text, spaces kept; control tokens and bytes by their names (<0x0A>)."""
        surface = self.surface(token)
        if isinstance(surface, bytes) and surface:
            text = surface.decode(errors="replace")
            return text if text.strip(REPLACEMENT) else "".join(f"<0x{byte:02X}>" for byte in surface)
        if isinstance(surface, str) and surface:
            return surface.replace(SPACE, " ")
        return self._name(token) if token < self.n_words else f"<{token}>"

    def surface(self, token: int) -> str | int | bytes:
        """What one token adds to a text: a string (spaces as SPACE), the value of a byte token, or several bytes."""
        known = self._surfaces.get(token)
        if known is None:
            known = self._surfaces[token] = self._surface(token) if token < self.n_words else ""
        return known

    def _surface(self, token: int) -> str | int | bytes:
        raise NotImplementedError

    def _name(self, token: int) -> str:
        raise NotImplementedError


class Tokenizer(BaseTokenizer):
    """A `tokenizer.model` of SentencePiece, as Meta ships it with the weights.

    `added`: tokens that a folder adds to it, token → (text, whether it is a control token).
    """

    def __init__(self, model_path: str, added: Mapping[int, tuple[str, bool]] | None = None) -> None:
        """Raises TokenizerError that says what the file is, where it is not a SentencePiece model."""
        super().__init__()
        path = Path(expanded(model_path, "tokenizer_path"))
        self._use(path, file_bytes(path), added or {})

    @classmethod
    def of_proto(cls, path: Path, data: bytes, added: Mapping[int, tuple[str, bool]] | None = None) -> "Tokenizer":
        """The tokenizer of a model that was found in another file."""
        tokenizer = cls.__new__(cls)
        BaseTokenizer.__init__(tokenizer)
        tokenizer._use(path, data, added or {})
        return tokenizer

    def _use(self, path: Path, data: bytes, added: Mapping[int, tuple[str, bool]]) -> None:
        from sentencepiece import SentencePieceProcessor  # here: who only names the type needs no native library

        try:
            self.sp_model = SentencePieceProcessor(model_proto=data)
        except (RuntimeError, UnicodeDecodeError):  # the latter: its own message quotes what is damaged
            raise TokenizerError(
                f"tokenizer {path} ({len(data)} bytes) is not a SentencePiece model: get Llama-2's tokenizer.model"
            ) from None
        self.model_path = path
        self._own: int = self.sp_model.vocab_size()
        self._added = {token: text for token, text in added.items() if token >= self._own}
        self.n_words = max((self._own - 1, *self._added)) + 1
        self.bos_id = self.sp_model.bos_id()
        self.eos_id = self.sp_model.eos_id()
        self.pad_id = self.sp_model.pad_id()
        if self.bos_id < 0 or self.eos_id < 0:
            raise TokenizerError(f"tokenizer {path} has no begin or end token: get Llama-2's tokenizer.model")
        if fault := _damage(self.sp_model):
            raise TokenizerError(f"tokenizer {path} is damaged, {fault}: download it again")
        controls = (token for token in range(self._own) if self.sp_model.is_control(token))
        self.specials = {self.sp_model.id_to_piece(token): token for token in controls}
        self.specials |= {text: token for token, (text, control) in self._added.items() if control}
        space = self.sp_model.piece_to_id(SPACE)
        # Decoding drops a first space where encoding adds one ("dummy prefix"), and all first spaces where encoding
        # removes them: ask the model, do not assume it.
        left = self.sp_model.decode([space, space])
        self.strips_first_space, self.strips_first_spaces = left != "  ", left == ""

    def _encode(self, text: str) -> list[int]:
        tokens: list[int] = self.sp_model.encode(text)
        return tokens

    def decode(self, t: Sequence[int]) -> str:
        tokens = list(t)
        if max(tokens, default=0) >= self._own:
            return super().decode(tokens)
        text: str = self.sp_model.decode(tokens)
        return text

    def _encode_part(self, text: str, first: bool) -> list[int]:
        return self._encode(text)  # as Meta's format has it: a space before each part

    def id_of(self, piece: str) -> int | None:
        token: int = self.sp_model.piece_to_id(piece)  # the unknown piece's, or -1, where there is none
        if 0 <= token < self._own and self.sp_model.id_to_piece(token) == piece:
            return token
        return next((token for token, (text, _) in self._added.items() if text == piece), None)

    def _name(self, token: int) -> str:
        return self.sp_model.id_to_piece(token) if token < self._own else self._added[token][0]

    def _surface(self, token: int) -> str | int | bytes:
        if token >= self._own:
            added, control = self._added.get(token, ("", True))
            return "" if control else added
        model = self.sp_model
        if model.is_control(token):
            return ""
        if model.is_unknown(token):
            text: str = model.decode([token])
            return text
        piece: str = model.id_to_piece(token)
        return int(piece[3:-1], 16) if model.is_byte(token) else piece


def _either(names: Iterable[str]) -> str:
    """A pattern for any of these texts, the longest where several begin at one place."""
    return "|".join(map(re.escape, sorted(filter(None, names), key=len, reverse=True))) or "(?!)"


def _damage(model: "SentencePieceProcessor") -> str | None:
    """What is wrong with a piece, before a text meets it. Takes milliseconds: the model is asked for all at once."""
    tokens = list(range(model.vocab_size()))
    try:
        pieces = model.id_to_piece(tokens)
        model.decode(tokens)
    except UnicodeDecodeError:
        return "a piece of it is not UTF-8"
    is_byte, is_control = model.is_byte(tokens), model.is_control(tokens)
    for token, score in enumerate(model.get_score(tokens)):
        if not math.isfinite(score):
            return f"the score of token {token} is {score}"
        if is_byte[token] and not _BYTE.fullmatch(pieces[token]):
            return f"token {token} stands for a byte, but is {pieces[token]!r:.60}"
    texts = [token for token in tokens if not (is_byte[token] or is_control[token])]
    texts += [token for token in texts if pieces[token] == SPACE]  # at the end, where some would drop it
    spelled = "".join(model.decode([token]) if model.is_unknown(token) else pieces[token] for token in texts)
    if model.decode(texts).lstrip(" ") != spelled.replace(SPACE, " ").lstrip(" "):
        return "its tokens are decoded to other texts than their pieces"
    return None


def file_bytes(path: Path) -> bytes:
    """The file's bytes. Raises TokenizerError for the files that people pass by mistake."""
    if path.is_dir():
        raise TokenizerError(f"tokenizer {path} is a folder: tokenizer_path is the tokenizer.model file itself")
    try:
        data = read(path, _MOST_BYTES)
    except FileNotFoundError:
        raise TokenizerError(f"tokenizer {path} does not exist: check tokenizer_path") from None
    except OSError as error:
        raise TokenizerError(f"tokenizer {path} cannot be read: {error.strerror}") from None
    size = f"({len(data)} bytes)"
    if not data:
        raise TokenizerError(f"tokenizer {path} is empty (0 bytes): download it again")
    if data.startswith(b"version https://git-lfs"):
        raise TokenizerError(f"tokenizer {path} is a git-lfs pointer {size}: run git lfs pull")
    if data.lstrip()[:1] == b"<":
        raise TokenizerError(f"tokenizer {path} is an HTML page {size}: the download link failed; download it again")
    first = data.split(b"\n", 1)[0].split()
    if len(first) == 2 and first[1].isdigit():
        raise TokenizerError(
            f"tokenizer {path} is a Llama-3 (tiktoken) file {size}: Llama-2 needs its own tokenizer.model"
        )
    return data


class StreamDecoder:
    """Tokens → text as they come; all that it returns, joined, is `Tokenizer.decode` of all tokens.

    With stop strings the text ends exactly where the first of them begins, `stopped` turns true, and what might be
    the start of one is held back until it is decided. One whose last character was decided by the first `min_tokens`
    tokens that were fed is plain text; it counts where a later token completes it, wherever it began. A text that goes
    on `inside` another keeps its first space.
    """

    def __init__(
        self, tokenizer: BaseTokenizer, stop: Sequence[str] = (), min_tokens: int = 0, *, inside: bool = False
    ) -> None:
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._min_tokens, self._fed = min_tokens, 0
        self._at_start = tokenizer.strips_first_space and not inside
        self._bytes = b""  # of byte tokens that are not a character yet
        self._held = ""  # text that might be the start of a stop string
        self._plain = 0  # how much of it no stop string may end in

    def feed(self, token: int) -> str:
        """The text that this token decides."""
        self._fed += 1
        return self._until_stop(self.decode(token))

    def flush(self) -> str:
        """The text that was still held back, at the end."""
        return self._until_stop(self._characters(end=True), end=True)

    def decode(self, token: int) -> str:
        """What the token adds to the text, stop strings aside: for tokens of the prompt."""
        added = self.added(token)
        if isinstance(added, bytes):
            self._bytes += added
            return self._characters(end=False)
        return self._characters(end=True) + added  # a control token ends a run of bytes too

    def added(self, token: int) -> str | bytes:
        """What the token adds where it stands: a string, or bytes. Call it once a token."""
        surface = self._tokenizer.surface(token)
        if isinstance(surface, int):
            surface = bytes([surface])
        if isinstance(surface, bytes):
            self._at_start = False
            return surface
        if self._at_start and surface:
            surface = surface.removeprefix(SPACE)
            self._at_start = self._tokenizer.strips_first_spaces and not surface
        return surface.replace(SPACE, " ")

    def _characters(self, end: bool) -> str:
        """The characters that the waiting bytes make; what may yet become one goes on waiting unless at the end."""
        text = ""
        while self._bytes:
            size = _character_size(self._bytes[0])
            try:
                text += self._bytes[:size].decode()
                self._bytes = self._bytes[size:]
            except UnicodeDecodeError as error:
                if "unexpected end" in error.reason and not end:
                    break
                text += REPLACEMENT
                self._bytes = self._bytes[1 if self._tokenizer.replaces_each_byte else error.end :]
        return text

    def _until_stop(self, text: str, end: bool = False) -> str:
        if self.stopped or not self._stop:
            return "" if self.stopped else text
        text = self._held + text
        if self._fed <= self._min_tokens:
            self._plain = len(text)
        begins = [text.find(stop, max(0, self._plain - len(stop) + 1)) for stop in self._stop]
        if max(begins) >= 0:
            self.stopped, self._held = True, ""
            return text[: min(at for at in begins if at >= 0)]
        decided = len(text) if end else len(text) - max(_overlap(text, stop) for stop in self._stop)
        self._held, self._plain = text[decided:], max(0, self._plain - decided)
        return text[:decided]


def _character_size(first: int) -> int:
    """How many bytes the UTF-8 character has that begins with this byte (1 where none does)."""
    return 4 if first >= 0xF0 else 3 if first >= 0xE0 else 2 if first >= 0xC0 else 1


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that is a beginning of `stop`, not all of it."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
