"""What the flags of a command say, built: a model and its tokenizer."""

import contextlib
from typing import TYPE_CHECKING, Any

from llama import log
from llama.cli.shell import without_stderr

if TYPE_CHECKING:
    from llama.generation import Llama


def build(model: dict[str, Any], at_once: int) -> "Llama":
    """Build what the flags of a command say; a batch size that was not said is `at_once`."""
    import_libraries()
    from llama import Llama

    if model.get("max_batch_size") is None:
        model = {**model, "max_batch_size": at_once}
    return Llama.build(**model)


def import_libraries() -> None:
    """Import torch and all that is built on it; with --quiet without what native libraries say by themselves.

    GNU's OpenMP, for one, speaks of each of its variables that it cannot read, in every library that brings it along.
    """
    with contextlib.nullcontext() if log.is_said() else without_stderr():
        import sentencepiece  # noqa: F401

        import llama.generation  # noqa: F401
        from llama.kernels.library import load

        load()
