"""What many tests share: the demo checkpoint's paths, a random checkpoint, and builders of `Llama`."""

import io
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from llama.script import wait_briefly

wait_briefly()  # as the command does; before torch loads OpenMP, whose threads would else crawl on busy cores

import torch  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent))
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background may have been started without Ctrl-C
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")  # a busy one is not a failure
ROOT = Path(__file__).parent.parent
DEMO = ROOT / "llama" / "demo"
Ended = tuple[int, str, str]  # exit code, stdout, stderr
# Those that take longest, by what they took: begun first, they leave no process of several alone with one at the end.
LONG = [
    "batch/test_run.py", "kernels/test_c_program.py", "batch/test_replicas.py", "test_parallel.py",
    "cli/chat/test_session.py", "cli/test_commands.py", "server/test_life.py", "test_peers.py", "kernels/test_gpu.py",
    "model/test_compiled.py", "test_demo.py", "test_docs.py", "test_examples.py", "test_examples_folder.py",
    "kernels/test_gpu_step.py", "server/test_defences.py", "integrations/test_lm_eval.py", "test_benchmarks.py",
]  # fmt: skip
for name in ("LLAMA_CKPT_DIR", "LLAMA_TOKENIZER_PATH"):  # or a command that names no checkpoint would not mean the demo
    os.environ.pop(name, None)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported by anyone

from browsers import browser  # noqa: E402, F401  # a fixture
from checkpoints import SMALL, random_weights, save  # noqa: E402
from near_ties import refuse_near_ties  # noqa: E402

from llama import Llama  # noqa: E402
from llama.cli import commands  # noqa: E402
from llama.tokenizer import Tokenizer  # noqa: E402


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest files; skip what needs a CUDA device where there is none."""
    turns = {ROOT / "tests" / name: turn for turn, name in enumerate(LONG)}
    items.sort(key=lambda item: turns.get(item.path, len(LONG)))
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """The demo's tokenizer."""
    return Tokenizer(str(DEMO / "tokenizer.model"))


@pytest.fixture(scope="session")
def small(tokenizer: Tokenizer) -> dict:
    """The sizes of a small random model with the demo's vocabulary and grouped-query attention."""
    return {**SMALL, "vocab_size": tokenizer.n_words}


@pytest.fixture(scope="session")
def weights(small: dict) -> dict[str, torch.Tensor]:
    return random_weights(small)


@pytest.fixture(scope="session")
def ckpt_dir(tmp_path_factory: pytest.TempPathFactory, small: dict, weights: dict[str, torch.Tensor]) -> Path:
    """The small random model as a folder of one shard, in float32."""
    return save(tmp_path_factory.mktemp("checkpoint") / "small", small, weights)


@pytest.fixture(scope="session")
def build(ckpt_dir: Path) -> Callable[..., Llama]:
    """Build a `Llama` on the small random model (float32, CPU): build(max_seq_len=128, max_batch_size=4, seed=…)."""

    def build(folder: Path = ckpt_dir, max_seq_len: int = 128, max_batch_size: int = 4, **options: object) -> Llama:
        options = {"device": "cpu", **options}
        return Llama.build(str(folder), str(DEMO / "tokenizer.model"), max_seq_len, max_batch_size, **options)

    return build


@pytest.fixture(scope="session")
def demo() -> Llama:
    """The demo checkpoint in float32 on the CPU: what shares a batch moves its logits, but no choice of a token."""
    llama = Llama.build(str(DEMO), str(DEMO / "tokenizer.model"), 512, 8, device="cpu", dtype="float32")
    refuse_near_ties(llama)
    return llama


@pytest.fixture(scope="session")
def demo_float32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo checkpoint converted: in bfloat16 the order of a sum often decides between two tokens."""
    weights = torch.load(DEMO / "consolidated.00.pth", weights_only=True)
    params = json.loads((DEMO / "params.json").read_text())
    folder = tmp_path_factory.mktemp("demo")
    shutil.copy(DEMO / "tokenizer.model", folder)
    return save(folder, params, {name: tensor.float() for name, tensor in weights.items()})


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """here(*words, data=b"…"): (exit code, stdout, stderr) of the command, run in this process."""

    def here(*words: str, data: bytes = b"") -> Ended:
        monkeypatch.setattr(sys, "argv", ["llama", *words])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        code = 0
        try:
            commands.main()
        except SystemExit as error:
            code = error.code
        return code, *capfd.readouterr()

    return here
