"""Shards as they are written, resumed, indexed and read; what does not fit is refused or scanned."""

import hashlib
import io
import json
import os
import shutil
import signal
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from fastjepa.cli.main import main
from fastjepa.cli.options import byte_count
from fastjepa.data.decode_pillow import decode_image
from fastjepa.data.prepare import write_shards as write_shards_module
from fastjepa.data.prepare.catalog import FASHION_CLASSES
from fastjepa.data.prepare.write_shards import ShardRequest, _only_writer, _write_tar, write_shards
from fastjepa.data.sources import open_source
from fastjepa.data.tar_shards import index_path
from fastjepa.errors import UserError
from tests.support.batches import load, same_batch, settings
from tests.support.images import encoded, pack_shard, save_image, write_idx_pairs

SIZE = 20_000  # four of the fixture's images of about 3.6 kB, their labels and their headers


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """26 images in two class folders."""
    for i in range(26):
        save_image(tmp_path / "images" / ("cat", "dog")[i // 13] / f"{i:02d}.png", seed=i)
    return tmp_path / "images"


def write(source: Path, to: Path, **options) -> dict:
    options = {"shard_bytes": SIZE, "workers": 2} | options
    workers = options.pop("workers")
    return write_shards(open_source(source), to, {"path": str(source), "split": "train"}, ShardRequest(**options), workers)


def contents(where: Path) -> list[tuple[bytes, int | None]]:
    source = open_source(where)
    return [(source.read(i), source.label(i)) for i in range(len(source))]


def tars(where: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(where.glob("*.tar"))}


def test_shards_hold_the_folders_bytes_labels_and_classes(folder: Path, tmp_path: Path):
    manifest = write(folder, tmp_path / "out", keep_order=True)
    assert contents(tmp_path / "out") == contents(folder)
    assert open_source(tmp_path / "out").classes == ("cat", "dog")
    assert len(manifest["shards"]) > 3 and manifest["images"] == 26
    assert manifest == json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["source"]["path"] == str(folder) and manifest["options"]["resize"] is None
    for entry in manifest["shards"]:
        raw = (tmp_path / "out" / entry["file"]).read_bytes()
        assert (entry["bytes"], entry["sha256"]) == (len(raw), hashlib.sha256(raw).hexdigest())
        assert abs(len(raw) - SIZE) < 12_000  # tars come in steps of 10,240 bytes
    suffixes = sorted(path.suffix for path in (tmp_path / "out").iterdir())
    assert suffixes == [".json"] + [".npz"] * len(manifest["shards"]) + [".tar"] * len(manifest["shards"])


def test_a_run_from_shards_in_order_is_the_run_from_the_folder(folder: Path, tmp_path: Path):
    write(folder, tmp_path / "out", keep_order=True)
    pairs = zip(load(settings(folder), range(8)), load(settings(tmp_path / "out", num_workers=2), range(8)), strict=True)
    assert all(same_batch(a[0], b[0]) for a, b in pairs)


def test_the_default_is_one_shuffle_whatever_the_workers(folder: Path, tmp_path: Path):
    for workers in (1, 3):
        write(folder, tmp_path / str(workers), workers=workers)
    assert tars(tmp_path / "1") == tars(tmp_path / "3")
    shuffled, plain = contents(tmp_path / "1"), contents(folder)
    assert shuffled != plain and sorted(shuffled) == sorted(plain)
    first = [label for _, label in shuffled[:13]]
    assert 3 < sum(first) < 10  # both classes in the first half


def test_webdataset_reads_them(folder: Path, tmp_path: Path):
    write(folder, tmp_path / "out", keep_order=True)
    files = [str(path) for path in sorted((tmp_path / "out").glob("*.tar"))]
    samples = list(webdataset.WebDataset(files, shardshuffle=False))
    assert [(sample["png"], int(sample["cls"])) for sample in samples] == contents(folder)
    assert len({sample["__key__"] for sample in samples}) == 26


def test_the_index_needs_no_scan(folder: Path, tmp_path: Path, monkeypatch):
    write(folder, tmp_path / "out")
    before = contents(tmp_path / "out")
    with monkeypatch.context() as patched:
        patched.setattr(tarfile, "open", None)
        assert contents(tmp_path / "out") == before
    for index in (tmp_path / "out").glob("*.npz"):
        index.unlink()
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("spoil", ["other tar", "text", "truncated", "grown"])
def test_a_stale_index_is_scanned_again(folder: Path, tmp_path: Path, spoil: str, caplog):
    write(folder, tmp_path / "out", keep_order=True)
    (tmp_path / "out" / "manifest.json").unlink()
    index, tar = tmp_path / "out" / "000001.npz", tmp_path / "out" / "000001.tar"
    if spoil == "other tar":
        shutil.copy(tmp_path / "out" / "000000.npz", index)
    elif spoil == "grown":
        with tarfile.open(tar, "a") as opened:
            opened.add(folder / "cat" / "00.png", "99.png")
    else:
        index.write_bytes(b"text" if spoil == "text" else index.read_bytes()[:-400])
    found = contents(tmp_path / "out")
    assert "000001.npz: not the index of the tar beside it" in caplog.text
    extra = [(folder / "cat" / "00.png").read_bytes()] if spoil == "grown" else []
    assert sorted(raw for raw, _ in found) == sorted([raw for raw, _ in contents(folder)] + extra)


LABELS = {  # what .cls files hold, the labels, and the line on them
    "numbers": ([b"3", b" 0\n", b"07"], [3, 0, 7], ""),
    "words": ([b"cat", b"dog", b"cat"], [None] * 3, "of 3 images 0 have no .cls and 3 one that holds no number"),
    "nothing": ([b"", b"\n", b" "], [None] * 3, "of 3 images 0 have no .cls and 3 one that holds no number"),
    "one word": ([b"3", b"0", b"cat"], [None] * 3, "of 3 images 0 have no .cls and 1 one that holds no number"),
    "one without": ([b"3", None, b"1"], [None] * 3, "of 3 images 1 have no .cls and 0 one that holds no number"),
    "none": ([None] * 3, [None] * 3, ""),
    "minus one": ([b"-1"] * 3, [None] * 3, ""),
    "no class has such a number": ([b"3", b"1" * 30, b"1.5"], [None] * 3, "0 have no .cls and 2 one that holds no number"),
    "no text": ([b"3", b"\xff\x00", b"x" * 5000], [None] * 3, "0 have no .cls and 2 one that holds no number"),
}


@pytest.mark.parametrize("case", LABELS)
def test_training_needs_no_labels(tmp_path: Path, case: str, caplog, capsys):
    held, labels, says = LABELS[case]
    files = {f"{i}.png": encoded(i) for i in range(3)} | {f"{i}.cls": raw for i, raw in enumerate(held) if raw is not None}
    pack_shard(tmp_path / "0.tar", files)
    source = open_source(tmp_path)
    assert [source.label(i) for i in range(3)] == labels and source.unreadable == []
    assert [source.read(i) for i in range(3)] == [encoded(i) for i in range(3)]
    assert [line for line in caplog.messages if "labels are not used" in line] == [line for line in caplog.messages if line]
    assert says in caplog.text and bool(says) == bool(caplog.text)


def test_shards_that_are_not_the_manifests_are_refused(folder: Path, tmp_path: Path):
    out = tmp_path / "out"
    write(folder, out)
    whole = (out / "000001.tar").read_bytes()
    (out / "000001.tar").write_bytes(whole[:-512])
    with pytest.raises(UserError, match=r"000001.tar: \d+ bytes, but in manifest.json \d+ bytes; run: fastjepa data check"):
        open_source(out)
    (out / "000001.tar").unlink()
    with pytest.raises(UserError, match=r"000001.tar: no such file, but in manifest.json"):
        open_source(out)
    (out / "000001.tar").write_bytes(whole)
    (out / "more.tar").write_bytes(whole)
    with pytest.raises(UserError, match="more.tar: .* in manifest.json no such file"):
        open_source(out)
    (out / "manifest.json").write_text('{"format": "fastjepa shards 1"}')
    with pytest.raises(UserError, match="manifest.json: damaged"):
        open_source(out)


def test_a_glob_of_shards_keeps_the_class_names(folder: Path, tmp_path: Path):
    write(folder, tmp_path / "out")
    assert open_source(str(tmp_path / "out" / "00000[01].tar")).classes == ("cat", "dog")


@pytest.mark.parametrize("kill", [False, True])
def test_a_stopped_run_continues(folder: Path, tmp_path: Path, monkeypatch, kill: bool):
    """Stopped while the fourth shard is half written, by a full disk or by the killing of a worker."""
    write(folder, tmp_path / "whole")
    real = _write_tar

    def failing(stream, job, number):
        if number == 3:
            stream.write(b"half")
            if kill:
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(28, "No space left on device")
        return real(stream, job, number)

    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(write_shards_module, "_write_tar", failing)
        with pytest.raises(OSError, match="killed" if kill else r"000003.tar: cannot be written \(No space"):
            write(folder, out, workers=1)
    assert not (out / "manifest.json").exists() and "000003.tar" not in tars(out) and "000002.tar" in tars(out)
    with pytest.raises(UserError, match="not complete; run again"):
        open_source(out)
    kept, stamp = out / "000001.tar", (out / "000001.tar").stat().st_mtime_ns
    (out / "000000.npz").unlink()  # a tar without its index counts as incomplete
    manifest = write(folder, out)
    assert kept.stat().st_mtime_ns == stamp
    assert tars(out) == tars(tmp_path / "whole")
    assert manifest == json.loads((tmp_path / "whole" / "manifest.json").read_text())
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in (tmp_path / "whole").iterdir())


def test_a_finished_directory_is_left_alone_and_another_refused(folder: Path, tmp_path: Path, monkeypatch):
    manifest = write(folder, tmp_path / "out")
    with monkeypatch.context() as patched:
        patched.setattr(write_shards_module, "_write_all", None)
        assert write(folder, tmp_path / "out") == manifest
    with pytest.raises(UserError, match="out: its shards differ in options; give another directory"):
        write(folder, tmp_path / "out", resize=8)
    save_image(folder / "cat" / "more.png", seed=3)
    with pytest.raises(UserError, match="out: its shards differ in source"):
        write(folder, tmp_path / "out")
    (tmp_path / "theirs").mkdir()
    pack_shard(tmp_path / "theirs" / "000000.tar", {"0.png": b""})
    with pytest.raises(UserError, match="theirs: its shards differ in"):
        write(folder, tmp_path / "theirs")


def test_two_writers_do_not_meet(folder: Path, tmp_path: Path):
    (tmp_path / "out").mkdir()
    with _only_writer(tmp_path / "out"), pytest.raises(OSError, match="another process is writing shards there"):
        write(folder, tmp_path / "out")


def test_resize_brings_the_short_side_down_and_keeps_small_files(tmp_path: Path):
    ramp = np.add.outer(np.arange(120), np.arange(90)).astype(np.uint8)
    Image.fromarray(np.stack([ramp] * 3, -1)).save(save_image(tmp_path / "in" / "0.jpg", 0), quality=95)
    Image.fromarray(ramp).save(tmp_path / "in" / "1.png")
    save_image(tmp_path / "in" / "2.png", seed=2, size=(40, 30))
    write(tmp_path / "in", tmp_path / "out", resize=30, keep_order=True)
    made = [Image.open(io.BytesIO(raw)) for raw, _ in contents(tmp_path / "out")]
    assert [(image.format, image.mode, image.size) for image in made] == [
        ("JPEG", "RGB", (30, 40)), ("PNG", "L", (30, 40)), ("PNG", "RGB", (40, 30))]  # fmt: skip
    assert made[0].quantization[0][0] <= 2  # quality 95
    expected = np.array(Image.fromarray(ramp).resize((30, 40), Image.Resampling.BICUBIC))
    assert np.array_equal(np.array(made[1]), expected)
    assert contents(tmp_path / "out")[2][0] == (tmp_path / "in" / "2.png").read_bytes()


def test_unreadable_images_stop_the_writing_unless_allowed(folder: Path, tmp_path: Path, capsys):
    (folder / "cat" / "00.png").unlink()
    (folder / "cat" / "00.png").symlink_to("nowhere.png")
    command = ["data", "shard", str(folder), str(tmp_path / "out"), "--shard-size", "20kB", "--workers", "2"]
    assert main(command) == 2
    assert "cat/00.png: cannot be read, as 1 so far, more than the 0 that may be left out" in capsys.readouterr().err
    assert main([*command, "--max-bad", "1"]) == 0
    shown = capsys.readouterr()
    assert f"left out: {folder}/cat/00.png" in shown.err and "25 images" in shown.out
    assert len(open_source(tmp_path / "out")) == 25
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["left_out"] == [f"{folder}/cat/00.png"]


def test_damaged_images_keep_their_bytes_and_cannot_be_resized(folder: Path, tmp_path: Path):
    (folder / "dog" / "13.png").write_text("text")
    write(folder, tmp_path / "out", keep_order=True)
    assert contents(tmp_path / "out") == contents(folder)
    with pytest.raises(OSError, match="dog/13.png: cannot be read"):
        write(folder, tmp_path / "small", resize=16)


def test_idx_pixels_become_png(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("FASTJEPA_DATA", str(tmp_path))
    images = write_idx_pairs(tmp_path / "fashion-mnist")
    assert main(["data", "shard", "fashion-mnist", str(tmp_path / "out"), "--keep-order"]) == 0
    source = open_source(tmp_path / "out")
    assert all(np.array_equal(decode_image(source.read(i), 1)[0], images[i]) for i in range(8))
    assert source.classes == FASHION_CLASSES and source.label(5) == 1


def test_odd_names_become_keys(tmp_path: Path):
    names = ["a.b.jpg", "a.png", "été 1.PNG", "x" * 200 + ".png"]
    for name in names:
        save_image(tmp_path / "in" / name, seed=1)
    write(tmp_path / "in", tmp_path / "out", keep_order=True, shard_bytes=10**9)
    with tarfile.open(tmp_path / "out" / "000000.tar") as opened:
        members = opened.getnames()
    assert members == ["00000000-a_b.jpg", "00000001-a.png", f"00000002-{'x' * 60}.png", "00000003-_t_1.png"]
    assert contents(tmp_path / "out") == contents(tmp_path / "in")


@pytest.mark.parametrize("text, count", [("256MB", 256_000_000), ("1.5 GiB", 1_610_612_736), ("20kb", 20_000), ("7", 7)])
def test_sizes_are_read(text: str, count: int):
    assert byte_count(text) == count


@pytest.mark.parametrize("text", ["", "MB", "0", "1.2.3MB", "-5MB", "5XB"])
def test_what_is_no_size_is_refused(text: str, capsys):
    with pytest.raises(SystemExit):
        main(["data", "shard", "a", "b", f"--shard-size={text}"])
    assert "is no size such as 256MB" in capsys.readouterr().err


def test_an_index_file_is_named_after_its_tar():
    assert index_path("x/000001.tar") == Path("x/000001.npz")
