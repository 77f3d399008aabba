"""benchmarks/data.py: what it counts, whom it compares, and what it says of both; toy images, real loaders."""

import contextlib
import itertools
import json
import math
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import data
import numpy as np
import pytest
import torch
from PIL import Image

from fastjepa.data.sources import open_source

CPU = torch.device("cpu")
TOY = ["--device=cpu", "--size=32", "--batch=4", "--rounds=1", "--seconds=0.05", "mask.patch_size=4"]
TOY += ["mask.min_keep=2", "meta.depth=1", "meta.pred_depth=1", "meta.pred_emb_dim=48", "runtime.threads=1"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """16 JPEGs, and a file that is none."""
    (tmp_path / "images").mkdir()
    y, x = np.mgrid[0:48, 0:64]
    for seed in range(16):
        waves = np.stack([128 + 100 * np.sin(x / (5 + seed) + channel * y / 9) for channel in range(3)], -1)
        Image.fromarray(waves.astype(np.uint8)).save(tmp_path / "images" / f"{seed:02d}.jpg", quality=95)
    (tmp_path / "images" / "bad.jpg").write_text("no image at all")
    return tmp_path / "images"


def run(capsys, *arguments: object) -> dict:
    assert data.main([*TOY, "--json", *map(str, arguments)]) == 0
    return json.loads(capsys.readouterr().out)


def test_loaders_take_turns(folder: Path, capsys):
    found = run(capsys, "--data", folder, "--workers=0", "--rounds=2")
    assert found["data"]["origin"] == str(folder) and found["data"]["images"] == 16  # the bad one is left out
    named = [(one["loader"], one["source"], one["workers"]) for one in found["rows"]]
    pairs = [(loader, source) for source in ("folder", "shards") for loader in ("torch", "dali")]
    assert sorted(named) == sorted((*pair, 0) for pair in [*pairs, ("torchvision", "folder"), ("webdataset", "shards")])
    for one in found["rows"]:
        assert 0 < one["images_per_s"]["p20"] <= one["images_per_s"]["median"] <= one["images_per_s"]["p80"]
        assert ("ratio_to_torchvision" in one) == (one["loader"] != "torchvision")
    threads = [f"{loader}, folder, 0 workers" for loader in ("spdl", "spdl_ffmpeg")]
    assert [one["what"] for one in found["not_measured"]] == [*threads, "threads without Python's lock"]


@contextlib.contextmanager
def every(milliseconds: float, size: int = 8) -> Iterator[Iterator[torch.Tensor]]:
    """A loader with 14 batches in hand, then one of `size` images every so often."""
    yield (torch.zeros(size) for n in itertools.count() if n < 14 or time.sleep(milliseconds / 1000) is None)


def test_images_are_counted_and_what_was_made_ahead_is_not():
    """At most 8 images in 10 ms, and fewer on a busy machine: the 112 in hand would add 700 a second."""
    rate = data.LoaderRate(lambda: every(10), turn=2, ahead=3, seconds=0.15, device=CPU)
    rate(0)
    assert 400 < rate.readings[0] <= 800


@pytest.mark.parametrize(
    "loader, source", [("torch", "folder"), ("dali", "shards"), ("torchvision", "folder"), ("webdataset", "shards")]
)
@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_every_loader_goes_on_past_the_end_of_the_images(folder: Path, tmp_path: Path, loader: str, source: str, workers: int):
    sets = data.prepare_sets(str(folder), 100, 4, tmp_path / "scratch")
    config = data.to_config(data.parse_options(TOY))
    with data.LOADERS[loader][0](data.Contender(source, loader, workers), config, sets, CPU) as batches:
        for images in itertools.islice(batches, 13):
            assert images.shape == (4, 3, 32, 32) and images.dtype == torch.uint8 and images.any()


@pytest.mark.parametrize("loader", ["spdl", "spdl_ffmpeg"])
def test_threads_of_spdl_make_random_crops(folder: Path, tmp_path: Path, loader: str):
    """The decoder of SPDL runs where FFmpeg's libraries are; elsewhere the reason says how to get them."""
    one = data.Contender("folder", loader, 2)
    if reason := data.reason_against(one):
        assert loader == "spdl_ffmpeg" and "apt-get install libavfilter" in reason
        return
    sets = data.prepare_sets(str(folder), 1, 4, tmp_path / "scratch")  # one image, of which no two crops are the same
    config = data.to_config(data.parse_options(TOY))
    with data.LOADERS[loader][0](one, config, sets, CPU) as batches:
        images = torch.cat(list(itertools.islice(batches, 13)))
    assert images.shape == (52, 3, 32, 32) and images.dtype == torch.uint8
    assert len({image.numpy().tobytes() for image in images}) > 45


def test_files_and_shards_hold_the_same_images(folder: Path, tmp_path: Path):
    sets = data.prepare_sets(str(folder), 5, 4, tmp_path / "scratch")
    files, shards = open_source(sets.folder), open_source(sets.shards)
    assert len(list(sets.shards.glob("*.tar"))) >= 2
    assert sorted(files.read(i) for i in range(len(files))) == sorted(shards.read(i) for i in range(len(shards)))
    spaced = [(folder / f"{n:02d}.jpg").read_bytes() for n in (0, 4, 8, 12)]  # of 17 files, the last of which is bad
    assert [files.read(i) for i in range(len(files))] == spaced


def test_images_made_here_are_like_photographs(tmp_path: Path):
    sets = data.prepare_sets(None, 3, 2, tmp_path)
    assert "made here: 500x375 JPEGs" in sets.about["origin"] and 80_000 < sets.about["mean_bytes"] < 140_000
    with Image.open(open_source(sets.folder).name(0)) as image:
        assert (image.format, image.size) == ("JPEG", (500, 375))


def test_what_is_not_installed_is_not_measured(folder: Path, capsys, monkeypatch):
    monkeypatch.setattr(data, "find_spec", lambda name: None)
    found = run(capsys, "--data", folder, "--workers=0", "--loaders=torch,webdataset", "--sources=shards")
    assert found["not_measured"][0] == {"what": "webdataset, shards, 0 workers", "reason": "webdataset is not installed"}
    assert [one["loader"] for one in found["rows"]] == ["torch"]


@pytest.mark.parametrize("arguments, says", [
    (["--batch=32"], "16 images are fewer than a batch of 32"),
    (["data.prefetch=0"], "prefetch"),
])  # fmt: skip
def test_what_cannot_be_measured_is_refused(folder: Path, capsys, arguments: list[str], says: str):
    assert data.main([*TOY, "--data", str(folder), "--workers=0", *arguments]) == 2
    assert says in capsys.readouterr().err


def test_pixels_are_no_work_for_a_decoder(tmp_path: Path, capsys):
    for kind, shape in (("images-idx3", (2, 28, 28)), ("labels-idx1", (2,))):
        head = struct.pack(f">BBBB{len(shape)}I", 0, 0, 8, len(shape), *shape)
        (tmp_path / f"train-{kind}-ubyte").write_bytes(head + bytes(math.prod(shape)))
    assert data.main([*TOY, "--data", str(tmp_path)]) == 2
    assert "idx files need no decoding" in capsys.readouterr().err


def test_an_unknown_loader_is_named(capsys):
    with pytest.raises(SystemExit, match="2"):
        data.main(["--loaders=torch,ffcv"])
    assert "'ffcv' is none of torch, dali, torchvision, webdataset" in capsys.readouterr().err
