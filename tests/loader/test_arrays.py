"""Arrays on their way to batches: from folders, shards and Parquet files alike, checked, sharded and refused by name."""

import io
import json
import logging
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import torch
from pyarrow import parquet

from fastjepa.cli.main import main
from fastjepa.data.crops import crop_image
from fastjepa.data.dropped import NODATA
from fastjepa.data.image_folder import ImageFolder
from fastjepa.data.sources import open_source
from fastjepa.data.tar_shards import TarShards
from fastjepa.errors import ConfigError, UserError
from fastjepa.loader.loader import Loader, batch_bytes, batch_recipe, choose_decoder, pixels_of
from fastjepa.loader.micro_batches import MicroBatches
from fastjepa.ranks.world import World
from tests.support.arrays import BANDS, measured, npy, tiff, write_shapes
from tests.support.batches import CPU, load, same_batch, settings
from tests.support.images import encode_png, encoded, pack_shard

DEEP = {"dtype": "uint16", "channels": BANDS, "scale": 10000, "mean": [0.3] * BANDS, "std": [0.25] * BANDS}
STATES = {"dtype": "float32", "channels": 2, "mean": [0.1, -0.2], "std": [2.0, 0.5]}


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> Path:
    """16 TIFFs of 12 bands, 40 pixels a side, in 4 classes; and the shards made of them."""
    root = write_shapes(tmp_path_factory.mktemp("shapes"), 16, 40)
    words = ["--keep-order", "--shard-size", "200KB", "--workers", "1"]
    assert main(["data", "shard", str(root), str(root / "shards"), *words]) == 0
    return root


@pytest.fixture(scope="module")
def states(tmp_path_factory) -> Path:
    """8 .npy files of 2 bands of floats, half of them with bands last, and two values that are no number."""
    root = tmp_path_factory.mktemp("states")
    for i in range(8):
        values = measured(2, 36, 33, dtype="float32", seed=i)
        values[0, 3, :2] = np.nan
        (root / f"{i}.npy").write_bytes(npy(values if i % 2 else np.ascontiguousarray(values.transpose(1, 2, 0))))
    return root


def test_a_batch_is_of_the_crops_in_16_bits(shapes: Path):
    """Made by hand from tifffile's arrays: order and box are those of any image."""
    config = settings(shapes / "train", **DEEP)
    dataset = MicroBatches(batch_recipe(config), open_source(config.data.address), 0, 1)
    batch = dataset[0]
    assert batch.images.dtype == torch.uint16 and batch.images.shape == (4, 12, 32, 32)
    assert batch_bytes(config) == sum(tensor.nbytes for tensor in batch.tensors())
    for row, sample in zip(batch.images, dataset.samples(0, 0, 4), strict=True):
        image = pixels_of(config).decode(dataset.source.read(sample)).image
        (box, flip), _ = dataset._first_readable(0, int(sample), lambda raw, crop_of: crop_of(40, 40))
        exact = crop_image(image.float(), box, (32, 32), flip)
        assert (row.float() - exact).abs().max() <= 0.5 and len(np.unique(row)) > 1000


def test_folder_shards_parquet_and_processes_give_the_same_batches(shapes: Path, tmp_path: Path):
    source = open_source(shapes / "train")
    files = [source.read(i) for i in range(len(source))]
    parquet.write_table(pyarrow.table({"image": files, "label": [source.label(i) for i in range(16)]}), tmp_path / "a.parquet")
    expected = load(settings(shapes / "train", **DEEP), range(5))
    places = {"shards": shapes / "shards", "parquet": tmp_path}
    for name, place in places.items():
        found = load(settings(place, **DEEP), range(5))
        assert all(same_batch(a, b) for p, q in zip(expected, found, strict=True) for a, b in zip(p, q, strict=True)), name
    resumed = load(settings(shapes / "train", num_workers=1, **DEEP), range(3, 5))
    assert all(same_batch(a, b) for p, q in zip(expected[3:], resumed, strict=True) for a, b in zip(p, q, strict=True))


def test_shards_keep_every_byte(shapes: Path, states: Path, tmp_path: Path):
    """A shard an image: the index beside each, a .npz, is no image more."""
    for root in (shapes / "train", states):
        words = ["--keep-order", "--shard-size", "1KB", "--workers", "1"]
        main(["data", "shard", str(root), str(tmp_path / root.name), *words])
        folder, shards = open_source(root), open_source(tmp_path / root.name)
        assert isinstance(folder, ImageFolder) and isinstance(shards, TarShards) and len(shards) == len(folder)
        assert all(bytes(folder.read(i)) == shards.read(i) for i in range(len(folder)))
        assert {Path(shards.name(i)).suffix for i in range(len(shards))} == {".tif" if root.name == "train" else ".npy"}


def test_floats_are_normalised_by_the_loader(states: Path, caplog):
    """NaN is the mean, which is 0 then; the encoder takes floats as they are."""
    config = settings(states, crop_scale=[1, 1], **STATES)
    dataset = MicroBatches(batch_recipe(config), open_source(states), 0, 1)
    image = pixels_of(config).decode(dataset.source.read(1)).image
    assert image[:, 3, 0].tolist() == pytest.approx([0.1, float(np.load(states / "1.npy")[1, 3, 0])])
    shown, _ = dataset.view(0, 1)
    assert shown.dtype == torch.float32 and 0.2 < shown[0].std() < 0.6 and 1 < shown[1].std() < 2.4
    batches = load(config, range(3))
    assert all(batch.images.isfinite().all() for step in batches for batch in step)
    assert f"8 of the 8 files that this rank read in the first epoch hold {NODATA}" in caplog.text


def test_a_damaged_file_is_replaced_and_counted(shapes: Path, tmp_path: Path):
    for i in range(6):
        raw = tiff(measured(2, 33, 33, seed=i), "planar")
        (tmp_path / f"{i}.tif").write_bytes(raw[: len(raw) // 2] if i == 3 else raw)
    keys = {"dtype": "uint16", "channels": 2, "mean": [0.5] * 2, "std": [0.3] * 2, "batch_size": 2}
    bad = {name for step in load(settings(tmp_path, **keys), range(3)) for batch in step for name in batch.bad}
    assert bad == {str(tmp_path / "3.tif")}
    with pytest.raises(UserError, match="1 files cannot be decoded, more than the 0 allowed"):
        load(settings(tmp_path, max_bad=0, **keys), range(3))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_of_other_bands_ends_the_run_by_its_name(tmp_path: Path, workers: int):
    for i in range(4):
        (tmp_path / f"{i}.tif").write_bytes(tiff(measured(2 + (i == 3), 33, 33, seed=i)))
    config = settings(tmp_path, dtype="uint16", channels=2, mean=[0.5] * 2, std=[0.3] * 2, num_workers=workers)
    with pytest.raises(UserError, match=rf"^{tmp_path}/3.tif: holds 3 bands of uint16, and data.channels is 2; set that to 3"):
        load(config, range(1))


def test_dali_is_refused_by_name_and_auto_takes_torch(shapes: Path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    deep = settings(shapes / "train", loader="auto", **DEEP)
    assert choose_decoder("auto", "cuda", pixels_of(deep)) == ("torch", "DALI decodes 1 or 3 channels of 8 bits alone")
    assert choose_decoder("auto", "cuda", pixels_of(settings()))[0] == "dali"
    for keys in (DEEP, STATES, {"bands": [2, 1, 0]}, {"nodata": 0}):
        with pytest.raises(ConfigError, match="data.loader: dali decodes pictures alone, .*; set it to auto or torch"):
            Loader(
                settings(shapes / "train", **{"loader": "dali"} | keys), open_source(shapes / "train"), World(0, 0, 1, CPU), 0
            )


def test_dali_takes_a_npy_of_8_bits(tmp_path: Path):
    for i in range(4):
        (tmp_path / f"{i}.npy").write_bytes(npy(measured(3, 32, 32, dtype="uint8", seed=i)))
    same = {"crop_scale": [1, 1], "max_bad": 0}
    (ours,), (theirs,) = (load(settings(tmp_path, loader=loader, **same), range(1))[0] for loader in ("torch", "dali"))
    assert (ours.images.float() - theirs.images.float()).abs().mean() < 0.5


def test_arrays_are_images_where_there_is_no_other(tmp_path: Path, caplog):
    """Beside images they are mostly their features; beside a tar a .npz is its index."""
    (tmp_path / "both").mkdir()
    for name, raw in (("0.png", encoded(0)), ("0.npy", npy(measured(3, 8, 9)))):
        (tmp_path / "both" / name).write_bytes(raw)
    caplog.set_level(logging.WARNING)
    assert [Path(open_source(tmp_path / "both").name(0)).name] == ["0.png"]
    assert "1 file of other kinds passed over (.npy 1)" in caplog.text
    files = {"a.png": encoded(0), "a.npy": npy(measured(2, 2)), "b.npy": npy(measured(2, 2))}
    pack_shard(tmp_path / "mixed.tar", files)
    pack_shard(tmp_path / "arrays.tar", {"a.npy": files["a.npy"], "a.cls": b"3", "b.npz": b"PK\3\4", "b.cls": b"1"})
    assert len(open_source(str(tmp_path / "mixed.tar"))) == 1
    arrays = open_source(str(tmp_path / "arrays.tar"))
    assert [(Path(arrays.name(i)).name, arrays.label(i)) for i in range(len(arrays))] == [("a.npy", 3), ("b.npz", 1)]


def test_data_check_reads_as_the_run_does(shapes: Path, tmp_path: Path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check = ["data", "check", str(shapes), "--workers", "1"]
    assert main([*check, "data.dtype=uint16", f"data.channels={BANDS}"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "16 images read, smallest 40x40, largest 40x40", "16 of 12 bands of uint16", "bad: 0",
    ]  # fmt: skip
    assert main([*check, "--json", "data.dtype=uint16", "data.channels=4"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["by_reason"] == {"other bands": 16} and found["held"] == {}
    assert "holds 12 bands of uint16, and data.channels is 4" in found["bad"][0]["detail"]
    stream = io.BytesIO()
    np.savez(stream, image=measured(3, 8, 8))
    for name, raw in (
        ("cut.tif", tiff(measured(3, 64, 64))[:-900]),
        ("deep.png", encode_png(measured(8, 8, 3))),
        ("a.tif", b""),
    ):
        (tmp_path / name).write_bytes(raw)
    assert main(["data", "check", str(tmp_path), "--workers", "1", "data.dtype=uint16"]) == 1
    said = capsys.readouterr().out
    assert "1 of 3 bands of uint16" in said and "bad: 2, 1 zero bytes, 1 cannot be decoded" in said
