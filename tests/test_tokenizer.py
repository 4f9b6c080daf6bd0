"""Text and tokens: pieces and streams join to exactly what SentencePiece decodes; wrong files are named."""

import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
from conftest import DEMO, ROOT
from damage import fields, piece, setting
from hypothesis import given, settings
from hypothesis import strategies as st

from llama.errors import PromptError, TokenizerError
from llama.tokenizer import SPACE, StreamDecoder, Tokenizer

DEMO_TOKENIZER = Tokenizer(str(DEMO / "tokenizer.model"))
BYTES_FROM = 3  # the byte tokens follow <unk>, <s>, </s>
BYTES = st.integers(BYTES_FROM, BYTES_FROM + 255)
TOKENS = st.lists(st.integers(0, DEMO_TOKENIZER.n_words - 1) | BYTES | st.sampled_from([0, 1, 2]), max_size=30)


def test_special_tokens() -> None:
    t = DEMO_TOKENIZER
    assert (t.bos_id, t.eos_id, t.pad_id) == (1, 2, -1)
    assert t.n_words == t.sp_model.vocab_size()
    plain = t.encode("a cat", bos=False, eos=False)
    assert t.encode("a cat", bos=True, eos=True) == [1, *plain, 2]
    assert all(t.sp_model.is_byte(token) for token in range(3, 259))


@given(st.text(max_size=60))
def test_any_text_round_trips(text: str) -> None:
    """Byte fallback: no text is lost, whatever its characters (but U+2581, SentencePiece's own sign for a space)."""
    text = text.replace("\u2581", "")
    tokens = DEMO_TOKENIZER.encode(text, bos=True, eos=True)
    assert DEMO_TOKENIZER.decode(tokens) == text
    assert "".join(DEMO_TOKENIZER.pieces(tokens)) == text


@settings(max_examples=400)
@given(TOKENS)
def test_pieces_and_streams_join_to_decode(tokens: list[int]) -> None:
    """For every sequence of tokens, control tokens and invalid UTF-8 included; one piece a token."""
    check_joins(DEMO_TOKENIZER, tokens)


def check_joins(tokenizer: Tokenizer, tokens: list[int]) -> None:
    whole = tokenizer.decode(tokens)
    pieces = tokenizer.pieces(tokens)
    assert len(pieces) == len(tokens)
    assert "".join(pieces) == whole
    decoder, text = StreamDecoder(tokenizer), ""
    for n, token in enumerate(tokens, 1):
        text += decoder.feed(token)
        so_far = tokenizer.decode(tokens[:n])
        assert so_far.startswith(text)
        text.encode()  # never half a character
        # Held back: only bytes at the end that may yet become a character, which decoding shows as replacements.
        assert set(so_far[len(text) :]) <= {"\ufffd"}
        assert len(so_far) - len(text) <= 3
    assert text + decoder.flush() == whole


@settings(max_examples=300)
@given(st.data())
def test_stop_strings_cut_at_their_first_place(data: st.DataObject) -> None:
    """The text ends where a stop string begins, at the first token after the first `min_tokens` that completes one.

    Held back is no more than what might begin one, and what ends within the first tokens is plain text.
    """
    tokens = data.draw(TOKENS)
    min_tokens = data.draw(st.sampled_from([0, 0, 1, 2, 3, 5, 100]))
    whole = DEMO_TOKENIZER.decode(tokens)
    inside = st.builds(lambda a, n: whole[a : a + n], st.integers(0, max(0, len(whole) - 1)), st.integers(1, 6))
    stops = [stop for stop in data.draw(st.lists(inside | st.text(min_size=1, max_size=3), max_size=3)) if stop]
    decoder, text = StreamDecoder(DEMO_TOKENIZER, stops, min_tokens), ""
    undisturbed, seen, first = StreamDecoder(DEMO_TOKENIZER), "", 0
    for count, token in enumerate([*tokens, None], 1):
        feed = (lambda d: d.flush()) if token is None else (lambda d, token=token: d.feed(token))
        text, seen = text + feed(decoder), seen + feed(undisturbed)
        if count <= min_tokens or len(tokens) <= min_tokens:
            first = len(seen)  # how far the text of the first tokens goes
        places = [
            at for stop in stops for at in range(len(seen)) if seen.startswith(stop, at) and at + len(stop) > first
        ]
        assert decoder.stopped == bool(places)
        if places:
            assert text == seen[: min(places)]
            return
        held = seen[len(text) :]
        assert not held or any(stop.startswith(held) and stop != held for stop in stops)
    assert text == seen == whole


@pytest.mark.parametrize(
    ("min_tokens", "stops", "text"),
    [
        (0, ["an"], "b"),
        (2, ["an"], "b"),  # begun by the second token, completed by the third
        (3, ["an"], "ban"),  # the second place is the first that counts
        (5, ["an", "xz"], "bananx"),  # none is left, but what might begin the other is held back
        (3, ["anax", "n"], "bana"),  # what was held back for the one holds the other, which ended before
        (6, ["x"], "bananx"),
        (7, ["x"], "bananxx"),
    ],
)
def test_what_the_first_tokens_complete_is_plain_text(min_tokens: int, stops: list[str], text: str) -> None:
    """Each letter is a token; a stop string counts from the first place at which a later token completes it."""
    decoder = StreamDecoder(DEMO_TOKENIZER, stops, min_tokens)
    assert "".join(decoder.feed(BYTES_FROM + byte) for byte in b"bananxx") == text


def test_nothing_comes_after_a_stop() -> None:
    tokens = DEMO_TOKENIZER.encode("a cat and a dog", bos=False, eos=False)
    decoder = StreamDecoder(DEMO_TOKENIZER, ["cat"])
    assert "".join(map(decoder.feed, tokens * 2)) + decoder.flush() == "a "


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Tokenizer]:
    """Train a small tokenizer on the spot."""

    def train(name: str, **options: object) -> Tokenizer:
        model = io.BytesIO()
        lines = ["a cat sat on a mat", "the dog and the cat", "  two  spaces here", "what is a dog?"] * 4
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=model, vocab_size=300, model_type="bpe", byte_fallback=True,
            hard_vocab_limit=False, minloglevel=2, **options,
        )  # fmt: skip
        path = tmp_path_factory.mktemp("tokenizer") / f"{name}.model"
        path.write_bytes(model.getvalue())
        return Tokenizer(str(path))

    return train


@pytest.mark.parametrize(
    "options",
    [{}, {"add_dummy_prefix": False, "remove_extra_whitespaces": False}, {"remove_extra_whitespaces": False},
     {"add_dummy_prefix": False}],
)  # fmt: skip
def test_other_tokenizers_join_too(train: Callable[..., Tokenizer], options: dict) -> None:
    """Whatever a tokenizer does with spaces, pieces join to its own decoding."""
    tokenizer = train("other", **options)
    for text in ("a cat", " a cat", "  a  cat ", "dog\n\tcat", "é\U0001f600", ""):
        check_joins(tokenizer, tokenizer.encode(text, bos=True, eos=True))
    space = tokenizer.sp_model.piece_to_id("\u2581")
    check_joins(tokenizer, [space, space, 1, space, *tokenizer.encode("a cat", bos=False, eos=False)])


def test_half_a_surrogate_is_refused() -> None:
    with pytest.raises(PromptError, match="half a surrogate"):
        DEMO_TOKENIZER.encode("a\ud800", bos=True, eos=False)
    with pytest.raises(PromptError, match="this is int: 5"):
        DEMO_TOKENIZER.encode(5, bos=True, eos=False)


def test_a_piece_by_itself_is_its_text_or_its_name() -> None:
    """Spaces are kept; control tokens and bytes, which have no text of their own, go by their names."""
    t = DEMO_TOKENIZER
    assert [t.piece(token) for token in (1, 2, 3, 258)] == ["<s>", "</s>", "<0x00>", "<0xFF>"]
    assert t.piece(t.sp_model.piece_to_id("\u2581")) == " "
    plain = range(259, t.n_words)
    assert [t.piece(token) for token in plain] == [t.sp_model.id_to_piece(i).replace("\u2581", " ") for i in plain]


def test_a_model_without_an_end_token_is_refused(train: Callable[..., Tokenizer]) -> None:
    with pytest.raises(TokenizerError, match=r"has no begin or end token: get Llama-2's tokenizer\.model"):
        train("endless", eos_id=-1)


@pytest.mark.parametrize(
    ("token", "changed", "said"),
    [
        (700, piece(b"\xff", 0, 1), "a piece of it is not UTF-8"),
        (700, piece(b"\xe2\x96", 0, 1), "a piece of it is not UTF-8"),  # half a character
        (0, piece(b"<\xff>", 0, 2), "a piece of it is not UTF-8"),
        (700, piece(b"\xed\xa0\x80", 0, 4), "a piece of it is not UTF-8"),  # half a surrogate pair
        (700, piece(b"abcdef", float("nan"), 1), "the score of token 700 is nan"),
        (700, piece(b"abcdef", float("-inf"), 1), "the score of token 700 is -inf"),
        (68, piece(b"<0x0041>", 0, 6), "token 68 stands for a byte, but is '<0x0041>'"),
    ],
)
def test_a_damaged_piece_is_found_when_the_file_is_opened(
    tmp_path: Path, token: int, changed: bytes, said: str
) -> None:
    """Not when a text is decoded in which it stands. SentencePiece may refuse it by itself."""
    parts = fields((DEMO / "tokenizer.model").read_bytes())
    path = tmp_path / "tokenizer.model"
    path.write_bytes(b"".join([*parts[:token], changed, *parts[token + 1 :]]))
    with pytest.raises(TokenizerError, match=rf"is damaged, {said}: download it again|is not a SentencePiece model"):
        Tokenizer(str(path))


def test_pieces_of_the_demo_written_anew_are_the_same(tmp_path: Path) -> None:
    """What the table above changes is the reason why it is refused."""
    path = tmp_path / "tokenizer.model"
    parts = fields((DEMO / "tokenizer.model").read_bytes())
    path.write_bytes(b"".join([*parts[:700], piece(b"abcdef", -1, 1), *parts[701:]]))
    assert Tokenizer(str(path)).piece(700) == "abcdef"


CRASH_TEST = """
import random, sys
from llama.errors import TokenizerError
from llama.tokenizer import Tokenizer
data = open(sys.argv[1], "rb").read()
for seed in range(20):
    r, damaged = random.Random(seed), bytearray(data)
    for _ in range(1000):
        damaged[r.randrange(len(data) // 2, len(data) - 100)] ^= 1 << r.randrange(8)
    open(sys.argv[1], "wb").write(damaged)
    try:
        tokenizer = Tokenizer(sys.argv[1])
        for _ in range(50):
            tokenizer.encode("".join(chr(r.randrange(32, 0xD800)) for _ in range(30)), bos=True, eos=False)
    except TokenizerError:
        pass
"""


def test_a_damaged_normaliser_crashes_nothing(train: Callable[..., Tokenizer]) -> None:
    """Most of a file that normalises characters is a table for native code; the demo's and Meta's have none."""
    path = train("normalising").model_path
    assert path.stat().st_size > 200_000
    done = subprocess.run([sys.executable, "-c", CRASH_TEST, str(path)], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_unknown_token_reads_as_the_file_says(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes((DEMO / "tokenizer.model").read_bytes() + setting(2, 44, b"<?>"))
    check_joins(Tokenizer(str(path)), [0, 700, 0, 0, 1])
    path.write_bytes((DEMO / "tokenizer.model").read_bytes() + setting(2, 44, SPACE.encode()))
    with pytest.raises(TokenizerError, match="is damaged, its tokens are decoded to other texts than their pieces"):
        Tokenizer(str(path))


def test_a_file_that_cannot_be_read_says_why(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(TokenizerError, match=r"cannot be read: Not a directory"):
        Tokenizer(str(tmp_path / "file" / "tokenizer.model"))


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (None, "does not exist: check tokenizer_path"),
        ("folder", "is a folder: tokenizer_path is the tokenizer.model file itself"),
        (b"", "is empty (0 bytes)"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "is a git-lfs pointer (46 bytes)"),
        (b"\n<!DOCTYPE html><html>", "is an HTML page (22 bytes)"),
        (b"IQ== 0\nIg== 1\n", "is a Llama-3 (tiktoken) file (14 bytes)"),
        (b"\x80\x02garbage" * 9, "(81 bytes) is not a SentencePiece model"),
    ],
)
def test_wrong_files_are_named(tmp_path: Path, data: bytes | str | None, said: str) -> None:
    path = tmp_path / "tokenizer.model"
    if data == "folder":
        path.mkdir()
    elif data is not None:
        path.write_bytes(data)
    with pytest.raises(TokenizerError) as error:
        Tokenizer(str(path))
    assert str(error.value).startswith(f"tokenizer {path} ")
    assert said in str(error.value)
