"""The house: a file of the package imports only files below it, and what needs no torch does not import it."""

import ast
import subprocess
import sys

import pytest
from conftest import ROOT

ORDER = (
    "__main__", "cli", "batch_file", "generation", "output", "engine", "beam_search", "scheduler", "checkpoint",
    "memory", "params_file", "model", "linear", "quantization", "attention", "kv_cache", "step", "checklist",
    "resharding", "chat", "tokenizer", "sampling", "request", "parallel", "errors",
)  # fmt: skip
WITHOUT_TORCH = {"cli", "batch_file", "scheduler", "resharding", "chat", "tokenizer", "request", "errors", "checklist"}
FILES = {path.stem: path for path in (ROOT / "llama").glob("*.py") if path.stem != "__init__"}


def imports(name: str) -> set[str]:
    """The modules that a file imports anywhere in it; those of the package by their bare name."""
    found = set()
    for node in ast.walk(ast.parse(FILES[name].read_text())):
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
    """Nor does anything of the package that it imports."""
    seen, queue = set(), [name]
    while queue:
        current = queue.pop()
        seen.add(current)
        assert not {"torch", "fairscale"} & {module.split(".")[0] for module in imports(current)}
        queue += [module for module in imports(current) & set(FILES) if module not in seen]


def test_commands_start_without_torch() -> None:
    """`import llama` and the command's module bring in neither torch nor sentencepiece."""
    code = (
        "import llama, llama.cli, sys; print([m for m in ('torch', 'fairscale', 'sentencepiece') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert out.stdout == "[]\n"
