"""Compiles the CPU kernels when the package is installed, if a compiler is there; the rest is in pyproject.toml."""

import sys

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCES = (
    "team", "quantize", "pack", "quantized", "plain", "tiles", "neon", "ops", "attention", "sample", "decode_step",
)  # fmt: skip


class BuildKernels(build_ext):
    """With OpenMP, or without it where the compiler has none. PyTorch brings the OpenMP library, so none is linked."""

    def build_extension(self, extension: Extension) -> None:
        flags = ["/O2"] if sys.platform == "win32" else ["-O3", "-fno-math-errno"]
        for more in (["-fopenmp"], []):
            extension.extra_compile_args = flags + more
            try:
                return super().build_extension(extension)
            except Exception as error:  # no compiler, or no OpenMP: `optional` reports what remains
                failure = error
        raise failure


setup(
    ext_modules=[
        Extension(
            "llama.kernels.cpu",
            [f"llama/kernels/{name}.c" for name in SOURCES],
            depends=["llama/kernels/kernels.h"],
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildKernels},
)
