"""lm-evaluation-harness with our model: what its own `hf` model says of the same weights, in float32."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
for name in ("lm_eval", "accelerate"):
    pytest.importorskip(name, reason=f"needs lm-evaluation-harness and accelerate: pip install {name}")

import datasets  # noqa: E402
import lm_eval  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.registry import get_model  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from llama.checkpoint.convert import convert  # noqa: E402
from llama.errors import ParameterError, PromptError  # noqa: E402
from llama.integrations.lm_eval import LlamaRunner  # noqa: E402

TASKS = Path(__file__).parent / "lm_eval_tasks"
MAX_LENGTH = 96
SETTINGS = '{"tokenizer_class": "LlamaTokenizer", "add_bos_token": true, "bos_token": "<s>", "eos_token": "</s>"}'


@pytest.fixture(scope="module")
def ours(demo_float32: Path) -> LlamaRunner:
    return LlamaRunner(str(demo_float32), batch_size=4, max_length=MAX_LENGTH, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def theirs(demo_float32: Path, tmp_path_factory: pytest.TempPathFactory) -> HFLM:
    folder = tmp_path_factory.mktemp("hf") / "demo"
    convert(demo_float32, folder, "hf")
    (folder / "tokenizer_config.json").write_text(SETTINGS)
    (folder / "generation_config.json").write_text('{"eos_token_id": 2}')
    return HFLM(
        pretrained=str(folder), device="cpu", dtype="float32", batch_size=4, max_length=MAX_LENGTH,
        logits_cache=False,  # which mixes up requests of one text that is split at two places
    )  # fmt: skip


@pytest.fixture(autouse=True)
def in_the_tasks_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the tasks' files are; what the harness keeps of data goes elsewhere."""
    monkeypatch.chdir(TASKS)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


def evaluate(model: Any, *tasks: str, **options: Any) -> tuple[dict[str, Any], list[Any]]:
    """(The metrics of each task, what the model answered to each request, in order)."""
    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    found = lm_eval.simple_evaluate(model, tasks=list(tasks), task_manager=manager, bootstrap_iters=0, **options)
    answers = [answer for task in tasks for sample in found["samples"][task] for answer in sample["filtered_resps"]]
    metrics = {
        f"{task}: {name}": value for task in tasks for name, value in found["results"][task].items() if "," in name
    }
    return {name: value for name, value in metrics.items() if isinstance(value, float)}, answers


def asked(kind: str, *requests: tuple) -> list[Instance]:
    return [Instance(kind, {}, request, index) for index, request in enumerate(requests)]


def test_choices_are_those_of_the_hf_model(ours: LlamaRunner, theirs: HFLM) -> None:
    """Log-probabilities, greediness and what follows from them, with examples before each question."""
    mine, answers = evaluate(ours, "llama_choices")
    expected, their_answers = evaluate(theirs, "llama_choices")
    assert len(answers) == 18
    assert [logprob for logprob, _ in answers] == pytest.approx([logprob for logprob, _ in their_answers], abs=1e-4)
    assert [greedy for _, greedy in answers] == [greedy for _, greedy in their_answers]
    assert mine == pytest.approx(expected) and len(mine) == 2


def test_rolling_perplexity_is_that_of_the_hf_model(
    ours: LlamaRunner, theirs: HFLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over texts of several windows too. The hf model would score the begin token of its tokenizer as well."""
    monkeypatch.setattr(theirs, "add_bos_token", False)
    mine, answers = evaluate(ours, "llama_rolling")
    expected, their_answers = evaluate(theirs, "llama_rolling")
    assert max(len(ours.tok_encode(request)) for request in re.findall('": "(.*)"', _data("rolling"))) > MAX_LENGTH
    assert answers == pytest.approx(their_answers, rel=1e-5, abs=1e-4) and mine == pytest.approx(expected, rel=1e-4)


def test_completions_are_those_of_the_hf_model(ours: LlamaRunner, theirs: HFLM) -> None:
    """With stop strings, a limit, end tokens, and a context that loses its first tokens."""
    _, answers = evaluate(ours, "llama_completions")
    assert answers == evaluate(theirs, "llama_completions")[1]
    assert len(list(filter(None, answers))) >= 3 and not any("lake" in answer for answer in answers)


def test_edges_of_scoring(ours: LlamaRunner, theirs: HFLM, capsys: pytest.CaptureFixture) -> None:
    """Nothing before; spaces at the context's end; longer than the context; a continuation that fills it."""
    requests = asked(
        "loglikelihood",
        ("", "Once upon a time"), ("Once upon ", "a time"), ("Once upon  ", "a time"), ("Once upon", " a"),
        ("Once upon a time there was a small fox. " * 20, "He was happy."), ("Once", " upon a" * 31),
        ("\n", "Tom"),
    )  # fmt: skip
    mine = ours.loglikelihood(requests, disable_tqdm=True)
    assert "llama: 1 prompt is longer than max_length has room for: cut from the left\n" in capsys.readouterr().err
    expected = theirs.loglikelihood(requests, disable_tqdm=True)
    assert [logprob for logprob, _ in mine] == pytest.approx([logprob for logprob, _ in expected], rel=1e-5, abs=1e-4)
    assert [greedy for _, greedy in mine] == [greedy for _, greedy in expected]
    with pytest.raises(PromptError, match="is longer than max_length=96: raise that"):
        ours.loglikelihood(asked("loglikelihood", ("Once", " upon a" * 99)), disable_tqdm=True)
    assert ours.loglikelihood(asked("loglikelihood", ("Once", "")), disable_tqdm=True) == [(0.0, True)]


def test_greedy_is_what_generation_gives(ours: LlamaRunner) -> None:
    (text,) = ours.generate_until(asked("generate_until", ("Ben wanted a red kite.", {"max_gen_toks": 6})))
    requests = asked(
        "loglikelihood", ("Ben wanted a red kite.", f" {text}"), ("Ben wanted a red kite.", f" {text} zebra")
    )
    assert [greedy for _, greedy in ours.loglikelihood(requests)] == [True, False]


def test_what_begins_alike_is_computed_once(ours: LlamaRunner) -> None:
    """A header, a question's context, in whatever order they are asked for."""
    ours.llama.engine.clear_prefix_cache()
    header = "Once upon a time there was a small fox named Tom. He went to the lake. "
    requests = [(f"{header}Ben wanted a {what}.", f" {end}") for end in ("Yes", "No") for what in ("red kite", "hat")]
    before = ours.llama.engine.computed_tokens
    ours.loglikelihood(asked("loglikelihood", *requests), disable_tqdm=True)
    assert ours.llama.engine.computed_tokens - before < len(ours.tok_encode(header)) + 4 * 16


def test_answers_are_kept_by_the_harness(ours: LlamaRunner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With --use_cache nothing is computed again, of all three kinds."""
    tasks, cache = ("llama_choices", "llama_rolling", "llama_completions"), str(tmp_path / "cache")
    first = evaluate(ours, *tasks, use_cache=cache)
    with monkeypatch.context() as patch:
        patch.setattr(ours, "llama", None)
        assert evaluate(ours, *tasks, use_cache=cache) == first


def test_sampling_parameters_reach_the_model(ours: LlamaRunner) -> None:
    """Sampled text differs from run to run of a request; a seed repeats it; what is not known is refused."""
    drawn = {"do_sample": True, "temperature": 5.0, "max_gen_toks": 12, "seed": 3, "top_k": 500}
    request = ("Ben wanted", drawn)
    one, two = ours.generate_until(asked("generate_until", request, request), disable_tqdm=True)
    assert one == two
    three, four = ours.generate_until(
        asked("generate_until", *[("Ben wanted", {**drawn, "seed": None})] * 2), disable_tqdm=True
    )
    assert three != four
    (greedy,) = ours.generate_until(asked("generate_until", ("Ben wanted", {"max_gen_toks": 4})), disable_tqdm=True)
    cold = {**drawn, "do_sample": False, "max_gen_toks": 4}
    assert ours.generate_until(asked("generate_until", ("Ben wanted", cold)), disable_tqdm=True) == [greedy]
    with pytest.raises(ParameterError, match="unknown field 'top_q': did you mean 'top_p'"):
        ours.generate_until(asked("generate_until", ("Ben wanted", {"top_q": 1})))
    with pytest.raises(ParameterError, match="max_gen_toks=96 leaves no room for a prompt in max_length=96"):
        ours.generate_until(asked("generate_until", ("Ben wanted", {"max_gen_toks": MAX_LENGTH})))


def test_chat_templates(ours: LlamaRunner) -> None:
    """The text that the harness gets stands for the tokens that `chat_completion` runs."""
    dialog = [
        {"role": "system", "content": "One word."}, {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes"}, {"role": "user", "content": "What sound does a cow make?"},
    ]  # fmt: skip
    exact = ours.llama.format_dialog(dialog)
    assert ours.tok_encode(ours.apply_chat_template(dialog)) == exact.tokens
    begun = [*dialog, {"role": "assistant", "content": "The cow says"}]
    assert ours.apply_chat_template(begun, add_generation_prompt=False) == f"{exact.text} The cow says"
    assert ours.chat_template(True) == "llama2" and ours.chat_template(False) is None
    assert "/" not in ours.tokenizer_name and "llama2" in ours.tokenizer_name
    with pytest.raises(ParameterError, match="a checkpoint has one format here"):
        ours.chat_template("rag")
    (answer,) = ours.generate_until(
        asked("generate_until", (ours.apply_chat_template(dialog), {"max_gen_toks": 12})), disable_tqdm=True
    )
    expected = ours.llama.chat_completion([dialog], temperature=0, max_gen_len=12)[0]
    assert answer == expected["generation"]["content"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dtpye": "float32"}, "model_args has 'dtpye': did you mean 'dtype'?"),
        ({"zzz": 1}, "model_args has 'zzz': expected what Llama.build takes"),
        ({"batch_size": "many"}, "batch_size='many' is no number: expected an integer, or auto"),
        ({"batch_size": 0}, "max_batch_size=0 is out of range"),
    ],
)
def test_arguments_are_checked(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ParameterError, match=said):
        LlamaRunner(**options)


def test_the_command(demo_float32: Path, tmp_path: Path) -> None:
    """As a person types it, but for the list of the harness's own tasks, which takes it seconds to make."""
    code = (
        "import functools, runpy, lm_eval.tasks as tasks\n"
        "tasks.TaskManager = functools.partial(tasks.TaskManager, include_defaults=False)\n"
        "runpy.run_module('llama.integrations.lm_eval', run_name='__main__', alter_sys=True)"
    )
    words = [
        "--model", "llama_runner", "--model_args", f"ckpt_dir={demo_float32},max_length=512,dtype=float32",
        "--device", "cpu", "--batch_size", "auto", "--tasks", "llama_choices", "--include_path", str(TASKS),
        "--apply_chat_template",
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=TASKS,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert re.search(r"^\|llama_choices\|.*\|acc +\|", done.stdout, re.MULTILINE)
    assert "Running loglikelihood requests: 100%" in done.stderr


def test_the_entry_point_names_the_model() -> None:
    """By which versions of the harness from 2026-09 on find it."""
    target = re.search(r'^llama_runner = "(.+):(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert getattr(sys.modules[target[1]], target[2]) is get_model("llama_runner") is LlamaRunner


def _data(task: str) -> str:
    return (TASKS / f"{task}.jsonl").read_text()
