"""Train the demo checkpoint on the little world of `demo_corpus`, and measure what it learned.

`python tools/train_demo.py` writes the tokenizer, the weights and their checksums; two CPU cores take about a quarter
of an hour, and the same seed gives the same files. `python tools/train_demo.py --evaluate` asks a written checkpoint
what it has never seen.
"""

import argparse
import hashlib
import io
import itertools
import json
import math
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import sentencepiece
import torch
import torch.nn.functional as F
from demo_corpus import Case, Dialog, documents, held_out_dialogs, held_out_openings, is_story
from torch import Tensor, nn

DEMO = Path(__file__).resolve().parent.parent / "llama" / "demo"
PARAMS = {
    "dim": 192,
    "n_layers": 4,
    "n_heads": 8,
    "n_kv_heads": 4,
    "vocab_size": -1,
    "multiple_of": 64,
    "ffn_dim_multiplier": 0.875,
    "norm_eps": 1e-05,
}
VOCAB_SIZE = 1024
MAX_SEQ_LEN = 512
ROPE_THETA = 10000.0
BATCH_TOKENS = 4096
PROMPT_WEIGHT = 0.1
MUON_LR = 1e-2
ADAM_LR = 8e-3
STEPS = 2400
THREADS = 2

Answer = Callable[[list[Dialog]], list[str]]
Complete = Callable[[list[str]], list[tuple[str, bool]]]


# -------------------------------------------------------------------------------------------------------- tokenizer


def exchanges(dialog: Dialog) -> list[tuple[str, str]]:
    """The prompt text and the answer of each exchange, the system message inside the first prompt, as Llama-2 has it.

    The last answer is empty where the dialog ends with the user's turn.
    """
    turns = list(dialog)
    if turns[0]["role"] == "system":
        content = f"<<SYS>>\n{turns[0]['content']}\n<</SYS>>\n\n{turns[1]['content']}"
        turns = [{"role": "user", "content": content}, *turns[2:]]
    answers = [turn["content"].strip() for turn in turns[1::2]] + [""] * (len(turns) % 2)
    prompts = [f"[INST] {turn['content'].strip()} [/INST]" for turn in turns[::2]]
    return list(zip(prompts, answers, strict=True))


def train_tokenizer(seed: int, count: int = 12000) -> bytes:
    """A byte-pair SentencePiece model with Llama-2's settings, learned from a sample of the corpus."""

    def lines() -> Iterator[str]:
        for document in itertools.islice(documents(seed), count):
            texts = [document] if isinstance(document, str) else map(" ".join, exchanges(document))
            for text in texts:
                yield from text.splitlines()

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines(),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCAB_SIZE,
        character_coverage=1.0,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=True,
        allow_whitespace_only_pieces=True,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


# ------------------------------------------------------------------------------------------------------------ model


class RMSNorm(nn.Module):
    """Root-mean-square normalisation with a learned gain."""

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight, PARAMS["norm_eps"])


def linear(fan_in: int, fan_out: int, scale: float = 1.0) -> nn.Linear:
    """A linear map without bias, started small enough to keep the variance."""
    layer = nn.Linear(fan_in, fan_out, bias=False)
    nn.init.normal_(layer.weight, std=scale / math.sqrt(fan_in))
    return layer


def rotate(x: Tensor, rotations: Tensor) -> Tensor:
    """Turn each interleaved pair of x (B, T, H, D) by its position's rotations (T, D / 2)."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotations[:, None]).flatten(-2)


class Attention(nn.Module):
    """Causal attention with grouped key and value heads, over whole documents."""

    def __init__(self, dim: int, n_heads: int, n_kv_heads: int, n_layers: int):
        super().__init__()
        self.head_dim = dim // n_heads
        self.wq = linear(dim, dim)
        self.wk = linear(dim, n_kv_heads * self.head_dim)
        self.wv = linear(dim, n_kv_heads * self.head_dim)
        self.wo = linear(dim, dim, 1 / math.sqrt(2 * n_layers))

    def forward(self, x: Tensor, rotations: Tensor) -> Tensor:
        q, k, v = (w(x).unflatten(-1, (-1, self.head_dim)) for w in (self.wq, self.wk, self.wv))
        q, k, v = (h.transpose(1, 2) for h in (rotate(q, rotations), rotate(k, rotations), v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.wo(mixed.transpose(1, 2).flatten(-2))


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, dim: int, hidden_dim: int, n_layers: int):
        super().__init__()
        self.w1 = linear(dim, hidden_dim)
        self.w2 = linear(hidden_dim, dim, 1 / math.sqrt(2 * n_layers))
        self.w3 = linear(dim, hidden_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    """Attention and feed-forward, each on the normalised stream."""

    def __init__(self, dim: int, n_heads: int, n_kv_heads: int, hidden_dim: int, n_layers: int):
        super().__init__()
        self.attention = Attention(dim, n_heads, n_kv_heads, n_layers)
        self.feed_forward = FeedForward(dim, hidden_dim, n_layers)
        self.attention_norm = RMSNorm(dim)
        self.ffn_norm = RMSNorm(dim)

    def forward(self, x: Tensor, rotations: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rotations)
        return x + self.feed_forward(self.ffn_norm(x))


def hidden_dim_of(dim: int, multiple_of: int, ffn_dim_multiplier: float) -> int:
    """Meta's formula for the width of the feed-forward layers."""
    hidden_dim = int(ffn_dim_multiplier * int(2 * (4 * dim) / 3))
    return multiple_of * math.ceil(hidden_dim / multiple_of)


class Model(nn.Module):
    """Llama-2 with its parameters named as a checkpoint names them."""

    def __init__(self) -> None:
        super().__init__()
        dim, n_layers, n_heads, n_kv_heads = (PARAMS[key] for key in ("dim", "n_layers", "n_heads", "n_kv_heads"))
        hidden_dim = hidden_dim_of(dim, PARAMS["multiple_of"], PARAMS["ffn_dim_multiplier"])
        self.tok_embeddings = nn.Embedding(VOCAB_SIZE, dim)
        nn.init.normal_(self.tok_embeddings.weight)
        self.layers = nn.ModuleList(Block(dim, n_heads, n_kv_heads, hidden_dim, n_layers) for _ in range(n_layers))
        self.norm = RMSNorm(dim)
        self.output = linear(dim, VOCAB_SIZE)
        head_dim = dim // n_heads
        self.frequencies = 1.0 / ROPE_THETA ** (torch.arange(0, head_dim, 2) / head_dim)
        angles = torch.outer(torch.arange(MAX_SEQ_LEN), self.frequencies)
        self.rotations = torch.polar(torch.ones_like(angles), angles)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (B, T, V) of the tokens (B, T), each row a document that starts at position 0."""
        x = self.tok_embeddings(tokens)
        for layer in self.layers:
            x = layer(x, self.rotations[: tokens.shape[1]])
        return self.output(self.norm(x))


# ------------------------------------------------------------------------------------------------------------- data


@dataclass(frozen=True, slots=True)
class Sample:
    """The tokens of one document, what should follow each of them, and how much that matters."""

    tokens: list[int]
    targets: list[int]
    weights: list[float]


def story_sample(tokenizer: sentencepiece.SentencePieceProcessor, text: str) -> Sample:
    """A story, of which every token matters."""
    ids = [tokenizer.bos_id(), *tokenizer.encode(text), tokenizer.eos_id()]
    return Sample(ids[:-1], ids[1:], [1.0] * (len(ids) - 1))


def dialog_sample(tokenizer: sentencepiece.SentencePieceProcessor, dialog: Dialog) -> Sample:
    """A dialog with its history exactly as Llama-2 writes it: each answer, a space, the end of sequence.

    That space is read, never learned: an answer's last token should be followed by the end of sequence at once.
    """
    tokens: list[int] = []
    targets: list[int] = []
    weights: list[float] = []
    for prompt, answer in exchanges(dialog):
        start = [tokenizer.bos_id(), *tokenizer.encode(prompt)]
        ids = [tokenizer.bos_id(), *tokenizer.encode(f"{prompt} {answer} "), tokenizer.eos_id()]
        space = tokenizer.piece_to_id("\u2581")
        assert ids[: len(start)] == start, f"an answer changes the tokens of its prompt: {prompt!r} {answer!r}"
        assert ids[-2] == space, f"no space follows the answer {answer!r}"
        tokens += ids
        targets += [*ids[1:-2], tokenizer.eos_id(), tokenizer.eos_id(), tokenizer.bos_id()]
        weights += [PROMPT_WEIGHT] * (len(start) - 1) + [1.0] * (len(ids) - len(start) - 1) + [0.0, 0.0]
    return Sample(tokens, targets, weights)


def samples(tokenizer: sentencepiece.SentencePieceProcessor, seed: int) -> Iterator[Sample]:
    """The encoded corpus, without the few documents longer than the context."""
    for document in documents(seed):
        encode = story_sample if isinstance(document, str) else dialog_sample
        sample = encode(tokenizer, document)
        if len(sample.tokens) <= MAX_SEQ_LEN:
            yield sample


def batches(tokenizer: sentencepiece.SentencePieceProcessor, seed: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Tokens, targets and weights (B, T) of documents of like lengths, about BATCH_TOKENS in each batch."""
    rng = random.Random(seed)
    source = samples(tokenizer, seed)
    while True:
        pool = sorted(itertools.islice(source, 2048), key=lambda sample: len(sample.tokens), reverse=True)
        cut = []
        while pool:
            count = max(1, BATCH_TOKENS // len(pool[0].tokens))
            cut.append(pool[:count])
            pool = pool[count:]
        rng.shuffle(cut)
        yield from map(pad, cut)


def pad(group: list[Sample]) -> tuple[Tensor, Tensor, Tensor]:
    """The samples as rows, filled up on the right with tokens of no weight; the first is the longest."""
    shape = (len(group), len(group[0].tokens))
    tokens, targets, weights = (
        torch.zeros(shape, dtype=torch.long),
        torch.zeros(shape, dtype=torch.long),
        torch.zeros(shape),
    )
    for row, sample in enumerate(group):
        length = len(sample.tokens)
        tokens[row, :length] = torch.tensor(sample.tokens)
        targets[row, :length] = torch.tensor(sample.targets)
        weights[row, :length] = torch.tensor(sample.weights)
    return tokens, targets, weights


# --------------------------------------------------------------------------------------------------------- training


def learning_rate_factor(step: int, steps: int, warm_up: int = 50) -> float:
    """A short rise, then half a cosine down to a hundredth."""
    if step < warm_up:
        return (step + 1) / warm_up
    progress = (step - warm_up) / max(1, steps - warm_up)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress))


def build_optimizers(model: Model) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for the embeddings, the output and the gains."""
    matrices = [parameter for parameter in model.layers.parameters() if parameter.ndim == 2]
    chosen = set(map(id, matrices))
    others = [parameter for parameter in model.parameters() if id(parameter) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=MUON_LR, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=ADAM_LR, betas=(0.9, 0.98), weight_decay=0.01),
    ]


def train(tokenizer: sentencepiece.SentencePieceProcessor, steps: int, seed: int) -> Model:
    """A model trained for so many batches."""
    torch.manual_seed(seed)
    model = Model()
    optimizers = build_optimizers(model)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, steps))
        for optimizer in optimizers
    ]
    started, total, seen = time.monotonic(), 0.0, 0
    for step, (tokens, targets, weights) in enumerate(itertools.islice(batches(tokenizer, seed + 1), steps), start=1):
        losses = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), reduction="none")
        loss = (losses * weights.flatten()).sum() / weights.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
        total, seen = total + loss.item(), seen + tokens.numel()
        if step % 100 == 0:
            seconds = time.monotonic() - started
            print(
                f"step {step}/{steps}  loss {total / 100:.4f}  {seen / 1e6:.1f} M tokens  {seconds:.0f} s", flush=True
            )
            total = 0.0
    return model


def save(model: Model, tokenizer_model: bytes, folder: Path) -> None:
    """Write the folder as Meta ships one: weights in bfloat16, their parameters, the tokenizer, and the checksums."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.detach().to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    weights["rope.freqs"] = model.frequencies.to(torch.bfloat16)
    torch.save(weights, folder / "consolidated.00.pth")
    (folder / "params.json").write_text(json.dumps(PARAMS) + "\n")
    (folder / "tokenizer.model").write_bytes(tokenizer_model)
    names = ("consolidated.00.pth", "params.json", "tokenizer.model")
    sums = (hashlib.md5((folder / name).read_bytes(), usedforsecurity=False).hexdigest() for name in names)
    (folder / "checklist.chk").write_text("".join(f"{md5}  {name}\n" for md5, name in zip(sums, names, strict=True)))


# ------------------------------------------------------------------------------------------------------- evaluation


def load(folder: Path) -> tuple[Model, sentencepiece.SentencePieceProcessor]:
    """The model of a written checkpoint, in float32, and its tokenizer."""
    model = Model()
    weights = torch.load(folder / "consolidated.00.pth", weights_only=True)
    frequencies = weights.pop("rope.freqs")
    assert torch.equal(frequencies, model.frequencies.to(frequencies.dtype))
    model.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    return model.eval(), sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


def encode_prompt(tokenizer: sentencepiece.SentencePieceProcessor, dialog: Dialog) -> list[int]:
    """The tokens of a dialog that ends with the user's turn, as Llama-2 wants to be asked."""
    ids: list[int] = []
    for prompt, answer in exchanges(dialog):
        ids += [tokenizer.bos_id(), *tokenizer.encode(f"{prompt} {answer} " if answer else prompt)]
        ids += [tokenizer.eos_id()] if answer else []
    return ids


@torch.inference_mode()
def generate(model: Model, prompts: list[list[int]], eos_id: int) -> list[list[int]]:
    """Greedy continuations of some prompts, each up to and with its end of sequence or the end of the context.

    Rows are padded on the right, where causal attention never looks; without a cache every step reads all tokens again.
    """
    rows = [list(prompt) for prompt in prompts]
    active = list(range(len(rows)))
    while active:
        tokens = nn.utils.rnn.pad_sequence([torch.tensor(rows[index]) for index in active], batch_first=True)
        last = torch.tensor([len(rows[index]) - 1 for index in active])
        chosen = model(tokens)[torch.arange(len(active)), last].argmax(-1)
        for index, token in zip(active, chosen.tolist(), strict=True):
            rows[index].append(token)
        active = [index for index in active if rows[index][-1] != eos_id and len(rows[index]) < MAX_SEQ_LEN]
    return [row[len(prompt) :] for row, prompt in zip(rows, prompts, strict=True)]


def generate_texts(
    model: Model, tokenizer: sentencepiece.SentencePieceProcessor, prompts: list[list[int]], batch: int = 48
) -> list[tuple[str, bool]]:
    """The text that follows each prompt, and whether it ended by itself; prompts of like lengths go together."""
    eos_id = tokenizer.eos_id()
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    results: dict[int, tuple[str, bool]] = {}
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        for index, ids in zip(chosen, generate(model, [prompts[i] for i in chosen], eos_id), strict=True):
            results[index] = tokenizer.decode(ids), ids[-1] == eos_id
    return [results[index] for index in range(len(prompts))]


@dataclass(frozen=True, slots=True)
class Score:
    """How many of some cases were right, and what was wrong with the first few others."""

    right: int
    cases: int
    misses: tuple[str, ...]

    @property
    def share(self) -> float:
        """The part that was right, from 0 to 1."""
        return self.right / self.cases


def score_answers(cases: list[Case], texts: list[str]) -> dict[str, Score]:
    """The score of each kind of question asked alone, of each style, and of all; an answer is right to the letter."""
    groups: dict[str, list[tuple[Case, str]]] = defaultdict(list)
    for case, text in zip(cases, texts, strict=True):
        alone = case.style == "none" and len(case.dialog) == 1
        for name in ("all questions", f"question: {case.kind}" if alone else f"style: {case.style}"):
            groups[name].append((case, text))
    scores = {}
    for name, members in groups.items():
        misses = [
            f"{case.dialog[-1]['content']} -> {text!r}, not {case.expected!r}"
            for case, text in members
            if text.strip() != case.expected
        ]
        scores[name] = Score(len(members) - len(misses), len(members), tuple(misses[:4]))
    return scores


def score_stories(openings: list[str], completions: list[tuple[str, bool]]) -> dict[str, Score]:
    """How many stories end by themselves, and how many of them the grammar could have written."""
    stories = [f"{opening} {text.strip()}" for opening, (text, _) in zip(openings, completions, strict=True)]
    endless = tuple(story for story, (_, ended) in zip(stories, completions, strict=True) if not ended)
    wrong = tuple(
        story for story, (_, ended) in zip(stories, completions, strict=True) if not (ended and is_story(story))
    )
    count = len(stories)
    return {
        "stories: ended": Score(count - len(endless), count, endless[:4]),
        "stories: consistent": Score(count - len(wrong), count, wrong[:4]),
    }


def evaluate(answer: Answer, complete: Complete, per_kind: int = 24, per_style: int = 100) -> dict[str, Score]:
    """Ask held-out questions and complete held-out openings with whatever runs the checkpoint."""
    cases = held_out_dialogs(per_kind, per_style)
    openings = held_out_openings(120)
    scores = score_answers(cases, answer([case.dialog for case in cases]))
    return scores | score_stories(openings, complete(openings))


def evaluate_folder(folder: Path) -> dict[str, Score]:
    """Evaluate a written checkpoint with the plain forward pass of this file."""
    model, tokenizer = load(folder)

    def answer(dialogs: list[Dialog]) -> list[str]:
        texts = generate_texts(model, tokenizer, [encode_prompt(tokenizer, dialog) for dialog in dialogs])
        return [text for text, _ in texts]

    def complete(openings: list[str]) -> list[tuple[str, bool]]:
        prompts = [[tokenizer.bos_id(), *tokenizer.encode(opening)] for opening in openings]
        return generate_texts(model, tokenizer, prompts)

    return evaluate(answer, complete)


def report(scores: dict[str, Score]) -> None:
    """Print every score, and examples of what was wrong."""
    for name, score in sorted(scores.items()):
        print(f"{name:28} {score.right:5}/{score.cases:<5} {score.share:7.1%}")
        for miss in score.misses:
            print(f"    {miss}")


def main() -> None:
    """Train and write a checkpoint, or evaluate one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=DEMO, help="the checkpoint folder")
    parser.add_argument("--evaluate", action="store_true", help="evaluate the folder instead of writing it")
    parser.add_argument("--steps", type=int, default=STEPS, help="batches to train on")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)
    if not options.evaluate:
        tokenizer_model = train_tokenizer(options.seed)
        tokenizer = sentencepiece.SentencePieceProcessor(model_proto=tokenizer_model)
        save(train(tokenizer, options.steps, options.seed), tokenizer_model, options.out)
    report(evaluate_folder(options.out))


if __name__ == "__main__":
    main()
