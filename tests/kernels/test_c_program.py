"""kernels_test.c, which checks every variant of the C kernels, compiled and run: natively under sanitizers, and for
ARM64 under an emulator, with all instructions that it knows and with those of a plain Cortex-A72."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT

KERNELS = ROOT / "llama" / "kernels"
SOURCES = [str(path) for path in sorted(KERNELS.glob("*.c")) if path.name != "decode_step.c"]  # which the test includes
TEST = str(ROOT / "tests" / "kernels" / "kernels_test.c")
AS_INSTALLED = ["-O3", "-fno-math-errno"]  # setup.py's flags
SANITIZED = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover"]
ARM_COMPILER, ARM_LIBRARIES = "aarch64-linux-gnu-gcc", "/usr/aarch64-linux-gnu"
EMULATOR = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")


def compiled(compiler: str, flags: list[str], folder: Path) -> Path:
    """The test program, with OpenMP where the compiler has it; skips where there is no such compiler or sanitizer."""
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not installed")
    program, empty = folder / "kernels_test", folder / "empty.c"
    empty.write_text("int main(void) { return 0; }\n")
    for more in (["-fopenmp"], []):
        options = [compiler, *flags, *more, f"-I{KERNELS}", "-o", str(program)]
        probe = subprocess.run([*options, str(empty)], capture_output=True, text=True)
        if probe.returncode == 0:
            built = subprocess.run([*options, TEST, *SOURCES, "-lm"], capture_output=True, text=True)
            assert built.returncode == 0, built.stderr
            return program
    pytest.skip(f"{compiler} cannot link with {' '.join(flags)}: {probe.stderr.splitlines()[-1]}")


def run(command: list[str]) -> str:
    """What the program printed, which must have found nothing wrong."""
    # Leaks cannot be looked for under a debugger or an emulator, and are not what is tested.
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0", "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


def emulated(program: Path, cpu: str) -> str:
    if EMULATOR is None:
        pytest.skip("qemu-aarch64 is not installed (Debian's qemu-user)")
    return run([EMULATOR, "-cpu", cpu, "-L", ARM_LIBRARIES, str(program)])


@pytest.fixture(scope="module")
def for_arm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(ARM_COMPILER, [*AS_INSTALLED, "-static"], tmp_path_factory.mktemp("arm"))


def test_no_variant_fails_or_leaves_its_buffers(tmp_path: Path) -> None:
    assert "0 of" in run([str(compiled("gcc", SANITIZED, tmp_path))])


@pytest.mark.parametrize(("cpu", "best"), [("max", 3), ("cortex-a72", 1)])  # kernels.h's USES_BF16 and USES_NEON
def test_no_variant_fails_on_arm(for_arm: Path, cpu: str, best: int) -> None:
    assert emulated(for_arm, cpu).endswith(f"; variants 0 to {best}\n")


def test_no_variant_leaves_its_buffers_on_arm(tmp_path: Path) -> None:
    program = compiled(ARM_COMPILER, [*SANITIZED, "-static-libasan"], tmp_path)
    assert "0 of" in emulated(program, "max")
