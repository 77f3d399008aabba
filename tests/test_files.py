"""Files and folders that are there whole or not at all, and the lock that lets one process at a time write."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fastjepa.cli.main import main
from fastjepa.errors import UserError
from fastjepa.files import atomic_path, locked_folder, require_writable, write_atomic


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


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600), (0o002, 0o664)])
def test_files_have_the_mode_of_the_umask_whatever_wrote_them(tmp_path: Path, umask: int, mode: int):
    before = os.umask(umask)
    try:
        with atomic_path(tmp_path / "x.safetensors") as hidden:
            save_file({"a": torch.zeros(2)}, hidden)
        with atomic_path(tmp_path / "folder") as hidden:
            (hidden / "deep").mkdir(parents=True)
            save_file({"a": torch.zeros(2)}, hidden / "deep" / "x.safetensors")
        write_atomic(tmp_path / "x.txt", "text")
        assert os.umask(umask) == umask
    finally:
        os.umask(before)
    made = [tmp_path / "x.safetensors", tmp_path / "folder/deep/x.safetensors", tmp_path / "x.txt"]
    assert [oct(file.stat().st_mode & 0o777) for file in made] == [oct(mode)] * 3


def test_what_cannot_be_written_is_known_before_the_work(tmp_path: Path):
    (tmp_path / "file").write_text("")
    for path, folder in (("file/x", False), ("file/deep/x", True), ("file", True), ("", False)):
        with pytest.raises(UserError, match=r": cannot be written \((Not|Is) a directory\); give another place"):
            require_writable(tmp_path / path, folder)
    with pytest.raises(UserError, match="^/proc/none/x: cannot be written"):
        require_writable(Path("/proc/none/x"))
    for path, folder in (("file", False), ("new/x", False), ("new/deep/x", True), ("", True)):
        require_writable(tmp_path / path, folder)
    assert names(tmp_path) == ["file"]


COMMANDS = [["data", "check", "nowhere", "--output"], ["data", "shard", "nowhere"], ["convert", "nowhere", "--to", "timm"],
            ["masks", "--config", "demo", "--picture"], ["sweep", "--study", "small", "--output"]]  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_commands_refuse_such_a_place_first(tmp_path: Path, command: list[str], capsys):
    (tmp_path / "file").write_text("")
    assert main([*command, str(tmp_path / "file" / "x")]) == 2
    said = f"fastjepa {command[0]}: {tmp_path}/file/x: cannot be written (Not a directory); give another place\n"
    assert capsys.readouterr().err == said


def test_one_writer_at_a_time_who_clears_what_killed_ones_left(tmp_path: Path):
    for name in (".4711.000003.tar", ".hidden.txt", "000002.tar"):
        (tmp_path / name).write_text("")
    with locked_folder(tmp_path):
        assert names(tmp_path) == [".hidden.txt", "000002.tar"]
        with pytest.raises(BlockingIOError), locked_folder(tmp_path, wait=False):
            pass
    with locked_folder(tmp_path, wait=False):
        pass


def test_the_lock_of_a_folder_that_is_missing_makes_nothing(tmp_path):
    with pytest.raises(FileNotFoundError), locked_folder(tmp_path / "missing"):
        pass
    assert not any(tmp_path.iterdir())
