"""Result files: whole lines or none, sets of lines, joining and sorting."""

import errno
import os
import random
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama.batch import results
from llama.batch.identity import check_same, read_identity
from llama.batch.input import measure
from llama.batch.results import LineSet, ResultFile, join_parts, part, sort_by_line
from llama.errors import ParameterError


def record(number: int, more: str = "") -> bytes:
    return f'{{"line": {number}, "id": null, "text": "{more}"}}\n'.encode()


@given(st.lists(st.integers(1, 400)))
def test_a_set_of_lines_is_a_set(numbers: list[int]) -> None:
    lines = LineSet()
    for number in numbers:
        lines.add(number)
    assert len(lines) == len(set(numbers))
    assert [number for number in range(1, 410) if number in lines] == sorted(set(numbers))


def test_what_was_written_is_found_and_a_torn_end_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "out"
    with ResultFile(path) as file:
        for number in (3, 1):
            file.append(record(number))
        file.sync()
    with open(path, "ab") as torn:
        torn.write(b'{"line": 2, "te')
    done = LineSet()
    with ResultFile(path) as file:
        assert file.scan(done) == 0
        file.cut_torn_end()
        assert path.read_bytes() == record(3) + record(1)
        file.append(b'{"line": 2, "id": null, "error": "bad"}\n')
    assert path.read_bytes() == record(3) + record(1) + b'{"line": 2, "id": null, "error": "bad"}\n'
    assert [number for number in range(5) if number in done] == [1, 3]
    with ResultFile(path) as file:
        assert file.scan(done) == 1


@pytest.mark.parametrize("written", [0, 7])
def test_a_line_that_does_not_fit_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: int
) -> None:
    """A full disk may take the beginning of a line before it refuses the rest."""
    pwrite, calls = os.pwrite, []

    def full(descriptor: int, data: bytes, offset: int) -> int:
        calls.append(offset)
        if len(calls) > 1 or not written:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(descriptor, bytes(data[:written]), offset)

    with ResultFile(tmp_path / "out") as file:
        file.append(record(1))
        monkeypatch.setattr(os, "pwrite", full)
        with pytest.raises(ParameterError, match=r"out cannot be written: No space left on device; what is finished"):
            file.append(record(2))
        assert (tmp_path / "out").read_bytes() == record(1)
        monkeypatch.undo()
        file.append(record(3))
    assert (tmp_path / "out").read_bytes() == record(1) + record(3)


DAMAGE = {
    "zeros": lambda line: bytes(len(line) - 1) + b"\n", "cut short": lambda line: line[: len(line) // 2] + b"\n",
    "not UTF-8": lambda line: line.replace(b"x", b"\xff", 1), "blank": lambda line: b"\n",
    "another's": lambda line: b'{"prompt": "Hi"}\n', "no object": lambda line: b"[1]\n",
    "two in one": lambda line: line[:-1] + line,
    "no line": lambda line: b'{"line": true, "text": "x"}\n',
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=list(DAMAGE))
@pytest.mark.parametrize("place", [0, 3, 6])
@pytest.mark.parametrize("in_part", [False, True])
def test_a_damaged_line_is_refused_by_its_number_and_nothing_is_changed(
    tmp_path: Path, damage: Callable[[bytes], bytes], place: int, in_part: bool
) -> None:
    """Wherever it stands: what follows it would be lost."""
    lines = [record(number, "xyz") for number in range(1, 8)]
    lines[place] = damage(lines[place])
    output = tmp_path / "out"
    path = part(output, 1) if in_part else output
    path.write_bytes(b"".join(lines))
    with ResultFile(output) as file:
        scan = (lambda: results.check_parts(output)) if in_part else (lambda: file.scan(LineSet()))
        with pytest.raises(ParameterError, match=f"line {place + 1} is damaged, not a result"):
            scan()
    assert path.read_bytes() == b"".join(lines)


@given(st.data())
def test_what_is_cut_anywhere_keeps_all_whole_lines(data: st.DataObject) -> None:
    """A kill can leave any beginning of what was written."""
    lines = [record(number, "é" * number) for number in range(1, 6)]
    whole = b"".join(lines)
    size = data.draw(st.integers(0, len(whole)))
    with TemporaryDirectory() as folder:
        path, done = Path(folder) / "out", LineSet()
        path.write_bytes(whole[:size])
        with ResultFile(path) as file:
            file.scan(done)
            file.cut_torn_end()
        kept = path.read_bytes()
    assert kept == b"".join(lines[: len(done)]) and size - len(kept) < max(map(len, lines))


def test_parts_are_joined_once(tmp_path: Path) -> None:
    """A line that a killed join had moved already is not moved again, and a torn end of a part is left out."""
    output, done = tmp_path / "out", LineSet()
    for replica, content in ((1, record(4) + record(5) + b'{"li'), (10, record(6)), (2, record(2))):
        part(output, replica).write_bytes(content)
    (tmp_path / "out.partial").write_bytes(record(9))  # somebody else's
    with ResultFile(output) as file:
        file.append(record(4))
        file.scan(done)
        assert results.has_parts(output)
        assert join_parts(file, done) == 0
    assert sorted(output.read_bytes().splitlines(keepends=True)) == [record(2), record(4), record(5), record(6)]
    assert not results.has_parts(output) and (tmp_path / "out.partial").exists()


def test_lines_are_sorted_in_one_move(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, numbers = tmp_path / "out", [n for n in range(1, 500) if n % 7]
    random.Random(1).shuffle(numbers)
    path.write_bytes(b"".join(record(n, "x" * (n % 13)) for n in numbers))
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *paths: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
        with pytest.raises(ParameterError, match="full"):
            sort_by_line(path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["out"]
    sort_by_line(path)
    assert path.read_bytes() == b"".join(record(n, "x" * (n % 13)) for n in sorted(numbers))
    stamp = path.stat().st_mtime_ns
    sort_by_line(path)
    assert path.stat().st_mtime_ns == stamp  # what is sorted is left alone


def test_what_differs_is_named() -> None:
    before = {"parameters": {"top_k": 0, "n": 1}, "model": "abc"}
    check_same(Path("out"), before, dict(before))
    with pytest.raises(ParameterError, match=r"out was begun with a different parameters: top_k was 0 and is 3; start"):
        check_same(Path("out"), before, {**before, "parameters": {"top_k": 3, "n": 1}})
    with pytest.raises(ParameterError, match='different model: it was "abc" and is "def"'):
        check_same(Path("out"), before, {**before, "model": "def"})


def test_an_unreadable_note_is_reported(tmp_path: Path) -> None:
    (tmp_path / "out.run").write_text("{torn")
    with pytest.raises(ParameterError, match=r"out\.run cannot be read"):
        read_identity(tmp_path / "out")


def test_a_file_is_measured_as_a_stream(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"one\n\n  \ntwo")
    digest, count = measure(str(tmp_path / "a"))
    assert count == 2 and len(digest) == 64
    (tmp_path / "a").write_bytes(b"one\n\n  \ntwo\n")
    assert measure(str(tmp_path / "a"))[0] != digest
