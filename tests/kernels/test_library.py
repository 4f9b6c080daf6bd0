"""The compiled library for CPUs: which variant of it runs."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

from llama.kernels import library


def test_the_variant_can_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """By LLAMA_KERNELS: a worse one than the processor has, or none."""
    monkeypatch.delenv("LLAMA_KERNELS", raising=False)  # with which these tests may be run
    built = library.load.__wrapped__()[0]
    code = "from llama.kernels.library import *; print(load()[0] is not None and VARIANTS[variant()])"
    for named, expected in (("portable", "portable" if built else "False"), ("none", "False")):
        environment = {**os.environ, "LLAMA_KERNELS": named}
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=ROOT)
        assert out.stdout == f"{expected}\n", out.stderr


def test_each_machine_has_variants_of_its_own() -> None:
    """As kernels.h numbers them: Linux and macOS name the same processor differently."""
    assert library.variants_of("aarch64") == library.variants_of("arm64") == ("portable", "neon", "dotprod", "bf16")
    assert library.variants_of("AMD64") == library.variants_of("x86_64")
    assert library.variants_of("x86_64")[1:] == ("avx2", "avx512", "avx512bf16", "amx")
    assert library.variants_of("riscv64")[0] == "portable"
