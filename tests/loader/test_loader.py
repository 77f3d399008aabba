"""Sources, order, crops, substitutes: what a batch holds is a function of (config, rank, step, micro-batch) alone."""

import gzip
import io
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2.functional import resized_crop

from fastjepa.config.schema import DataConfig
from fastjepa.data.crops import crop_box
from fastjepa.data.decode_pillow import decode_image
from fastjepa.data.prepare.check_images import judge_image
from fastjepa.data.sources import open_source
from fastjepa.errors import ConfigError, UserError
from fastjepa.loader.loader import Loader, batch_recipe
from fastjepa.loader.micro_batches import MicroBatches
from fastjepa.ranks.world import World
from fastjepa.rng import BOX_STREAM, ORDER_STREAM, generator
from tests.support.batches import CPU, load, same_batch, settings
from tests.support.images import pack_shard, save_image, write_idx_pairs


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """26 images in two class folders."""
    for i in range(26):
        save_image(tmp_path / "images" / ("cat", "dog")[i % 2] / f"{i:02d}.png", seed=i)
    return tmp_path / "images"


@pytest.fixture(params=["dali", "torch"])
def loader(request: pytest.FixtureRequest) -> str:
    return request.param


def test_folder_is_sorted_and_labelled(folder: Path):
    save_image(folder / "dog" / "deeper" / "a.JPEG", seed=1)
    (folder / "dog" / ".hidden.png").write_bytes(b"x")
    (folder / "dog" / "notes.txt").write_bytes(b"x")
    source = open_source(folder)
    names = [source.name(i) for i in range(len(source))]
    assert names == sorted(names) and len(names) == 27
    assert source.classes == ("cat", "dog")
    assert all(source.classes[source.label(i)] == Path(names[i]).relative_to(folder).parts[0] for i in range(27))
    assert source.read(3) == Path(names[3]).read_bytes()


def test_images_beside_class_folders_have_no_labels(folder: Path):
    save_image(folder / "loose.png", seed=1)
    source = open_source(folder)
    assert (source.classes, source.label(0), len(source)) == ((), None, 27)


def test_split_picks_a_subfolder(folder: Path):
    for split, count in (("train", 3), ("val", 2)):
        for i in range(count):
            save_image(folder.parent / "set" / split / "cat" / f"{i}.png", seed=i)
    root = folder.parent / "set"
    assert [len(open_source(root, split)) for split in ("train", "val", "test")] == [3, 2, 2]
    assert open_source(root).classes == ("cat",)


def test_a_class_called_train_is_no_split(tmp_path: Path):
    for label in ("plane", "train"):
        save_image(tmp_path / label / "0.png", seed=1)
    assert open_source(tmp_path).classes == ("plane", "train")


def test_official_root_path_and_image_folder(folder: Path):
    setting = settings(root_path=str(folder), image_folder="cat/")
    assert len(open_source(setting.data.address)) == 13


@pytest.mark.parametrize(
    "source, split, message",
    [
        (
            "missing/dir",
            "train",
            "'missing/dir' is neither a directory nor a data set's name; data sets: fashion-mnist, cifar10",
        ),
        ("fashion-mnst", "train", "did you mean 'fashion-mnist'"),
        ("cifar10", "train", "run: fastjepa data get cifar10"),
        ("empty", "train", "empty: no image files in it; give a directory that holds"),
        ("images", "test", "images: has no test split; put its images into train/ and test/ folders"),
        ("*.tar", "train", "no such file; give a .tar or .parquet file, a glob, or shard-"),
        (DataConfig().address, "train", "data.source is not set"),
    ],
)
def test_unusable_source_says_what_to_do(folder, monkeypatch, source, split, message):
    monkeypatch.chdir(folder.parent)
    monkeypatch.setenv("FASTJEPA_DATA", str(folder.parent / "no-data"))
    Path("empty").mkdir()
    with pytest.raises(UserError, match=message.replace("*", r"\*")):
        open_source(source, split)


def test_shards_equal_the_folder_they_came_from(folder: Path):
    files = sorted(folder.rglob("*.png"))
    (folder.parent / "shards").mkdir()
    for number in range(2):
        chunk = files[13 * number : 13 * number + 13]
        members = {str(path.relative_to(folder)): path.read_bytes() for path in chunk}
        pack_shard(folder.parent / "shards" / f"{number}.tar", members)
    shards, images = open_source(folder.parent / "shards"), open_source(folder)
    assert [shards.read(i) for i in range(len(shards))] == [images.read(i) for i in range(len(images))]
    assert shards.name(13).endswith("shards/1.tar/dog/01.png")
    assert (shards.classes, shards.label(0)) == ((), None)
    from_glob = open_source(str(folder.parent / "shards" / "*.tar"))
    assert [from_glob.name(i) for i in range(26)] == [shards.name(i) for i in range(26)]
    setting, other = settings(folder), settings(folder.parent / "shards")
    assert all(same_batch(a[0], b[0]) for a, b in zip(load(setting, range(3)), load(other, range(3)), strict=True))


def test_shard_labels_come_from_cls(tmp_path: Path):
    image = save_image(tmp_path / "x.png", seed=1).read_bytes()
    pack_shard(tmp_path / "0.tar", {"a/0.cls": b"2", "a/0.png": image, "a/0.json": b"{}", "b/0.png": image, "b/0.cls": b"1\n"})
    source = open_source(tmp_path / "0.tar")
    assert [source.label(i) for i in range(2)] == [2, 1] and source.classes == ("0", "1", "2")


@pytest.mark.parametrize("keep", [700, 2800])
def test_damaged_shard_is_named(tmp_path: Path, keep: int):
    image = save_image(tmp_path / "x.png", seed=1).read_bytes()
    pack_shard(tmp_path / "0.tar", {"0.png": image})
    os.truncate(tmp_path / "0.tar", keep)
    with pytest.raises(UserError, match=r"0\.tar: .*again"):
        open_source(tmp_path / "0.tar")


def test_idx_files_by_catalog_name(tmp_path: Path, monkeypatch):
    images = write_idx_pairs(tmp_path / "fashion-mnist")
    monkeypatch.setenv("FASTJEPA_DATA", str(tmp_path))
    train, test = open_source("fashion-mnist"), open_source("fashion-mnist", "test")
    assert (len(train), len(test)) == (8, 3)
    assert all(np.array_equal(train.read(i), images[i]) for i in range(8))
    assert train.classes[train.label(5)] == "Trouser"
    batch = load(settings("fashion-mnist", channels=1, crop_size=28), range(1))[0][0]
    assert batch.images.shape == (4, 1, 28, 28)


def test_damaged_idx_is_named(tmp_path: Path):
    write_idx_pairs(tmp_path)
    images = tmp_path / "train-images-idx3-ubyte.gz"
    whole = images.read_bytes()
    for damaged in (whole[:-400], gzip.compress(gzip.decompress(whole)[:-1]), b"text"):
        images.write_bytes(damaged)
        with pytest.raises(UserError, match="train-images-idx3-ubyte.gz: .*delete it and get it again"):
            open_source(tmp_path)


def test_an_epoch_shows_every_image_once_in_a_new_order(folder: Path):
    dataset = MicroBatches(batch_recipe(settings(folder, batch_size=13)), open_source(folder), rank=0, ranks=1)
    first, second = (np.concatenate([dataset.samples(step, 0, 13) for step in steps]) for steps in ((0, 1), (2, 3)))
    assert sorted(first) == sorted(second) == list(range(26))
    assert not np.array_equal(first, second)


def test_incomplete_last_batch_is_dropped(folder: Path):
    setting = settings(folder)
    with Loader(setting, open_source(folder), World(0, 0, 1, CPU), 0) as loader:
        assert loader.steps_per_epoch == 6
    order = generator(5, ORDER_STREAM, 1).permutation(26)
    samples = MicroBatches(batch_recipe(setting), open_source(folder), 0, 1).samples(7, 1, 3)
    assert samples.tolist() == order[4 + 1 : 4 + 3].tolist()


def test_workers_change_no_byte(folder: Path, loader: str):
    alone = load(settings(folder, micro_batch=2, loader=loader), range(8), stop=8)
    helped = load(settings(folder, micro_batch=2, loader=loader, num_workers=2, prefetch=3), range(8), stop=8)
    assert [len(step) for step in helped] == [2] * 8
    assert all(same_batch(a, b) for x, y in zip(alone, helped, strict=True) for a, b in zip(x, y, strict=True))


@pytest.mark.parametrize("rank, world", [(0, 1), (0, 2), (1, 2)])
def test_resume_shows_what_the_whole_run_shows(folder: Path, loader: str, rank: int, world: int):
    """In the middle of an epoch and past its end, whatever was decoded ahead when the run stopped."""
    plant(folder)
    setting = settings(folder, micro_batch=2, loader=loader)
    whole = load(setting, range(9), rank, world)
    for start in (1, 5):
        rest = load(setting, range(start, 9), rank, world)
        assert all(same_batch(a, b) for x, y in zip(whole[start:], rest, strict=True) for a, b in zip(x, y, strict=True))


def test_ranks_and_micro_batches_partition_the_global_batch(folder: Path, loader: str):
    whole = load(settings(folder, batch_size=8, loader=loader), range(4))
    ranks = [load(settings(folder, batch_size=4, micro_batch=2, loader=loader), range(4), rank, world=2) for rank in (0, 1)]
    for step in range(4):
        parts = [batch for rank in ranks for batch in rank[step]]
        assert torch.equal(torch.cat([batch.images for batch in parts]), whole[step][0].images)
        patches = [batch.target.idx.numpy() + 2 * 64 * i for i, batch in enumerate(parts)]
        assert np.array_equal(np.concatenate(patches), whole[step][0].target.idx)
        assert sum(float(batch.blocks.weight.sum()) for batch in parts) == pytest.approx(2)


def test_seed_and_epoch_change_the_crops(folder: Path):
    views = [
        MicroBatches(batch_recipe(settings(folder, seed=seed)), open_source(folder), 0, 1).view(epoch, 3)[0]
        for seed, epoch in ((5, 0), (5, 1), (6, 0), (5, 0))
    ]
    assert torch.equal(views[0], views[3])
    assert not any(torch.equal(views[0], view) for view in views[1:3])


def test_view_is_torchvisions_resized_crop(folder: Path):
    setting, source = settings(folder, crop_size=[32, 24]), open_source(folder)
    for sample in range(6):
        uniforms = generator(5, BOX_STREAM, 2, 11 * sample).random(44)
        box = crop_box(30, 40, (0.3, 1.0), uniforms)
        image = decode_image(source.read(sample), 3)
        theirs = resized_crop(image.contiguous(), *box, [32, 24], antialias=True)
        assert torch.equal(MicroBatches(batch_recipe(setting), source, 0, 1).view(2, sample)[0], theirs)


def test_horizontal_flip_mirrors_half_of_the_views(folder: Path):
    plain, mirrored = (
        MicroBatches(batch_recipe(settings(folder, use_horizontal_flip=f)), open_source(folder), 0, 1) for f in (False, True)
    )
    pairs = [(plain.view(epoch, i)[0], mirrored.view(epoch, i)[0]) for epoch in range(4) for i in range(26)]
    flipped = [torch.equal(a.flip(-1), b) for a, b in pairs]
    assert all(f or torch.equal(a, b) for f, (a, b) in zip(flipped, pairs, strict=True))
    assert 30 < sum(flipped) < 74  # of 104: four standard deviations


def test_images_arrive_as_bytes(folder: Path):
    """The patch embedding normalises what it sees: four times fewer bytes travel."""
    setting = settings(folder)
    arrived = load(setting, range(1))[0][0].images
    assert arrived.dtype == torch.uint8
    assert torch.equal(arrived, MicroBatches(batch_recipe(setting), open_source(folder), 0, 1)[0].images)


def plant(folder: Path) -> dict[int, Path]:
    """Spoil three of the 26 images: sample number -> path."""
    paths = {i: Path(open_source(folder).name(i)) for i in (2, 9, 20)}
    jpeg = io.BytesIO()
    Image.open(paths[2]).save(jpeg, "JPEG")
    paths[2].write_bytes(jpeg.getvalue()[:-200])
    paths[9].write_text("no image at all")
    paths[20].write_bytes(b"")
    return paths


def test_bad_files_are_replaced_and_no_other_sample_moves(folder: Path, caplog):
    shutil.copytree(folder, folder.parent / "good")
    bad = plant(folder)
    dataset = MicroBatches(batch_recipe(settings(folder)), open_source(folder), 0, 1)
    good = MicroBatches(batch_recipe(settings(folder.parent / "good")), open_source(folder.parent / "good"), 0, 1)
    for sample in range(26):
        image, met = dataset.view(0, sample)
        assert (str(bad[sample]) in met) if sample in bad else torch.equal(image, good.view(0, sample)[0])
        assert image.any()
    with Loader(settings(folder), open_source(folder), World(0, 0, 1, CPU), 0) as loader:
        reported = [set(batch.bad) for step in range(30) for batch in loader.micro_batches(step)]
    assert loader.bad == set.union(*reported) == set(map(str, bad.values()))
    assert sorted(record.args[0] for record in caplog.records) == sorted(loader.bad)  # logged once each
    helped = load(settings(folder, num_workers=2), range(8), stop=8)
    assert all(same_batch(a[0], b[0]) for a, b in zip(load(settings(folder), range(8)), helped, strict=True))


@pytest.mark.timeout(60)
def test_what_would_be_read_for_ever_is_bad(folder: Path, loader: str):
    """A pipe that nobody writes to, a device without an end."""
    os.mkfifo(folder / "cat" / "pipe.png")
    os.symlink("/dev/zero", folder / "dog" / "endless.png")
    source = open_source(folder)
    odd = {str(folder / "cat" / "pipe.png"), str(folder / "dog" / "endless.png")}
    for i in (i for i in range(28) if source.name(i) in odd):
        assert str(judge_image(source, i, limit=1)) == f"{source.name(i)}: unreadable (a pipe or a device, not a file)"
    with Loader(settings(folder, loader=loader, num_workers=1), source, World(0, 0, 1, CPU), 0, 7) as made:
        assert sum(len(batch.images) for step in range(7) for batch in made.micro_batches(step)) == 28
        assert made.bad == odd


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_bad_files_stop_the_run(folder: Path, loader: str, workers: int):
    plant(folder)
    setting = settings(folder, max_bad=2, num_workers=workers, loader=loader)
    message = r"3 files cannot be decoded, more than the 2 allowed, for example .*\.png \(.*\); .* or raise data.max_bad"
    with pytest.raises(UserError, match=message):
        load(setting, range(8), stop=8)
    load(settings(folder, max_bad=3, loader=loader), range(8))


def test_bad_files_of_an_earlier_part_of_the_run_count(folder: Path, loader: str):
    plant(folder)
    setting = settings(folder, max_bad=3, loader=loader)
    with Loader(setting, open_source(folder), World(0, 0, 1, CPU), 0) as loader, pytest.raises(UserError, match="4 files"):
        loader.bad.add("met before")
        for step in range(8):
            list(loader.micro_batches(step))


def test_a_source_without_a_readable_image_stops(folder: Path, loader: str):
    for path in folder.rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match="26 files cannot be decoded, more than the 25 allowed"):
        load(settings(folder, max_bad=10_000, loader=loader), range(1))


def test_too_few_images_names_both_numbers(folder: Path):
    with pytest.raises(ConfigError, match=r"26 images, fewer than one global batch of 32 \(data.batch_size 16 x 2 ranks\)"):
        Loader(settings(folder, batch_size=16), open_source(folder), World(0, 0, 2, CPU), 0)


def test_steps_must_follow_each_other(folder: Path):
    with Loader(settings(folder), open_source(folder), World(0, 0, 1, CPU), 3, 5) as loader:
        for wrong in (0, 4, 5):
            with pytest.raises(AssertionError, match=f"step {wrong} asked for"):
                list(loader.micro_batches(wrong))
        assert [len(list(loader.micro_batches(step))) for step in (3, 4)] == [1, 1]
        with pytest.raises(AssertionError, match="step 5 asked for"):
            list(loader.micro_batches(5))


def test_workers_outlive_an_interrupt_and_die_with_the_loader(folder: Path):
    with Loader(settings(folder, num_workers=2), open_source(folder), World(0, 0, 1, CPU), 0) as loader:
        iterator = loader._workers  # held, as a traceback would: its end must not wait for the garbage collector
        list(loader.micro_batches(0))
        for worker in iterator.processes:
            os.kill(worker.pid, signal.SIGINT)
            os.kill(worker.pid, signal.SIGTERM)
        assert all(len(list(loader.micro_batches(step))) == 1 for step in range(1, 12))
    for worker in iterator.processes:
        worker.join(timeout=10)
        assert not worker.is_alive()


def test_a_forgotten_loader_does_not_keep_the_process(folder: Path, loader: str):
    code = f"""
import torch
from fastjepa.config.load import config_from_dict
from fastjepa.data.sources import open_source
from fastjepa.loader.loader import Loader
from fastjepa.ranks.world import World
setting = config_from_dict({settings(folder, num_workers=1, loader=loader).to_dict()})
loader = Loader(setting, open_source(setting.data.address), World(0, 0, 1, torch.device("cpu")), 0)
print(len(list(loader.micro_batches(0))))
raise KeyError("on the way out")
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (ended.stdout, ended.returncode) == ("1\n", 1) and "on the way out" in ended.stderr


def test_loading_leaves_the_global_random_numbers_alone(folder: Path, loader: str):
    before = torch.get_rng_state()
    load(settings(folder, num_workers=1, loader=loader), range(2), stop=2)
    assert torch.equal(torch.get_rng_state(), before)


def test_pinning_keeps_the_bad_files(folder: Path, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)
    batch = MicroBatches(batch_recipe(settings(folder)), open_source(folder), 0, 1)[0]
    pinned = replace(batch, bad=("x.png",)).pin_memory()
    assert pinned.bad == ("x.png",) and torch.equal(pinned.context.idx, batch.context.idx)
