"""The house: a file imports only from its own room and those below it, and what needs no torch does not import it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

# From the top. A room is a package or a file of `llama/`; those of one line do not know each other.
FLOORS = (
    ("__main__",),
    ("cli", "integrations"),
    ("batch", "bench", "server"),
    ("generation",),
    ("loading", "turns", "jobs", "prompt_cache"),
    ("output", "checkpoint", "openai"),
    ("engine", "predictions"),
    ("model",),
    ("kernels", "options"),
    ("device", "placement", "quantization"),
    ("text",),
    ("parallel", "chat", "infilling", "progress", "windows"),
    ("request", "interrupts", "gguf", "device_map"),
    ("grammar",),
    ("tokenizer",),
    ("paths", "script", "response_format"),
    ("wording",),
    ("errors", "log"),
    ("gate",),
)
FLOOR = {room: number for number, floor in enumerate(FLOORS) for room in floor}
WITHOUT_TORCH = {
    "bench", "bench.figures", "bench.report", "bench.rounds",
    "cli", "cli.arguments", "cli.build", "cli.chat", "cli.chat.commands", "cli.chat.conversation", "cli.commands",
    "cli.demo_scenes", "cli.flags", "cli.help", "cli.output", "cli.prompt_cache", "cli.prompts",
    "cli.score", "cli.shell", "cli.token_view",
    "batch", "batch.identity", "batch.input", "batch.lines", "batch.openai", "batch.records", "batch.results", "engine",
    "engine.drafts", "engine.scheduler", "checkpoint", "checkpoint.checklist", "checkpoint.resharding", "quantization",
    "quantization.formats", "options", "predictions", "chat", "tokenizer", "request", "progress", "interrupts", "paths",
    "errors", "wording", "log", "script", "gate", "checkpoint.find", "openai",
    "text", "text.json_tokenizer", "text.tokenizer_files", "text.template", "text.chat_files", "text.gguf_tokenizer",
    "text.step_chat", "gguf", "infilling", "grammar", "response_format", "windows",
    "device_map", "placement",
}  # fmt: skip


def name_of(path: Path) -> str:
    """llama/cli/chat/__init__.py → cli.chat"""
    return ".".join(path.relative_to(ROOT / "llama").with_suffix("").parts).removesuffix("__init__").rstrip(".")


FILES = {
    name_of(path): path
    for path in (ROOT / "llama").rglob("*.py")
    if path.parent != ROOT / "llama" or path.stem != "__init__"
}


def imports(name: str, *, at_start: bool = False) -> set[str]:
    """The modules that a file imports anywhere in it, or when it is imported; those of the package without "llama."."""
    found, tree = set(), ast.parse(FILES[name].read_text())
    for node in tree.body if at_start else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} has a relative import"
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = {module for module in inside if module.removeprefix("llama.") in FILES}
            found |= modules or {node.module}
    return {module.removeprefix("llama.") for module in found}


def room(module: str) -> str:
    return module.split(".")[0]


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_file_imports_only_from_its_room_and_those_below(name: str) -> None:
    assert room(name) in FLOOR, "a new room gets its place among the floors"
    rooms = {room(module) for module in imports(name) & FILES.keys()} - {room(name)}
    assert not {other for other in rooms if FLOOR[other] <= FLOOR[room(name)]}


def test_files_of_a_room_do_not_import_each_other_in_a_circle() -> None:
    left = {name: (imports(name) & FILES.keys()) - {name} for name in FILES}
    while free := [name for name, needs in left.items() if not needs & left.keys()]:
        for name in free:
            del left[name]
    assert not left


@pytest.mark.parametrize("name", sorted(WITHOUT_TORCH))
def test_what_needs_no_torch_does_not_import_it(name: str) -> None:
    """Nor does anything of the package that it imports; a function of it may, when it is called."""
    seen, queue = set(), [name]
    while queue:
        current = queue.pop()
        seen.add(current)
        assert not {"torch", "fairscale"} & {module.split(".")[0] for module in imports(current, at_start=True)}
        needed = imports(current, at_start=True) & FILES.keys()
        needed |= {module.rpartition(".")[0] for module in needed} & FILES.keys()
        queue += [module for module in needed if module not in seen]


def test_commands_start_without_torch() -> None:
    """`import llama` and the command's module bring in neither torch nor sentencepiece."""
    code = (
        "import llama, llama.cli.commands, sys;"
        " print([m for m in ('torch', 'fairscale', 'sentencepiece') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert out.stdout == "[]\n"


def test_tests_mirror_the_rooms() -> None:
    """A package of `llama` has a folder of that name in `tests`, and the other way round."""
    folders = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and any(path.rglob("test_*.py"))}
    assert folders == {room(name) for name in FILES if "." in name}
