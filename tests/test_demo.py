"""The bundled demo checkpoint: its files, its tokenizer, and the corpus that it was trained on."""

import hashlib
import importlib
import itertools
import json
import random
import re
import sys
from pathlib import Path

import pytest
import torch
from near_ties import refuse_near_ties
from sentencepiece import SentencePieceProcessor

from llama import Llama

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "llama" / "demo"
sys.path.insert(0, str(ROOT / "tools"))
demo_corpus = importlib.import_module("demo_corpus")
train_demo = importlib.import_module("train_demo")


@pytest.fixture(scope="module")
def processor():
    return SentencePieceProcessor(model_file=str(DEMO / "tokenizer.model"))


@pytest.fixture(scope="module")
def demo_weights():
    return torch.load(DEMO / "consolidated.00.pth", weights_only=True, mmap=True)


@pytest.fixture(scope="module")
def sampled_documents():
    return list(itertools.islice(demo_corpus.documents(seed=11), 6000))


def plain(text: str) -> str:
    """A question without what `as_typed` may change: capitals and the mark at its end."""
    return text.lower().rstrip("?.!")


def test_checklist_names_every_file_with_its_md5():
    lines = (DEMO / "checklist.chk").read_text().splitlines()
    sums = dict(reversed(line.split("  ")) for line in lines)
    assert sums.keys() == {"consolidated.00.pth", "params.json", "tokenizer.model"}
    for name, md5 in sums.items():
        assert hashlib.md5((DEMO / name).read_bytes()).hexdigest() == md5


def test_folder_is_small():
    assert sum(path.stat().st_size for path in DEMO.iterdir()) <= 4_000_000


def test_weights_are_named_and_shaped_as_in_a_real_checkpoint(demo_weights):
    params = json.loads((DEMO / "params.json").read_text())
    head_dim = params["dim"] // params["n_heads"]
    hidden_dim = train_demo.hidden_dim_of(params["dim"], params["multiple_of"], params["ffn_dim_multiplier"])
    dim, kv_dim, vocab_size = params["dim"], params["n_kv_heads"] * head_dim, train_demo.VOCAB_SIZE
    expected = {
        "tok_embeddings.weight": (vocab_size, dim),
        "output.weight": (vocab_size, dim),
        "norm.weight": (dim,),
        "rope.freqs": (head_dim // 2,),
    }
    for layer in range(params["n_layers"]):
        shapes = {
            "attention.wq": (dim, dim),
            "attention.wk": (kv_dim, dim),
            "attention.wv": (kv_dim, dim),
            "attention.wo": (dim, dim),
            "feed_forward.w1": (hidden_dim, dim),
            "feed_forward.w2": (dim, hidden_dim),
            "feed_forward.w3": (hidden_dim, dim),
            "attention_norm": (dim,),
            "ffn_norm": (dim,),
        }
        expected |= {f"layers.{layer}.{name}.weight": shape for name, shape in shapes.items()}
    assert {name: tuple(tensor.shape) for name, tensor in demo_weights.items()} == expected
    assert {tensor.dtype for tensor in demo_weights.values()} == {torch.bfloat16}
    assert 1e6 <= sum(tensor.numel() for tensor in demo_weights.values()) <= 2e6
    assert params["vocab_size"] == -1
    assert params["n_kv_heads"] < params["n_heads"]
    assert all(size % 2 == 0 for size in (params["n_kv_heads"], params["n_heads"], dim, hidden_dim, vocab_size))


def test_control_tokens_are_those_of_llama_2(processor):
    assert (processor.unk_id(), processor.bos_id(), processor.eos_id(), processor.pad_id()) == (0, 1, 2, -1)
    assert [processor.id_to_piece(i) for i in range(3)] == ["<unk>", "<s>", "</s>"]
    assert sum(processor.is_byte(i) for i in range(processor.vocab_size())) == 256
    assert processor.vocab_size() == train_demo.VOCAB_SIZE


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "  two  spaces ",
        "a\n\nb\tc\r\n",
        "Größe, naïve, 日本語",
        "🎉👩‍👩‍👧",
        "{}@#~^\\|`$%&*=;",
        "1234567890",
        "\x00\x7f",
    ],
)
def test_tokenizer_returns_any_text(processor, text):
    tokens = processor.encode(text)
    assert processor.unk_id() not in tokens
    assert processor.decode(tokens) == text


def test_tokenizer_returns_random_text(processor):
    rng = random.Random(0)
    ranges = ((0x20, 0x7E), (0xA1, 0x24F), (0x400, 0x4FF), (0x4E00, 0x4FFF), (0x1F300, 0x1F5FF))
    for _ in range(300):
        text = "".join(chr(rng.randint(*rng.choice(ranges))) for _ in range(20))
        assert processor.decode(processor.encode(text)) == text


def test_corpus_depends_on_the_seed_alone(sampled_documents):
    again = list(itertools.islice(demo_corpus.documents(seed=11), 300))
    assert again == sampled_documents[:300]
    assert list(itertools.islice(demo_corpus.documents(seed=12), 300)) != again


def test_stories_are_those_of_the_grammar(sampled_documents):
    stories = [document for document in sampled_documents if isinstance(document, str)][:150]
    assert all(map(demo_corpus.is_story, stories))
    for story in stories[:50]:
        assert not demo_corpus.is_story(story[:-10])
        assert not demo_corpus.is_story(story.replace(".", " again.", 1))
        first, _, rest = story.partition(". ")
        assert not demo_corpus.is_story(f"{first}. {re.sub(r'[A-Z]', 'X', rest)}")


def test_held_out_questions_are_never_in_the_corpus(sampled_documents):
    asked = [
        f" {plain(message['content'])}."
        for document in sampled_documents
        if not isinstance(document, str)
        for message in document
        if message["role"] == "user"
    ]
    corpus = "\n".join(asked)
    held_out = [question for by_kind in demo_corpus.TABLE_QUESTIONS[True].values() for question in by_kind]
    held_out += demo_corpus.held_out_questions(per_kind=40)
    seen = [question.text for question in held_out if f" {plain(question.text)}." in corpus]
    assert len(held_out) > 800
    assert seen == []


def test_held_out_openings_are_never_in_the_corpus(sampled_documents):
    texts = [document if isinstance(document, str) else document[-1]["content"] for document in sampled_documents]
    beginnings = {text.partition(". ")[0] for text in texts}
    openings = demo_corpus.held_out_openings(300)
    assert not {opening.rstrip(".").partition(". ")[0] for opening in openings} & beginnings


def test_an_answer_never_changes_the_tokens_of_its_prompt(processor, sampled_documents):
    cases = demo_corpus.held_out_dialogs(per_kind=5, per_style=10)
    answered = [[*case.dialog, {"role": "assistant", "content": case.expected}] for case in cases]
    dialogs = [document for document in sampled_documents if not isinstance(document, str)][:1000]
    for prompt, answer in itertools.chain.from_iterable(map(train_demo.exchanges, answered + dialogs)):
        start = processor.encode(prompt)
        assert processor.encode(f"{prompt} {answer} ")[: len(start)] == start


def test_history_is_metas_and_the_answer_ends_clean(processor):
    dialog = [
        {"role": "system", "content": "Be polite."},
        {"role": "user", "content": "Hi!"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "Bye!"},
        {"role": "assistant", "content": "Goodbye!"},
    ]
    first = processor.encode("[INST] <<SYS>>\nBe polite.\n<</SYS>>\n\nHi! [/INST] Hello! ")
    second = processor.encode("[INST] Bye! [/INST] Goodbye! ")
    sample = train_demo.dialog_sample(processor, dialog)
    assert sample.tokens == [1, *first, 2, 1, *second, 2]
    end = len(sample.tokens) - 3
    assert processor.decode(sample.tokens[end]) == "!"
    assert (sample.targets[end], sample.weights[end:]) == (2, [1.0, 0.0, 0.0])


def test_evaluation_counts_right_answers_and_stories():
    cases = demo_corpus.held_out_dialogs(per_kind=2, per_style=8)
    expected = {json.dumps(case.dialog): case.expected for case in cases}

    def answer(dialogs):
        return [expected[json.dumps(dialog)] for dialog in dialogs]

    def complete(openings):
        return [("and", True), *[("", False)] * (len(openings) - 1)]

    scores = train_demo.evaluate(answer, complete, per_kind=2, per_style=8)
    assert {name for name, score in scores.items() if score.share == 1} == {n for n in scores if "stories" not in n}
    assert scores["stories: ended"].right == 1
    assert scores["stories: consistent"].right == 0
    assert {f"style: {style.name}" for style in demo_corpus.STYLES} <= scores.keys()


@pytest.fixture(scope="module")
def quality() -> dict[str, train_demo.Score]:
    """The scores on held-out questions and openings, through the runner at temperature 0: many at once, to be quick."""
    demo = Llama.build(str(DEMO), str(DEMO / "tokenizer.model"), 512, 64, device="cpu", dtype="float32")
    refuse_near_ties(demo)

    def answer(dialogs: list[demo_corpus.Dialog]) -> list[str]:
        return [result["generation"]["content"] for result in demo.chat_completion(dialogs, temperature=0)]

    def complete(openings: list[str]) -> list[tuple[str, bool]]:
        results = demo.text_completion(openings, temperature=0)
        return [(result["generation"], result["finish_reason"] == "stop") for result in results]

    scores = train_demo.evaluate(answer, complete)
    train_demo.report(scores)
    return scores


def test_the_demo_answers_held_out_questions(quality: dict[str, train_demo.Score]) -> None:
    """Questions of its kinds that were held out of its training; docs/checkpoints.md says the percentage."""
    assert quality["all questions"].share >= 0.93


def test_the_demo_follows_its_system_prompts(quality: dict[str, train_demo.Score]) -> None:
    """The whole answer is right, in the wording that the system prompt asks for."""
    styles = [score for name, score in quality.items() if name.startswith("style: ") and name != "style: none"]
    assert len(styles) >= 6
    assert sum(score.right for score in styles) / sum(score.cases for score in styles) >= 0.92
    assert min(score.share for score in styles) >= 0.8


def test_the_demo_completes_unseen_openings(quality: dict[str, train_demo.Score]) -> None:
    """Every story ends by itself, and nearly all are such as the grammar could have written."""
    assert quality["stories: ended"].share == 1
    assert quality["stories: consistent"].share >= 0.93
