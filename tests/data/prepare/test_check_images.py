"""`data check` calls bad what a run replaces, and what is too large; shards are compared with their manifest."""

import io
import json
import os
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastjepa.cli.main import main
from fastjepa.data import decode_pillow
from fastjepa.data.prepare import check_images as check_images_module
from fastjepa.data.prepare.check_images import check_images
from fastjepa.data.prepare.write_shards import ShardRequest, write_shards
from fastjepa.data.sources import open_source
from fastjepa.errors import UserError
from fastjepa.loader.loader import batch_recipe
from fastjepa.loader.micro_batches import MicroBatches
from tests.support.batches import settings
from tests.support.images import save_image


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def encode(image: Image.Image, kind: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def bomb(width: int, height: int) -> bytes:
    """A PNG of some 100 bytes that says it is huge."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


COLOUR = Image.fromarray(noise(40, 30, 3))
FRAMES = [Image.fromarray(noise(9, 9)), Image.fromarray(noise(9, 9) // 2)]
DEEP = Image.fromarray(np.arange(70 * 50, dtype=np.uint16).reshape(50, 70))
GOOD = {
    "a png.jpg": encode(COLOUR, "PNG"),
    "1x1.png": encode(Image.fromarray(noise(1, 1)), "PNG"),
    "wide.png": encode(Image.fromarray(noise(1, 20_000)), "PNG"),
    "cmyk.jpg": encode(COLOUR.convert("CMYK"), "JPEG"),
    "deep.png": encode(DEEP, "PNG"),
    "moving.gif": encode(FRAMES[0], "GIF", save_all=True, append_images=FRAMES[1:]),
    "été à  la mer 雪.jpg": encode(COLOUR, "JPEG"),
}
BAD = {
    "cut.jpg": (encode(COLOUR, "JPEG")[:-200], "truncated"),
    "cut.png": (encode(COLOUR, "PNG")[:-600], "truncated"),
    "notes.jpg": (b"a letter, no picture", "not an image"),
    "empty.jpg": (b"", "zero bytes"),
    "float.tif": (encode(Image.fromarray(np.full((4, 4), 0.5, np.float32)), "TIFF"), "cannot be decoded"),
    "bomb.png": (bomb(10_000, 10_000), "too large"),
    "greater bomb.png": (bomb(100_000, 100_000), "too large"),
}
LINKS = {"loop.jpg": ("loop.jpg", "unreadable"), "gone.jpg": ("nowhere.jpg", "vanished")}


@pytest.fixture
def planted(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    for name, content in GOOD.items() | {(name, content) for name, (content, _) in BAD.items()}:
        (tmp_path / "in" / name).write_bytes(content)
    for name, (target, _) in LINKS.items():
        (tmp_path / "in" / name).symlink_to(target)
    return tmp_path / "in"


REASONS = {name: reason for name, (_, reason) in (BAD | LINKS).items()}


@pytest.mark.parametrize("workers", [1, 2])
def test_planted_files_are_found_with_their_reasons(planted: Path, workers: int):
    shown = []
    report = check_images(str(planted), workers=workers, show=shown.append)
    assert {Path(bad.path).name: bad.reason for bad in report.bad} == REASONS
    assert shown == report.bad and report.images == len(GOOD) + len(REASONS)
    assert (report.smallest, report.largest) == ((1, 1), (20_000, 1))
    assert "10000x10000, 100.0 megapixels" in "\n".join(map(str, report.bad))


def test_bad_is_what_a_run_replaces(planted: Path):
    source = open_source(planted)
    dataset = MicroBatches(batch_recipe(settings(planted, max_bad=100)), source, 0, 1)
    with pytest.warns(Image.DecompressionBombWarning):
        views = [dataset.view(0, i) for i in range(len(source))]
    assert all(image is not None and image.shape == (3, 32, 32) for image, _ in views)
    replaced = {Path(source.name(i)).name for i, (_, met) in enumerate(views) if source.name(i) in met}
    assert replaced == REASONS.keys()


def test_a_limit_is_judged_before_decoding(tmp_path: Path, monkeypatch):

    def decode_small(raw: bytes, channels: int) -> decode_pillow.Decoded:
        assert len(raw) < 40_000
        return decode_pillow.decode_file(raw, channels)

    save_image(tmp_path / "large.png", seed=1, size=(200, 100))
    save_image(tmp_path / "small.png", seed=1, size=(100, 100))
    monkeypatch.setattr("fastjepa.data.prepare.check_images.decode_file", decode_small)
    report = check_images(str(tmp_path), max_pixels=0.01)
    assert [str(bad) for bad in report.bad] == [f"{tmp_path}/large.png: too large (200x100, 0.0 megapixels)"]


@pytest.mark.parametrize("limit", [0, -1, float("nan"), 90])
def test_a_limit_that_a_run_does_not_keep_is_refused(tmp_path: Path, limit: float):
    with pytest.raises(UserError, match=r"at most 89.4785, the megapixels that a run decodes"):
        check_images(str(tmp_path), max_pixels=limit)


def test_the_decoders_limit_is_the_default(tmp_path: Path, monkeypatch):
    save_image(tmp_path / "0.png", seed=1, size=(40, 30))
    for limit, reasons in ((1199, ["too large"]), (1200, [])):
        for module in (decode_pillow, check_images_module):
            monkeypatch.setattr(module, "MAX_PIXELS", limit)
        assert [bad.reason for bad in check_images(str(tmp_path)).bad] == reasons


def test_the_command_prints_writes_and_exits_with_1(planted: Path, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    os.rename(os.fsencode(planted / "empty.jpg"), os.fsencode(planted) + b"/\xff.jpg")  # not UTF-8
    assert main(["data", "check", "in", "--workers", "2"]) == 1
    out = capsys.readouterr().out
    assert (
        "in/notes.jpg: not an image (it begins with b'a letter', as no format that Pillow knows)\n" in out
        and "in/\\udcff.jpg: zero bytes\n" in out
    )
    assert "16 images read, smallest 1x1, largest 20000x1\nbad: 9, 2 too large, 2 truncated, 1 " in out
    assert "their paths are in bad.txt" in out
    listed = (tmp_path / "bad.txt").read_bytes().splitlines()
    assert sorted(listed) == sorted(b"in/" + (b"\xff.jpg" if n == "empty.jpg" else n.encode()) for n in REASONS)
    assert main(["data", "check", "in", "--output", "other.txt", "--json", "--max-pixels", "0.005"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["by_reason"]["too large"] == 3 and found["list"] == "other.txt" and len(found["bad"]) == 10
    assert (tmp_path / "other.txt").is_file()


def test_a_name_with_line_ends_is_one_line(tmp_path: Path, monkeypatch, capsys):
    """And the list gives back every name: no two names have the same line."""
    monkeypatch.chdir(tmp_path)
    names = ["a\nb.jpg", "a\\nb.jpg", "\n.jpg", "c\r\nd.jpg", "e\\.jpg", "plain.jpg"]
    (tmp_path / "in").mkdir()
    for name in names:
        (tmp_path / "in" / name).write_bytes(b"")
    assert main(["data", "check", "in", "--workers", "1"]) == 1
    listed = (tmp_path / "bad.txt").read_text().splitlines()
    assert sorted(re.sub(r"\\(.)", lambda m: {"n": "\n", "r": "\r"}.get(m[1], m[1]), line) for line in listed) == sorted(
        f"in/{name}" for name in names
    )
    assert capsys.readouterr().out.count(": zero bytes\n") == len(listed) == len(names)
    assert "in/plain.jpg" in listed and r"in/a\nb.jpg" in listed


def test_a_good_source_exits_with_0_and_writes_nothing(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_image(tmp_path / "in" / "0.png", seed=1)
    assert main(["data", "check", "in"]) == 0
    assert capsys.readouterr().out == "1 images read, smallest 40x30, largest 40x30\nbad: 0\n"
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    assert main(["data", "check", "nowhere"]) == 2
    assert main(["data", "check", "in", "--split", "val"]) == 2
    assert "has no val split" in capsys.readouterr().err


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    for i in range(12):
        save_image(tmp_path / "in" / f"{i}.png", seed=i)
    out = tmp_path / "out"
    write_shards(open_source(tmp_path / "in"), out / "train", {"path": "in", "split": "train"}, ShardRequest(20_000))
    return out


def test_whole_shards_agree_with_their_manifest(sharded: Path, capsys):
    assert main(["data", "check", str(sharded)]) == 0
    assert "3 shards compared with their manifest, 12 images read" in capsys.readouterr().out


@pytest.mark.parametrize(
    "damage, said",
    [
        ("flip", "damaged shard (SHA-256 "),
        ("cut", "damaged shard (bytes "),
        ("delete", "vanished (listed in manifest.json)"),
        ("add", "damaged shard (not in manifest.json)"),
        ("count", "damaged shard (images 4, in manifest.json 5)"),
    ],
)
def test_damaged_shards_are_found(sharded: Path, damage: str, said: str, tmp_path: Path, capsys):
    tar, manifest = sharded / "train" / "000001.tar", sharded / "train" / "manifest.json"
    raw = bytearray(tar.read_bytes())
    if damage == "flip":
        raw[2000] ^= 1
        tar.write_bytes(raw)
    elif damage == "cut":
        tar.write_bytes(raw[:-512])
    elif damage == "delete":
        tar.unlink()
    elif damage == "add":
        tar = sharded / "train" / "000009.tar"
        tar.write_bytes(raw)
    else:
        stated = json.loads(manifest.read_text())
        stated["shards"][1]["images"] += 1
        manifest.write_text(json.dumps(stated | {"images": 13}))
    assert main(["data", "check", str(sharded), "--output", str(tmp_path / "list")]) == 1
    assert f"{tar}: {said}" in capsys.readouterr().out
    assert (tmp_path / "list").read_text() == f"{tar}\n"


def test_a_bad_image_in_a_shard_is_named_by_its_member(tmp_path: Path):
    save_image(tmp_path / "in" / "0.png", seed=1)
    (tmp_path / "in" / "letter.png").write_text("text")
    write_shards(open_source(tmp_path / "in"), tmp_path / "out", {"path": "in", "split": "train"}, ShardRequest(20_000))
    (bad,) = check_images(str(tmp_path / "out")).bad
    assert bad.path == f"{tmp_path}/out/000000.tar/00000001-letter.png" and bad.reason == "not an image"
