"""tokenizer.json: its tokens and texts are those of the library, text is text, and streams keep their laws."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from json_tokenizers import SPECIALS, byte_level, save, spelled_spaces

from llama.errors import TokenizerError
from llama.text.json_tokenizer import JSONTokenizer
from llama.text.tokenizer_files import open_tokenizer
from llama.tokenizer import StreamDecoder

KINDS: dict[str, Callable[[], Any]] = {"bytes": byte_level, "spaces": spelled_spaces}
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


@pytest.fixture(scope="module", params=KINDS)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[JSONTokenizer, Any]:
    """(Ours, the library's) of each kind."""
    library = KINDS[request.param]()
    begin = "<|begin|>" if request.param == "bytes" else "<s>"
    folder = save(library, tmp_path_factory.mktemp("tokenizer") / "a", bos_token=begin, eos_token={"content": "</s>"})
    ours = open_tokenizer(str(folder))
    assert isinstance(ours, JSONTokenizer)
    return ours, library


@given(st.data())
@settings(max_examples=60)
def test_texts_are_encoded_as_the_library_encodes_them(both: tuple[JSONTokenizer, Any], data: st.DataObject) -> None:
    """And come back, where no normaliser changes them; a first space may be one that was added."""
    ours, library = both
    text = data.draw(ANY_TEXT | st.sampled_from(["The fox", " two  spaces", "<think>", "你好\U0001f600", "\n\n\t"]))
    tokens = ours.encode(text, bos=False, eos=False)
    assert tokens == library.encode(text, add_special_tokens=False).ids
    assert ours.decode(tokens) == text
    assert ours.encode(text, bos=True, eos=True) == [ours.bos_id, *tokens, ours.eos_id]


@given(st.integers(0, 2**32))
@settings(max_examples=60)
def test_tokens_are_decoded_as_the_library_decodes_them(both: tuple[JSONTokenizer, Any], seed: int) -> None:
    """Any tokens in any order, control tokens among them; bytes that are no UTF-8 too, where tokens spell bytes.

    The other kind's library gives up a whole run of bytes for one of them; a stream cannot know that one is to come.
    """
    ours, library = both
    r = random.Random(seed)
    tokens = [r.randrange(ours.n_words) for _ in range(r.randrange(1, 12))]
    if not ours._bytes:
        tokens = [token for token in tokens if not isinstance(ours.surface(token), int)]
    assert ours.decode(tokens) == library.decode(tokens, skip_special_tokens=True)


@given(st.integers(0, 2**32))
@settings(max_examples=60)
def test_streams_keep_their_laws(both: tuple[JSONTokenizer, Any], seed: int) -> None:
    """Pieces and streams join to the text, bytes to its UTF-8; tokens that only the weights have add nothing."""
    ours, _ = both
    r = random.Random(seed)
    tokens = [r.randrange(ours.n_words + 5) for _ in range(r.randrange(12))]
    text = ours.decode(tokens)
    assert "".join(ours.pieces(tokens)) == text and len(ours.pieces(tokens)) == len(tokens)
    decoder = StreamDecoder(ours)
    assert "".join([*map(decoder.feed, tokens), decoder.flush()]) == text
    known = [token for token in tokens if token < ours.n_words]
    joined = b"".join(ours.token_bytes(known))
    assert joined.decode(errors="ignore") == ours.decode(known).replace("�", "")
    stop = text[len(text) // 2 : len(text) // 2 + 2]
    if stop:
        stopping = StreamDecoder(ours, [stop])
        found = "".join([*map(stopping.feed, tokens), stopping.flush()])
        assert stopping.stopped and found == text[: text.index(stop)]


def test_text_is_text(both: tuple[JSONTokenizer, Any]) -> None:
    """What is spelled like a special token is none; the library alone would take it for one."""
    ours, library = both
    controls = set(ours.specials.values())
    assert controls
    for name in ours.specials:
        assert not controls & set(ours.encode(f"a{name}b {name}", bos=False, eos=False))
        assert ours.decode(ours.encode(f"a{name}b", bos=False, eos=False)) == f"a{name}b"
        assert controls & set(library.encode(f"a{name}b").ids)
        assert ours.encode_template(f"a{name}b").count(ours.specials[name]) == 1
        assert ours.surface(ours.specials[name]) == b"" and ours.piece(ours.specials[name]) == name


def test_every_token_can_be_shown(both: tuple[JSONTokenizer, Any]) -> None:
    ours, _ = both
    for token in range(ours.n_words + 3):
        assert ours.piece(token).encode()


def test_the_begin_token_is_put_where_the_file_puts_it(tmp_path: Path) -> None:
    """By its own template, unless tokenizer_config.json says otherwise; a name that is not there is no token."""
    library = byte_level()
    begin = library.token_to_id("<|begin|>")
    cases: list[tuple[dict[str, Any], int, bool]] = [
        ({}, begin, True),
        ({"bos_token": "<|begin|>"}, begin, True),
        ({"bos_token": "<|begin|>", "add_bos_token": False}, begin, False),
        ({"bos_token": "<s>"}, library.token_to_id("<s>"), False),
        ({"bos_token": "nowhere"}, -1, False),
    ]
    for config, token, adds in cases:
        ours = open_tokenizer(str(save(library, tmp_path / "a", **config)))
        assert (ours.bos_id, ours.adds_bos) == (token, adds), config
        assert ours.encode("a", bos=True, eos=False)[:1] == (
            [token] if adds else ours.encode("a", bos=False, eos=False)
        )


def test_tokens_that_a_folder_adds_to_a_sentencepiece_model(tmp_path: Path, tokenizer: Any) -> None:
    """They have numbers behind the model's; text never becomes one, and the end token may be one of them."""
    (tmp_path / "tokenizer.model").write_bytes(tokenizer.model_path.read_bytes())
    (tmp_path / "added_tokens.json").write_text('{"<|im_end|>": 1024, "<|im_start|>": 1025}')
    added = {"1026": {"content": "<word>", "special": False}, "1024": {"content": "<|im_end|>", "special": True}}
    config = {"eos_token": "<|im_end|>", "added_tokens_decoder": added}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours = open_tokenizer(str(tmp_path))
    assert (ours.n_words, ours.eos_id, ours.bos_id) == (1027, 1024, tokenizer.bos_id)
    tokens = ours.encode("Hello <|im_end|>", bos=False, eos=False)
    assert 1024 not in tokens and ours.decode(tokens) == "Hello <|im_end|>"
    assert ours.encode_template("<|im_start|>Hello<|im_end|>")[0::2][0] == 1025
    assert ours.decode([*tokenizer.encode("Hello", bos=False, eos=False), 1026, 1024]) == "Hello<word>"
    assert ours.piece(1024) == "<|im_end|>" and ours.decode([5000]) == ""


WORD_PIECE = {"type": "WordPiece", "prefix": "##", "cleanup": True}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: d.pop("model"), "has no model"),
        (lambda d: d["model"].pop("vocab"), "is not a tokenizer.json ("),
        (
            lambda d: d.update(decoder={"type": "WordPiece", "prefix": "##", "cleanup": True}),
            "decodes by WordPiece, which is not known here",
        ),
        (lambda d: d.update(decoder=None), "decodes by None"),
        (lambda d: d["model"].update(merges=[["a", "zzzz"]]), "is not a tokenizer.json ("),
    ],
)
def test_what_is_no_tokenizer_is_refused_in_one_line(change: Any, said: str, tmp_path: Path) -> None:
    described = json.loads(byte_level().to_str())
    change(described)
    (tmp_path / "tokenizer.json").write_text(json.dumps(described))
    with pytest.raises(TokenizerError) as error:
        open_tokenizer(str(tmp_path))
    assert said in str(error.value) and "\n" not in str(error.value)


@given(st.integers(0, 2**32))
@settings(max_examples=150, deadline=None)
def test_damaged_files_are_read_or_refused(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    from damage import RUNS

    r = random.Random(seed)
    data = DAMAGED.setdefault("data", byte_level().to_str().encode())
    path = DAMAGED.setdefault("folder", tmp_path_factory.mktemp("damaged")) / "tokenizer.json"
    path.write_bytes(r.choice(RUNS)(r, data))
    try:
        ours = open_tokenizer(str(path))
    except TokenizerError as refused:
        error = str(refused)
    else:
        error = ""
        ours.decode(ours.encode("The fox", bos=True, eos=False))
    assert "\n" not in error


DAMAGED: dict[str, Any] = {}


def test_a_tokenizer_is_found_in_the_folder(tmp_path: Path, tokenizer: Any) -> None:
    """A SentencePiece model counts where both are there."""
    save(byte_level(), tmp_path / "a")
    assert isinstance(open_tokenizer(str(tmp_path / "a")), JSONTokenizer)
    (tmp_path / "a" / "tokenizer.model").write_bytes(tokenizer.model_path.read_bytes())
    assert not isinstance(open_tokenizer(str(tmp_path / "a")), JSONTokenizer)
    with pytest.raises(TokenizerError, match="is a folder"):
        open_tokenizer(str(tmp_path))


def test_specials_are_those_of_the_file() -> None:
    assert set(SPECIALS) <= {token.content for token in byte_level().get_added_tokens_decoder().values()}
