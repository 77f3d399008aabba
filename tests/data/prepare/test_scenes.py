"""Rendered scenes: the same bits everywhere, true labels, objects that can be counted, and a data set whole or not at all."""

import functools
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastjepa.data.prepare import scenes
from fastjepa.data.prepare import write_scenes as write_scenes_module
from fastjepa.data.prepare.catalog import get_dataset
from fastjepa.data.prepare.scenes import (
    AMBIENT,
    BOX,
    CYLINDER,
    GROUND,
    HALF_VIEW,
    LOOK,
    OBJECT_GAP,
    RADII,
    SPHERE,
    Scene,
    draw_scene,
    render_scene,
    trace_scene,
)
from fastjepa.data.prepare.write_scenes import write_scenes
from fastjepa.data.sources import open_source
from fastjepa.errors import UserError

SMALL = {"train": 12, "val": 6}
FIRST = "b7dc5d8e73e76d18"  # how the SHA-256 of the pixels of train_000000.png begins


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty data directory, and few scenes to render."""
    monkeypatch.setenv("FASTJEPA_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(write_scenes_module, "SPLIT_COUNTS", SMALL)
    return tmp_path / "data"


def inside(scene: Scene, i: int, points: np.ndarray) -> np.ndarray:
    """Whether points (..., 3) lie in object i, in double precision and by the definition of the solid."""
    radius = RADII["large" if scene.large[i] else "small"]
    half = radius / 2**0.5 if scene.shape[i] == BOX else radius
    x, y, z = np.moveaxis(points.astype(np.float64), -1, 0)
    x, y, z = x - scene.place[i, 0], y - scene.place[i, 1], z - half
    if scene.shape[i] == SPHERE:
        return x * x + y * y + z * z < radius * radius
    if scene.shape[i] == CYLINDER:
        return (x * x + y * y < radius * radius) & (np.abs(z) < half)
    angle = np.arctan2(scene.turn[i, 1], scene.turn[i, 0])
    along = x * np.cos(angle) + y * np.sin(angle)
    across = y * np.cos(angle) - x * np.sin(angle)
    return (np.abs(along) < half) & (np.abs(across) < half) & (np.abs(z) < half)


def camera_rays(scene: Scene, side: int) -> tuple[np.ndarray, np.ndarray]:
    """The camera's three axes as rows, and the rays (side, side, 3) of a pinhole, of length 1 along the third."""
    angle = np.arctan2(scene.tilt[1], scene.tilt[0])
    forward = np.array([0, np.cos(angle), -np.sin(angle)])
    axes = np.stack([[1.0, 0, 0], np.cross([1.0, 0, 0], forward), forward])
    step = ((np.arange(side) + 0.5) / side * 2 - 1) * HALF_VIEW
    return axes, axes[2] + step[None, :, None] * axes[0] - step[:, None, None] * axes[1]


def test_the_first_picture_is_the_one_it_always_was():
    picture = render_scene(draw_scene(0, "train", 0), 64)
    assert picture.shape == (64, 64, 3) and picture.dtype == np.uint8
    assert hashlib.sha256(picture.tobytes()).hexdigest().startswith(FIRST)


def test_a_picture_depends_on_its_seed_split_and_number_alone():
    again = render_scene(draw_scene(3, "val", 5), 32)
    code = (
        "from fastjepa.data.prepare.scenes import draw_scene, render_scene;"
        "[render_scene(draw_scene(3, 'val', i), 24) for i in (9, 4)];"
        "import sys; sys.stdout.buffer.write(render_scene(draw_scene(3, 'val', 5), 32).tobytes())"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout
    assert other == again.tobytes()
    for key in ((4, "val", 5), (3, "train", 5), (3, "val", 6)):
        assert not np.array_equal(render_scene(draw_scene(*key), 32), again)


def test_files_do_not_depend_on_workers_or_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    found = []
    for workers, chunk in ((1, 50), (2, 5)):
        monkeypatch.setattr(write_scenes_module, "SCENES_A_TASK", chunk)
        root = tmp_path / f"{workers}"
        write_scenes(root, 32, SMALL, workers=workers)
        found.append({str(file.relative_to(root)): file.read_bytes() for file in sorted(root.rglob("*.*"))})
    assert len(found[0]) == 20 and found[0] == found[1]


@pytest.mark.parametrize("i", range(4))
def test_rays_meet_what_a_march_along_them_meets(i: int):
    scene, side = draw_scene(1, "train", i), 24
    depth, ids, _ = trace_scene(scene, side)
    _, rays = camera_rays(scene, side)
    steps = np.arange(5, 20, 0.01)
    points = scene.camera + steps[:, None, None, None] * rays  # (steps, side, side, 3)
    first, met = np.full((side, side), len(steps)), np.full((side, side), -1)
    for k in range(len(scene.shape)):
        hits = inside(scene, k, points)
        entry = np.where(hits.any(axis=0), hits.argmax(axis=0), len(steps))
        first, met = np.minimum(first, entry), np.where(entry < first, k, met)
    agree = met == ids
    assert agree.mean() > 0.99  # a march steps past the thinnest slivers
    surface = agree & (ids >= 0)
    assert np.abs(steps[first[surface]] - 0.005 - depth[surface]).max() < 0.006
    ground = scene.camera + depth[..., None] * rays
    assert np.abs(ground[ids < 0][:, 2]).max() < 1e-4


@pytest.mark.parametrize("i", range(4))
def test_the_ground_is_dark_where_an_object_hides_the_light(i: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(scenes, "SAMPLES", 1)
    scene, side = draw_scene(2, "train", i), 64
    depth, ids, _ = trace_scene(scene, side)
    points = (scene.camera + depth[..., None] * camera_rays(scene, side)[1])[ids < 0]  # (n, 3)
    towards = points + np.arange(0.01, 3.5, 0.02)[:, None, None] * scene.light
    hidden = np.any([inside(scene, k, towards).any(axis=0) for k in range(len(scene.shape))], axis=0)
    linear = (render_scene(scene, side)[ids < 0, 0] / 255.0) ** 2
    bright = linear * (1 + 0.012 * (points[:, 0] ** 2 + points[:, 1] ** 2)) / (scene.ground * GROUND[0])
    dark = bright < AMBIENT + 0.25 * scene.key * scene.light[2] * (1 - AMBIENT)
    assert hidden.sum() > 20 and (dark == hidden).mean() > 0.99


def test_every_object_can_be_counted():
    """Each is seen at every size, in the frame, most of its outline free, and apart from others of its colour."""
    for i in range(40):
        scene = draw_scene(0, "val", i)
        n = len(scene.shape)
        for side in (64, 128):
            _, ids, outlines = trace_scene(scene, side)
            seen = np.array([(ids == k).sum() for k in range(n)])
            assert set(np.unique(ids)) - {-1} == set(range(n))
            assert (seen >= 0.5 * outlines).all() and (seen >= 0.0015 * side * side).all()
            assert (ids[0] < 0).all() and (ids[-1] < 0).all() and (ids[:, 0] < 0).all() and (ids[:, -1] < 0).all()
        _, ids, _ = trace_scene(scene, LOOK)
        for a, b in ((ids[1:], ids[:-1]), (ids[:, 1:], ids[:, :-1])):
            touching = (a != b) & (a >= 0) & (b >= 0)
            assert (scene.colour[a[touching]] != scene.colour[b[touching]]).all()


def test_no_two_objects_meet():
    for i in range(40):
        scene = draw_scene(0, "train", i)
        apart = np.linalg.norm(scene.place[:, None] - scene.place, axis=2) - scene.reach[:, None] - scene.reach
        assert apart[~np.eye(len(apart), dtype=bool)].min() > OBJECT_GAP - 1e-5


def test_size_changes_the_picture_alone():
    scene = draw_scene(0, "train", 3)
    small, large = (render_scene(scene, size).astype(float) for size in (32, 64))
    halved = large.reshape(32, 2, 32, 2, 3).mean(axis=(1, 3))
    assert np.abs(halved - small).mean() < 2


def test_labels_in_the_files_are_those_of_the_geometry(tmp_path: Path):
    write_scenes(tmp_path, 64, SMALL, seed=7, workers=1)
    listed = json.loads((tmp_path / "scenes" / "CLEVR_val_scenes.json").read_text())
    assert listed["info"] == {"split": "val", "size": 64, "seed": 7, "renderer": "fastjepa"}
    assert [entry["image_filename"] for entry in listed["scenes"]] == [f"val_{i:06d}.png" for i in range(6)]
    for i, entry in enumerate(listed["scenes"]):
        scene = draw_scene(7, "val", i)
        axes, _ = camera_rays(scene, 64)
        ids = trace_scene(scene, 64)[1]
        assert len(entry["objects"]) == len(np.unique(ids)) - 1
        for k, thing in enumerate(entry["objects"]):
            right, up, depth = axes @ (np.array(thing["3d_coords"]) - scene.camera)
            expected = [32 + 32 * right / depth / HALF_VIEW, 32 - 32 * up / depth / HALF_VIEW, depth]
            assert thing["pixel_coords"] == pytest.approx(expected, abs=1e-3)
            column, row = (int(v) for v in thing["pixel_coords"][:2])
            front = ids[row, column]
            assert front == k or scene.depth[front] < depth
        assert scene.depth.min() == pytest.approx(min(thing["pixel_coords"][2] for thing in entry["objects"]))
        with Image.open(tmp_path / "val" / entry["image_filename"]) as picture:
            assert np.array_equal(np.array(picture), render_scene(scene, 64))


def test_every_class_of_both_tasks_is_met():
    drawn = [draw_scene(0, "train", i) for i in range(400)]
    counts = np.bincount([len(scene.shape) for scene in drawn], minlength=11)[3:] / 400
    bins = np.searchsorted([8, 8.5, 9, 9.5, 10, 100], [scene.depth.min() for scene in drawn])
    shares = np.bincount(bins, minlength=6) / 400
    assert len(counts) == 8 and np.abs(counts - 1 / 8).max() < 0.05
    assert len(shares) == 6 and shares.min() > 0.03 and shares.max() < 0.4
    for values in ([scene.shape for scene in drawn], [scene.colour for scene in drawn], [scene.metal for scene in drawn]):
        shares = np.bincount(np.concatenate(values))
        assert shares.min() > 0.75 * shares.mean()


def test_get_scenes_gives_a_source_of_images(small: Path):
    path = get_dataset("scenes")
    assert path == small / "scenes" and [entry.name for entry in small.iterdir()] == ["scenes"]
    train, val = open_source("scenes"), open_source("scenes", "val")
    assert (len(train), len(val)) == (12, 6) and train.classes == ()
    before = {file: file.stat().st_mtime_ns for file in path.rglob("*.png")}
    assert get_dataset("scenes") == path
    assert {file: file.stat().st_mtime_ns for file in path.rglob("*.png")} == before
    with Image.open(get_dataset("scenes-128") / "train" / "train_000003.png") as large:
        assert large.size == (128, 128)


@pytest.mark.parametrize("damage", ["image", "listing", "text"])
def test_damaged_scenes_are_named(small: Path, damage: str):
    path = get_dataset("scenes")
    listing = path / "scenes" / "CLEVR_val_scenes.json"
    {"image": (path / "val" / "val_000002.png").unlink, "listing": listing.unlink,
     "text": lambda: listing.write_text("{")}[damage]()  # fmt: skip
    with pytest.raises(OSError, match=f"{path}: incomplete or damaged; delete it and run: fastjepa data get scenes"):
        get_dataset("scenes")


def test_an_archive_of_scenes_is_refused(small: Path, tmp_path: Path):
    with pytest.raises(UserError, match="scenes are rendered here"):
        get_dataset("scenes", archive=tmp_path / "a.zip")
    assert not list(small.iterdir())


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_a_stopped_rendering_is_never_seen(tmp_path: Path, number: int, code: int):
    command = [sys.executable, "-m", "fastjepa.cli", "data", "get", "scenes"]
    # A shell that starts tests in the background makes them, and what they start, deaf to Ctrl-C.
    hearing = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    environment = os.environ | {"FASTJEPA_DATA": str(tmp_path)}
    process = subprocess.Popen(command, env=environment, start_new_session=True, preexec_fn=hearing)
    while process.poll() is None and len(list(tmp_path.glob(".*.scenes/train/*.png"))) < 20:
        time.sleep(0.05)
    if number == signal.SIGKILL:
        os.killpg(process.pid, number)  # and its workers
    else:
        process.send_signal(number)
    assert process.wait(timeout=60) == code
    assert not (tmp_path / "scenes").exists()
    assert number == signal.SIGKILL or not list(tmp_path.iterdir())
