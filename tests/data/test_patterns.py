"""Shards and tables named by a path, by braces or by a glob, in folders of any name; what is not there is said."""

import os
import sys
from pathlib import Path

import pytest

from fastjepa.data.sources import open_source
from fastjepa.errors import UserError
from tests.support.images import encoded, pack_shard

FOLDERS = ("set", "set [1]", "set [ab]", "a*b", "what?", "{x}", "a{b,c}", "é 雪")


def write(folder: Path, count: int = 12) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        pack_shard(folder / f"s-{i:06d}.tar", {f"{i}.png": encoded(i)})


def names(where: Path | str) -> list[int]:
    source = open_source(where)
    return [int(Path(source.name(i)).stem) for i in range(len(source))]


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_may_have_any_name(tmp_path: Path, folder: str):
    write(tmp_path / folder)
    write(tmp_path / "set a", 1)  # what [ab] would find
    place = f"{tmp_path}/{folder}"
    assert names(place) == list(range(12)) and names(f"{place}/s-000003.tar") == [3]
    assert names(f"{place}/s-00000[12].tar") == [1, 2] and names(f"{place}/*.tar") == list(range(12))
    assert names(f"{place}/s-{{000002..000004}}.tar") == [2, 3, 4]


@pytest.mark.parametrize("relative", [False, True])
def test_braces_are_those_of_webdataset(tmp_path: Path, relative: bool, monkeypatch):
    write(tmp_path / "a")
    write(tmp_path / "b")
    monkeypatch.chdir(tmp_path)
    root = "" if relative else f"{tmp_path}/"
    assert names(f"{root}a/s-{{000000..000009}}.tar") == list(range(10))
    assert names(f"{root}a/s-0000{{01,10,00}}.tar") == [1, 10, 0]
    assert names(f"{root}{{a,b}}/s-{{000001..000002}}.tar") == [1, 2, 1, 2]
    assert names(f"{root}{{a,b}}/s-00001*.tar") == [10, 11, 10, 11]
    assert names(f"{root}**/s-000003.tar") == [3, 3]


def test_a_file_may_be_named_with_braces(tmp_path: Path):
    write(tmp_path, 3)
    (tmp_path / "s-000000.tar").rename(tmp_path / "s-{000001..000002}.tar")
    assert names(tmp_path / "s-{000001..000002}.tar") == [0]


MISSING = {
    "s-{000000..000002}.tar": r"s-000002.tar: no such file, of those that \S+ names",
    "{a,b}/s-*.tar": r"a/s-\*.tar: no such file, of those",
    "s-{000000..000001.tar": r"its braces do not match; write shard-\{000000..000009\}.tar",
    "z-*.tar": "no such file; give a .tar or .parquet file, a glob, or shard-",
    "s-[7-9]*.tar": "no such file; give a .tar",
    "none.tar": "none.tar: no such file; give a .tar",
    "none.parquet": "none.parquet: no such file; give a .tar",
    "nowhere/none.tar": "nowhere/none.tar: no such file",
    "none.tar.gz": "none.tar.gz: no such file",
    "here.tar.gz": r"here.tar.gz: compressed; unpack each, as nothing in it can be read at random: a .tar.gz to a plain .tar",
    "here.zip": "here.zip: compressed; unpack each",
    "*.gz": "neither tar shards nor Parquet files",
    "photo.jpg": "photo.jpg: neither tar shards nor Parquet files",
    "gone.tar": "gone.tar: cannot be read .No such file or directory.",
    "some name": "neither a directory nor a data set's name",
}


@pytest.mark.parametrize("where", MISSING)
def test_what_is_not_there_is_said(tmp_path: Path, where: str):
    write(tmp_path, 2)
    for name in ("here.tar.gz", "here.zip", "photo.jpg"):
        (tmp_path / name).write_bytes(b"\x1f\x8b")
    (tmp_path / "gone.tar").symlink_to("nowhere.tar")
    with pytest.raises(UserError, match=MISSING[where]):
        open_source(f"{tmp_path}/{where}")


def test_a_pipe_named_as_a_tar_is_not_waited_for(tmp_path: Path):
    write(tmp_path, 2)
    os.mkfifo(tmp_path / "pipe.tar")
    assert names(tmp_path) == names(f"{tmp_path}/*.tar") == [0, 1]
    with pytest.raises(UserError, match=r"pipe.tar: a pipe or a device, not a file"):
        open_source(tmp_path / "pipe.tar")


def test_braces_without_the_library_say_what_to_install(tmp_path: Path, monkeypatch):
    write(tmp_path, 2)
    monkeypatch.setitem(sys.modules, "braceexpand", None)
    with pytest.raises(UserError, match=r"braces need braceexpand; run: pip install 'fastjepa\[remote\]'"):
        open_source(f"{tmp_path}/s-{{000000..000001}}.tar")
    assert names(f"{tmp_path}/*.tar") == [0, 1]
