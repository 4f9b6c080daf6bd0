"""The house: a file of the package imports only files below it, and what needs no torch does not import it."""

import ast
import subprocess
import sys

import pytest
from conftest import ROOT

ORDER = (
    "__main__", "cli", "chat_session", "chat_commands", "conversation", "showcase", "scoring", "batch", "replicas",
    "batch_output", "batch_file", "openai_batch", "terminal", "token_view", "generation", "loading", "turns", "output",
    "engine", "decode_loop", "beam_search", "scheduler", "checkpoint_writer", "checkpoint_info", "checkpoint", "memory",
    "params_file", "pth_file", "compiled", "model", "linear", "sampling", "kernels", "quantization", "weight_format",
    "attention", "flash_attention", "kv_cache", "step", "checklist", "progress", "shell", "help_page", "flags",
    "command_line", "resharding", "chat", "tokenizer", "request", "parallel", "interrupts", "paths", "errors", "gate",
)  # fmt: skip
WITHOUT_TORCH = {
    "cli", "chat_commands", "conversation", "showcase", "scoring", "progress", "batch_output", "batch_file",
    "openai_batch", "terminal", "token_view", "scheduler", "checklist", "shell", "help_page", "flags", "command_line",
    "resharding", "weight_format", "chat", "tokenizer", "request", "interrupts", "paths", "errors", "gate",
}  # fmt: skip
FILES = {path.stem: path for path in (ROOT / "llama").glob("*.py") if path.stem != "__init__"}
FILES["kernels"] = ROOT / "llama" / "kernels" / "__init__.py"


def imports(name: str, *, at_start: bool = False) -> set[str]:
    """The modules that a file imports anywhere in it, or when it is imported; those of the package by bare name."""
    found, tree = set(), ast.parse(FILES[name].read_text())
    for node in tree.body if at_start else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "llama":
            found |= {f"llama.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
    return {module.removeprefix("llama.") for module in found}


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_file_imports_only_files_below_it(name: str) -> None:
    assert name in ORDER, "a new file gets its place in the order"
    below = set(ORDER[ORDER.index(name) + 1 :])
    assert imports(name) & set(ORDER) <= below


@pytest.mark.parametrize("name", sorted(WITHOUT_TORCH))
def test_what_needs_no_torch_does_not_import_it(name: str) -> None:
    """Nor does anything of the package that it imports; a function of it may, when it is called."""
    seen, queue = set(), [name]
    while queue:
        current = queue.pop()
        seen.add(current)
        assert not {"torch", "fairscale"} & {module.split(".")[0] for module in imports(current, at_start=True)}
        queue += [module for module in imports(current, at_start=True) & set(FILES) if module not in seen]


def test_commands_start_without_torch() -> None:
    """`import llama` and the command's module bring in neither torch nor sentencepiece."""
    code = (
        "import llama, llama.cli, sys; print([m for m in ('torch', 'fairscale', 'sentencepiece') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert out.stdout == "[]\n"
