"""Damaged tars of others: every image that is left is read, what is lost is named and counted."""

import io
import re
import subprocess
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastjepa.cli.main import main
from fastjepa.data.sources import open_source
from fastjepa.data.tar_members import TarMembers
from fastjepa.data.tar_shards import scan_tar
from fastjepa.errors import UserError
from tests.support.images import encoded

BLOCK = 512
NAMES = [f"{i}.jpg" for i in range(6)]


def add(opened: tarfile.TarFile, name: str, content: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = "") -> None:
    member = tarfile.TarInfo(name)
    member.size, member.type, member.linkname = len(content), kind, link
    opened.addfile(member, io.BytesIO(content))


def packed(names: list[str] = NAMES, form: int = tarfile.USTAR_FORMAT) -> bytes:
    """A tar of JPEGs; in a directory, under a long name, with an extended header where `form` has such."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=form) as opened:
        for number, name in enumerate(names):
            add(opened, name, encoded(number, "JPEG"))
    return stream.getvalue()


def places(raw: bytes) -> list[tuple[int, int]]:
    """The first byte of each member's header, and of the next one."""
    with tarfile.open(fileobj=io.BytesIO(raw)) as opened:
        return [(m.offset, m.offset_data + -(-m.size // BLOCK) * BLOCK) for m in opened]


WHOLE = packed()
PLACES = places(WHOLE)
THIRD, END = PLACES[2][0], PLACES[-1][1]


def changed(at: int, content: bytes, raw: bytes = WHOLE) -> bytes:
    return raw[:at] + content + raw[at + len(content) :]


def flip(at: int, bit: int) -> bytes:
    return changed(at, bytes([WHOLE[at] ^ bit]))


DAMAGE = {  # the tar, the images that are left, how many faults there are and what the first says
    "a flipped bit in a name": (flip(THIRD, 4), "0 1 3 4 5", 1, f"no header can be read at byte {THIRD} after 1.jpg"),
    "a flipped bit in a size": (flip(THIRD + 130, 1), "0 1 3 4 5", 1, f"at byte {THIRD} "),
    "a flipped bit in a check sum": (flip(THIRD + 150, 1), "0 1 3 4 5", 1, f"byte {THIRD} "),
    "letters for a size": (changed(THIRD + 124, b"letters"), "0 1 3 4 5", 1, f"up to byte {PLACES[3][0]} is lost"),
    "letters for a check sum": (changed(THIRD + 148, b"letters"), "0 1 3 4 5", 1, f"at byte {THIRD} after 1.jpg"),
    "letters for a header": (changed(THIRD, b"x" * BLOCK), "0 1 3 4 5", 1, f"at byte {THIRD} after 1.jpg"),
    "a zeroed header": (changed(THIRD, bytes(BLOCK)), "0 1 3 4 5", 1, f"at byte {THIRD} after 1.jpg"),
    "a zeroed sector": (changed(THIRD - 100, bytes(BLOCK)), "0 1 3 4 5", 1, f"at byte {THIRD} after 1.jpg"),
    "zeros over three members": (changed(THIRD, bytes(PLACES[4][1] - THIRD)), "0 1 5", 1, f"zeros at byte {THIRD} after 1.jpg"),
    "the first header": (changed(0, b"x" * 200), "1 2 3 4 5", 1, f"at byte 0: .* up to byte {PLACES[1][0]} is lost"),
    "a zeroed first header": (changed(0, bytes(BLOCK)), "1 2 3 4 5", 1, "no header can be read at byte 0"),
    "the last header": (changed(PLACES[5][0], b"\xff"), "0 1 2 3 4", 1, f"after 4.jpg: .* up to byte {END} is lost"),
    "two headers": (changed(PLACES[1][0], b"\xff", changed(PLACES[3][0], b"\xff")), "0 2 4 5", 2, "after 0.jpg"),
    "a header cut out": (WHOLE[:THIRD] + WHOLE[THIRD + BLOCK :], "0 1 3 4 5", 1, f"at byte {THIRD} after 1.jpg"),
    "half a header cut out": (WHOLE[:THIRD] + WHOLE[THIRD + 256 :], "0 1", 1, f"at byte {THIRD} after 1.jpg"),
    "the end cut in a header": (WHOLE[: THIRD + 100], "0 1", 1, f"at byte {THIRD} after 1.jpg"),
    "the end cut in a file": (WHOLE[: THIRD + BLOCK + 50], "0 1", 1, f"cut at byte {THIRD + BLOCK + 50}, inside of this file"),
    "the end cut between members": (WHOLE[:THIRD], "0 1", 1, f"cut at byte {THIRD} after 1.jpg: it does not end in end-of"),
    "the end cut after one empty block": (WHOLE[: END + BLOCK], "0 1 2 3 4 5", 1, f"cut at byte {END + BLOCK} after 5.jpg"),
    "an empty block between": (WHOLE[:THIRD] + bytes(BLOCK) + WHOLE[THIRD:], "0 1 2 3 4 5", 1, f"zeros at byte {THIRD}"),
    "letters at the end": (WHOLE + b"letters", "0 1 2 3 4 5", 1, f"no header can be read at byte {len(WHOLE)}"),
    "damaged where joined": (WHOLE + changed(3, b"\xff"), "0 1 2 3 4 5 1 2 3 4 5", 1, f"byte {len(WHOLE)} "),
    "joined after a cut": (WHOLE[:THIRD] + packed(["x.jpg"]), "0 1 x", 0, ""),
}  # fmt: skip
SOUND = {
    "as it was": (WHOLE, 6),
    "two joined": (WHOLE + WHOLE, 12),
    "three joined, of several writers": (WHOLE + WHOLE[: END + 2 * BLOCK] + packed(form=tarfile.PAX_FORMAT), 18),
    "an empty one before": (bytes(10240) + WHOLE, 6),
    "two empty blocks alone": (WHOLE[: END + 2 * BLOCK], 6),
    "no full last block": (WHOLE[: END + 2 * BLOCK] + bytes(100), 6),
    "long names, GNU": (packed([f"{'a' * 150}/{name}" for name in NAMES], tarfile.GNU_FORMAT), 6),
    "long names, pax": (packed([f"{'é' * 150}/{name}" for name in NAMES], tarfile.PAX_FORMAT), 6),
}


def stems(source) -> str:
    return " ".join(Path(source.name(i)).stem for i in range(len(source)))


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_read_past_and_told(tmp_path: Path, damage: str, caplog):
    raw, left, count, says = DAMAGE[damage]
    (tmp_path / "0.tar").write_bytes(raw)
    source = open_source(tmp_path)
    assert stems(source) == left and len(source.unreadable) == count
    known = {f"{i}.jpg": encoded(i, "JPEG") for i in range(6)} | {"x.jpg": encoded(0, "JPEG")}
    assert [source.read(i) for i in range(len(source))] == [known[f"{stem}.jpg"] for stem in left.split()]
    if count:
        path, reason = source.unreadable[0]
        assert path == f"{tmp_path}/0.tar" + ("/2.jpg" if "inside" in says else "")
        assert re.search(says, reason)
        assert f"{tmp_path}/0.tar: {count} of its parts damaged or passed over" in caplog.text


@pytest.mark.parametrize("sound", SOUND)
def test_what_is_whole_has_no_faults(tmp_path: Path, sound: str, caplog):
    raw, count = SOUND[sound]
    (tmp_path / "0.tar").write_bytes(raw)
    source = open_source(tmp_path)
    assert [source.read(i) for i in range(count)] == [encoded(i % 6, "JPEG") for i in range(count)]
    assert len(source) == count and source.unreadable == [] and not caplog.text


def test_a_global_header_and_folders_are_no_faults():
    """`git archive` begins with a global header."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "a commit"}) as opened:
        add(opened, "a", kind=tarfile.DIRTYPE)
        add(opened, "a/0.jpg", encoded(0, "JPEG"))
    members = TarMembers(stream)
    assert [member.name for member in members] == ["a/0.jpg"] and members.faults == []


@given(at=st.integers(0, END + 2 * BLOCK - 1), bit=st.integers(0, 7), cut=st.one_of(st.none(), st.integers(1, END + BLOCK)))
@settings(max_examples=60, deadline=None)
def test_no_image_is_lost_in_silence(at: int, bit: int, cut: int | None):
    """Wherever a bit flips and wherever the file is cut: fewer images come with a fault, and no error but a sentence."""
    raw = changed(at, bytes([WHOLE[at] ^ 1 << bit]))[:cut]
    try:
        index = scan_tar("0.tar", io.BytesIO(raw))
    except UserError as error:
        assert cut is not None and cut <= PLACES[0][1] or at < BLOCK, error
        return
    whole = scan_tar("0.tar", io.BytesIO(WHOLE))
    found = dict(zip(index.offsets.tolist(), zip(index.members.tolist(), index.sizes.tolist(), strict=True), strict=True))
    for offset, member, size in zip(whole.offsets.tolist(), whole.members.tolist(), whole.sizes.tolist(), strict=True):
        assert found.pop(offset, None) == (member, size) or len(index.faults)
    assert not found


def test_links_and_the_like_are_named(tmp_path: Path, caplog):
    with tarfile.open(tmp_path / "0.tar", "w") as opened:
        add(opened, "0.jpg", encoded(0, "JPEG"))
        add(opened, "1.jpg", kind=tarfile.LNKTYPE, link="0.jpg")
        add(opened, "2.jpg", kind=tarfile.SYMTYPE, link="../there/2.jpg")
        add(opened, "3.jpg", kind=tarfile.FIFOTYPE)
        add(opened, "4.jpg", kind=tarfile.CHRTYPE)
    source = open_source(tmp_path)
    assert stems(source) == "0"
    reasons = {path.removeprefix(f"{tmp_path}/0.tar/"): reason for path, reason in source.unreadable}
    assert reasons["1.jpg"].startswith("a hard link to 0.jpg, which is not followed; make the tar with --dereference")
    assert reasons["2.jpg"].startswith("a symbolic link to ../there/2.jpg, which is not followed")
    assert reasons["3.jpg"] == reasons["4.jpg"] == "neither a file nor a folder" and len(reasons) == 4
    assert f"0.tar: 4 of its parts damaged or passed over, for example {tmp_path}/0.tar/1.jpg (a hard link" in caplog.text


@pytest.mark.parametrize("form", ["gnu", "posix"])
def test_links_and_sparse_files_of_gnu_tar_are_named(tmp_path: Path, form: str):
    for i in range(3):
        (tmp_path / f"{i}.jpg").write_bytes(encoded(i, "JPEG"))
    with open(tmp_path / "hole.jpg", "wb") as file:
        file.truncate(1 << 20)
        file.seek(1 << 19)
        file.write(b"x")
    (tmp_path / "hard.jpg").hardlink_to(tmp_path / "0.jpg")
    names = ["0.jpg", "hole.jpg", "1.jpg", "hard.jpg", "2.jpg"]
    command = ["tar", f"--format={form}", "--sparse", "-cf", str(tmp_path / "a.tar"), "-C", str(tmp_path), *names]
    subprocess.run(command, check=True)
    source = open_source(tmp_path / "a.tar")
    assert stems(source) == "0 1 2" and [source.read(i) for i in range(3)] == [encoded(i, "JPEG") for i in range(3)]
    assert [(path.rpartition("/")[2], reason.split(",")[0]) for path, reason in source.unreadable] == [
        ("hole.jpg", "a sparse file"), ("hard.jpg", "a hard link to 0.jpg")]  # fmt: skip


@pytest.mark.parametrize("damage", ["the end cut between members", "two headers"])
def test_data_check_counts_it_and_data_shard_keeps_it_out(tmp_path: Path, damage: str, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    raw, left, count, _ = DAMAGE[damage]
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "0.tar").write_bytes(raw)
    assert main(["data", "check", "set"]) == 1
    shown = capsys.readouterr().out
    assert shown.count("set/0.tar: damaged shard (") == count and f"bad: {count}, {count} damaged shard" in shown
    assert (tmp_path / "bad.txt").read_text() == "set/0.tar\n"
    command = ["data", "shard", "set", "out", "--keep-order"]
    assert main(command) == 2 and not (tmp_path / "out").exists()
    said = f"cannot be read, as {count} so far, more than the 0 that may be left out"
    assert said in capsys.readouterr().err
    assert main([*command, "--max-bad", str(count)]) == 0
    shown = capsys.readouterr()
    assert shown.err.count("left out: set/0.tar: ") == count and f"{len(left.split())} images" in shown.out


def test_a_link_is_bad_for_data_check(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with tarfile.open(tmp_path / "0.tar", "w") as opened:
        add(opened, "0.jpg", encoded(0, "JPEG"))
        add(opened, "1.jpg", kind=tarfile.LNKTYPE, link="0.jpg")
    assert main(["data", "check", "0.tar"]) == 1
    assert "0.tar/1.jpg: unreadable (a hard link to 0.jpg, which is not followed" in capsys.readouterr().out


@pytest.mark.parametrize(
    "raw, says",
    [
        (b"", "empty file); make it again"),
        (b"<html>no tar" * 500, "no header of a tar in it); make it again"),
        (b"\x1f\x8b" + bytes(3000), "compressed by gzip); unpack it to a plain .tar"),
        (b"PK\x03\x04" + bytes(3000), "compressed by zip); unpack it to a plain .tar"),
        (WHOLE[:300], "no header of a tar in it)"),
    ],
)
def test_what_is_no_tar_is_told_why(tmp_path: Path, raw: bytes, says: str):
    (tmp_path / "0.tar").write_bytes(raw)
    with pytest.raises(UserError, match=re.escape(f"{tmp_path}/0.tar: not a tar shard that can be read ({says}")):
        open_source(tmp_path)


def test_nothing_but_zeros_is_no_empty_tar(tmp_path: Path, caplog):
    (tmp_path / "0.tar").write_bytes(WHOLE)
    (tmp_path / "1.tar").write_bytes(bytes(1 << 20))
    source = open_source(tmp_path)
    assert len(source) == 6 and source.unreadable == [(f"{tmp_path}/1.tar", "nothing but zeros")]
