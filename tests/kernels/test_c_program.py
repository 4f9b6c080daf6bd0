"""kernels_test.c, which checks every variant of the C kernels, compiled and run: natively under sanitizers, and for
ARM64 under an emulator, with all instructions that it knows and with those of a plain Cortex-A72."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT

KERNELS = ROOT / "llama" / "kernels"
SOURCES = [str(path) for path in sorted(KERNELS.glob("*.c"))]
LINKED = [path for path in SOURCES if not path.endswith("decode_step.c")]  # which the test includes
TEST = str(ROOT / "tests" / "kernels" / "kernels_test.c")
AS_INSTALLED = ["-O3", "-fno-math-errno"]  # setup.py's flags
# It need not be known where variables lie, which takes long to find out.
SANITIZED = ["-O1", "-g1", "-fno-var-tracking", "-fsanitize=address,undefined", "-fno-sanitize-recover"]
SANITIZED += ["-DLOOKS=0"]  # threads take pieces from each other at every turn
BY_CALLS = ["--param=asan-instrumentation-with-call-threshold=0"]  # compiles in less time; an emulator loses it again
ARM_COMPILER, ARM_LIBRARIES = "aarch64-linux-gnu-gcc", "/usr/aarch64-linux-gnu"
CLANG_TARGETS = {
    "aarch64-linux-gnu": [],
    "arm64-apple-macos": ["-mcpu=apple-m1", "-U__nonnull"],  # a word of Apple's that means something else in glibc
}


def unrandomised() -> list[str]:
    """A command before which a program's addresses are the same each time: older sanitizers fail at random ones."""
    command = ["setarch", "-R"]
    usable = shutil.which("setarch") and subprocess.run([*command, "true"], capture_output=True).returncode == 0
    return command if usable else []


def emulator(cpu: str) -> list[str]:
    program = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
    if program is None:
        pytest.skip("qemu-aarch64 is not installed (Debian's qemu-user)")
    return [program, "-cpu", cpu, "-L", ARM_LIBRARIES]


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    # Leaks cannot be looked for under a debugger or an emulator, and are not what is tested.
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0", "OMP_WAIT_POLICY": "passive"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


def compiled(compiler: str, flags: list[str], folder: Path, under: list[str]) -> Path:
    """The test program, with OpenMP where the compiler has it; skips where not even an empty program can be compiled so
    and run `under` that."""
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not installed")
    program, empty = folder / "kernels_test", folder / "empty.c"
    empty.write_text("int main(void) { return 0; }\n")
    for more in (["-fopenmp"], []):
        options = [compiler, *flags, *more, f"-I{KERNELS}", "-o", str(program)]
        probe = run([*options, str(empty)])
        if probe.returncode == 0:
            probe = run([*under, str(program)])
        if probe.returncode == 0:
            built = run([*options, TEST, *LINKED, "-lm"])
            assert built.returncode == 0, built.stderr
            return program
    said = (probe.stderr.splitlines() or [f"exit status {probe.returncode}"])[-1]
    pytest.skip(f"{compiler} {' '.join(flags)} makes no program that runs here: {said}")


def checked(command: list[str]) -> str:
    """What the program prints last, having found nothing wrong."""
    done = run(command)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def for_arm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(ARM_COMPILER, [*AS_INSTALLED, "-static"], tmp_path_factory.mktemp("arm"), emulator("max"))


def test_no_variant_fails_or_leaves_its_buffers(tmp_path: Path) -> None:
    under = unrandomised()
    assert checked([*under, str(compiled("gcc", [*SANITIZED, *BY_CALLS], tmp_path, under))]).startswith("0 of ")


@pytest.mark.parametrize(("cpu", "best"), [("max", 3), ("cortex-a72", 1)])  # kernels.h's USES_BF16 and USES_NEON
def test_no_variant_fails_on_arm(for_arm: Path, cpu: str, best: int) -> None:
    assert checked([*emulator(cpu), str(for_arm)]).endswith(f"variants 0 to {best}")


def test_no_variant_leaves_its_buffers_on_arm(tmp_path: Path) -> None:
    flags = [*SANITIZED, "-static-libasan", "-static-libubsan"]
    program = compiled(ARM_COMPILER, flags, tmp_path, emulator("max"))
    assert checked([*emulator("max"), str(program)]).startswith("0 of ")


@pytest.mark.parametrize("target", CLANG_TARGETS)
def test_clang_reads_the_kernels_for_arm(target: str, tmp_path: Path) -> None:
    """With the headers of Linux, and of macOS what they lack."""
    if shutil.which("clang") is None or not Path(ARM_LIBRARIES, "include").exists():
        pytest.skip("clang, or Debian's libc6-dev-arm64-cross, is not installed")
    (tmp_path / "sys").mkdir()
    declared = "#include <stddef.h>\nint sysctlbyname(const char *, void *, size_t *, void *, size_t);\n"
    (tmp_path / "sys" / "sysctl.h").write_text(declared)
    headers = ["-isystem", str(tmp_path), "-isystem", f"{ARM_LIBRARIES}/include"]
    done = run(["clang", f"--target={target}", *CLANG_TARGETS[target], *headers, "-Wall", "-fsyntax-only", *SOURCES])
    assert done.returncode == 0 and not done.stderr, done.stderr
