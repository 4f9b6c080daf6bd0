"""checklist.chk: every file that it names is compared, and every fault is named."""

import hashlib
from pathlib import Path

import pytest

from llama.checkpoint.checklist import read_checklist, verify
from llama.errors import CheckpointError


def write(folder: Path, **files: bytes) -> str:
    """Files and their checklist; returns its text."""
    text = ""
    for name, data in files.items():
        (folder / name).write_bytes(data)
        text += f"{hashlib.md5(data).hexdigest()}  {name}\n"
    (folder / "checklist.chk").write_text(text)
    return text


def test_whole_files_pass(tmp_path: Path) -> None:
    text = write(tmp_path, a=b"1" * 10**6, b=b"")
    assert verify(tmp_path) == 2
    (tmp_path / "checklist.chk").write_text(
        "\n" + text.replace("  ", " *").upper().replace("A\n", "a\n").replace("B\n", "b\n")
    )
    assert verify(tmp_path) == 2


def test_every_fault_is_named(tmp_path: Path) -> None:
    write(tmp_path, a=b"one", b=b"two", c=b"three")
    (tmp_path / "a").write_bytes(b"onE")
    (tmp_path / "b").unlink()
    with pytest.raises(CheckpointError, match=r"b is missing, a differs; download again"):
        verify(tmp_path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "is missing, so nothing can be verified"),
        ("", "lists no file"),
        ("abc  a\n", "line 1 is not"),
        ("\n" + "0" * 32 + "  ../a\n", "line 2 is not"),
        ("0" * 32 + "  a b\n", "line 1 is not"),
        ("x" * 32 + "  a\n", "line 1 is not"),
    ],
)
def test_wrong_checklists_are_named(tmp_path: Path, text: str | None, said: str) -> None:
    """A name that leaves the folder is refused too."""
    if text is not None:
        (tmp_path / "checklist.chk").write_text(text)
    with pytest.raises(CheckpointError, match=said):
        read_checklist(tmp_path)


def test_a_damaged_name_is_a_missing_file(tmp_path: Path) -> None:
    """Longer than any file's may be, or with a byte that none may have."""
    (tmp_path / "checklist.chk").write_bytes(f"{'0' * 32}  {'a' * 999}\n{'0' * 32}  a\0b\n{'0' * 32}  \udcffc\n".encode(
        errors="surrogateescape"
    ))  # fmt: skip
    with pytest.raises(CheckpointError, match=r"a+ is missing, a.+b is missing, \ufffdc is missing"):
        verify(tmp_path)


def test_a_byte_order_mark_is_read_over(tmp_path: Path) -> None:
    text = write(tmp_path, a=b"one")
    (tmp_path / "checklist.chk").write_text(text, encoding="utf-8-sig")
    assert verify(tmp_path) == 1
