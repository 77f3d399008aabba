"""Files and folders that are there whole or not at all, and the lock that lets one process at a time write."""

from pathlib import Path

import pytest

from fastjepa.files import atomic_path, locked_folder, write_atomic


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_failed_write_leaves_the_earlier_file(tmp_path: Path):
    write_atomic(tmp_path / "a" / "x.txt", "é")
    with pytest.raises(OSError, match="full"), atomic_path(tmp_path / "a" / "x.txt") as hidden:
        hidden.write_text("half")
        raise OSError("full")
    assert (tmp_path / "a" / "x.txt").read_bytes() == "é".encode() and names(tmp_path / "a") == ["x.txt"]


def test_a_folder_comes_whole_and_replaces_none(tmp_path: Path):
    def make(content: str) -> None:
        with atomic_path(tmp_path / "x") as hidden:
            hidden.mkdir()
            (hidden / f"{content}.txt").write_text(content)

    make("one")
    with pytest.raises(OSError, match="not empty"):
        make("other")
    assert names(tmp_path) == ["x"] and names(tmp_path / "x") == ["one.txt"]


def test_one_writer_at_a_time_who_clears_what_killed_ones_left(tmp_path: Path):
    for name in (".4711.000003.tar", ".hidden.txt", "000002.tar"):
        (tmp_path / name).write_text("")
    with locked_folder(tmp_path):
        assert names(tmp_path) == [".hidden.txt", "000002.tar"]
        with pytest.raises(BlockingIOError), locked_folder(tmp_path, wait=False):
            pass
    with locked_folder(tmp_path, wait=False):
        pass
