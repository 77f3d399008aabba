"""Rendered scenes: the same bits everywhere, true labels of objects and of pixels, a data set whole or not at all."""

import dataclasses
import functools
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from numpy._core._multiarray_umath import __cpu_dispatch__, __cpu_features__
from PIL import Image

from fastjepa.data.prepare import scenes
from fastjepa.data.prepare import write_scenes as write_scenes_module
from fastjepa.data.prepare.catalog import get_dataset
from fastjepa.data.prepare.scenes import (
    AMBIENT,
    BOX,
    COLOURS,
    CYLINDER,
    GROUND,
    HALF_VIEW,
    LOOK,
    MATERIALS,
    OBJECT_GAP,
    PIXEL_LABELS,
    RADII,
    SAMPLES,
    SHAPES,
    SPHERE,
    Scene,
    draw_scene,
    label_scene,
    render_scene,
    trace_scene,
)
from fastjepa.data.prepare.write_scenes import write_scenes
from fastjepa.data.sources import open_source
from fastjepa.errors import UserError

SMALL = {"train": 12, "val": 6}
FIRST = "b7dc5d8e73e76d18"  # how the SHA-256 of the pixels of train_000000.png begins
FIRST_LABELS = {"depth": "bd7f444763911a4c", "object": "404600074f948168", "shape": "0c75feb691abdb08",
                "material": "178e49705274721f", "normal": "d56f8bc69b132f26"}  # fmt: skip


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


def test_the_labels_of_the_first_picture_are_those_they_always_were():
    labels = label_scene(draw_scene(0, "train", 0), 64)
    assert {kind: hashlib.sha256(label.tobytes()).hexdigest()[:16] for kind, label in labels.items()} == FIRST_LABELS


def test_a_picture_and_its_labels_depend_on_seed_split_and_number_alone():
    """Another process, that drew others before, and whose numpy computes with the shortest vectors, gives the same bits."""
    scene = draw_scene(3, "val", 5)
    again = render_scene(scene, 32)
    code = (
        "from fastjepa.data.prepare.scenes import draw_scene, label_scene, render_scene;"
        "[(render_scene(scene, 24), label_scene(scene, 24)) for scene in (draw_scene(3, 'val', i) for i in (9, 4))];"
        "import sys; scene = draw_scene(3, 'val', 5);"
        "[sys.stdout.buffer.write(a.tobytes()) for a in (render_scene(scene, 32), *label_scene(scene, 32).values())]"
    )
    short = {"NPY_DISABLE_CPU_FEATURES": " ".join(name for name in __cpu_dispatch__ if __cpu_features__[name])}
    other = subprocess.run([sys.executable, "-c", code], env=os.environ | short, capture_output=True, check=True).stdout
    assert other == b"".join(a.tobytes() for a in (again, *label_scene(scene, 32).values()))
    for key in ((4, "val", 5), (3, "train", 5), (3, "val", 6)):
        assert not np.array_equal(render_scene(draw_scene(*key), 32), again)


def test_files_do_not_depend_on_workers_or_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    found = []
    for workers, chunk in ((1, 50), (2, 5)):
        monkeypatch.setattr(write_scenes_module, "SCENES_A_TASK", chunk)
        root = tmp_path / f"{workers}"
        write_scenes(root, 32, SMALL, workers=workers)
        found.append({str(file.relative_to(root)): file.read_bytes() for file in sorted(root.rglob("*.*"))})
    assert len(found[0]) == 18 * (1 + len(PIXEL_LABELS)) + 2 and found[0] == found[1]


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


@pytest.mark.parametrize("i", range(3))
def test_a_recoloured_object_changes_the_pixels_of_its_label(i: int, monkeypatch: pytest.MonkeyPatch):
    """With the one ray through its middle a pixel changes exactly where the label is the object; with all, no less."""
    scene, size = draw_scene(4, "train", i), 48
    blue, yellow = (list(COLOURS).index(name) for name in ("blue", "yellow"))
    matte = dataclasses.replace(scene, metal=np.zeros_like(scene.metal), colour=np.full_like(scene.colour, blue))
    label = label_scene(matte, size)["object"]
    for rays in (1, SAMPLES):
        monkeypatch.setattr(scenes, "SAMPLES", rays)
        before = render_scene(matte, size)
        for k in range(len(scene.shape)):
            repainted = dataclasses.replace(matte, colour=np.where(np.arange(len(scene.shape)) == k, yellow, blue))
            changed = (render_scene(repainted, size) != before).any(axis=2)
            assert (changed == (label == k + 1)).all() if rays == 1 else changed[label == k + 1].all()


def test_labels_are_those_of_the_middle_one_of_a_pixels_rays():
    for i in range(3):
        scene = draw_scene(4, "val", i)
        depth, ids, _ = trace_scene(scene, 64 * SAMPLES)
        labels, middle = label_scene(scene, 64), np.s_[SAMPLES // 2 :: SAMPLES, SAMPLES // 2 :: SAMPLES]
        assert (labels["object"] == ids[middle] + 1).mean() > 0.999  # a ray along an edge may round to either side
        same = labels["object"] == ids[middle] + 1
        assert np.abs(labels["depth"] / 1000 - depth[middle])[same].max() < 0.002
        assert np.array_equal(labels["shape"], np.array([0, *(scene.shape + 1)])[labels["object"]])
        assert np.array_equal(labels["material"], np.array([0, *(scene.metal + 1)])[labels["object"]])


def test_the_depth_and_the_normal_of_the_plane_are_those_of_its_equation():
    for i in range(3):
        scene = draw_scene(5, "train", i)
        axes, rays = camera_rays(scene, 32)
        labels = label_scene(scene, 32)
        plane = labels["object"] == 0
        expected = scene.camera[2] / -rays[..., 2]  # z = 0 at camera + depth * ray
        assert np.abs(labels["depth"] / 1000 - expected)[plane].max() < 0.0006
        up = np.round(255 * (axes @ [0, 0, 1] * [1, 1, -1] + 1) / 2)  # right, up, towards the camera
        assert np.abs(labels["normal"][plane] - up)[:, 1:].max() == 0
        assert set(labels["normal"][plane][:, 0]) == {128}  # which rounds 127.5


@pytest.mark.parametrize("i", range(3))
def test_normals_are_those_of_the_surface_that_the_depth_gives(i: int):
    """The cross product of the differences, along a column and a row, of the points that the depths stand for."""
    scene, size = draw_scene(6, "train", i), 256
    labels = label_scene(scene, size)
    step = ((np.arange(size) + 0.5) / size * 2 - 1) * HALF_VIEW
    across, down = np.meshgrid(step, step)
    rays = np.stack([across, -down, -np.ones_like(across)], axis=2)  # right, up, towards the camera
    normal = labels["normal"] / 255.0 * 2 - 1
    assert np.abs(np.linalg.norm(normal, axis=2) - 1).max() < 0.008  # half a step of 2 / 255 in each coordinate
    normal /= np.linalg.norm(normal, axis=2, keepdims=True)
    points = labels["depth"][..., None] / 1000 * rays
    along_row, along_column = points[1:-1, 2:] - points[1:-1, :-2], points[2:, 1:-1] - points[:-2, 1:-1]
    measured = np.cross(along_column, along_row)  # down x right is towards the camera
    measured /= np.linalg.norm(measured, axis=2, keepdims=True)
    centre, smooth = normal[1:-1, 1:-1], np.ones((size - 2, size - 2), bool)
    for beside in (np.s_[:-2, 1:-1], np.s_[2:, 1:-1], np.s_[1:-1, :-2], np.s_[1:-1, 2:]):
        smooth &= labels["object"][beside] == labels["object"][1:-1, 1:-1]
        smooth &= (normal[beside] * centre).sum(axis=2) > 0.98  # no edge of a solid, no outline of a ball
    degrees = np.degrees(np.arccos(np.clip((measured * centre).sum(axis=2), -1, 1)))
    for shape in np.unique(labels["shape"]):
        here = smooth & (labels["shape"][1:-1, 1:-1] == shape)
        assert here.sum() > 20 and np.median(degrees[here]) < 1 and degrees[here].max() < 6
    assert ((normal * rays).sum(axis=2) < 0.02).all()  # each faces the camera


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
        stored = {}
        for kind, label in label_scene(scene, 64).items():
            with Image.open(tmp_path / "labels" / kind / "val" / entry["image_filename"]) as picture:
                assert picture.mode == {"depth": "I;16", "normal": "RGB"}.get(kind, "L")
                stored[kind] = np.array(picture)
            assert np.array_equal(stored[kind], label) and stored[kind].dtype == label.dtype
        for k, thing in enumerate(entry["objects"]):
            own = stored["object"] == k + 1
            assert set(stored["shape"][own]) == {1 + SHAPES.index(thing["shape"])}
            assert set(stored["material"][own]) == {1 + MATERIALS.index(thing["material"])}


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
    assert [train.name(i) for i in range(12)] == [str(path / "train" / f"train_{i:06d}.png") for i in range(12)]
    before = {file: file.stat().st_mtime_ns for file in path.rglob("*.png")}
    assert get_dataset("scenes") == path
    assert {file: file.stat().st_mtime_ns for file in path.rglob("*.png")} == before
    with Image.open(get_dataset("scenes-128") / "train" / "train_000003.png") as large:
        assert large.size == (128, 128)


def test_scenes_of_an_earlier_version_get_their_labels(small: Path):
    path = get_dataset("scenes")
    before = {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in path.rglob("*.*")}
    shutil.rmtree(path / "labels")
    assert get_dataset("scenes") == path
    assert {file: file.read_bytes() for file in path.rglob("*.*")} == {file: content for file, (_, content) in before.items()}
    for split in SMALL:
        assert all(file.stat().st_mtime_ns == before[file][0] for file in (path / split).iterdir())


def test_scenes_that_are_drawn_otherwise_now_get_no_labels(small: Path):
    path = get_dataset("scenes")
    shutil.rmtree(path / "labels")
    listing = path / "scenes" / "CLEVR_val_scenes.json"
    found = json.loads(listing.read_text())
    found["scenes"][2]["objects"][0]["3d_coords"][0] += 0.01
    listing.write_text(json.dumps(found))
    with pytest.raises(OSError, match=f"{path}: its scenes are not those .*; delete it and run: fastjepa data get scenes"):
        get_dataset("scenes")
    assert sorted(entry.name for entry in path.iterdir()) == ["scenes", "train", "val"]


@pytest.mark.parametrize("damage", ["image", "label", "listing", "text"])
def test_damaged_scenes_are_named(small: Path, damage: str):
    path = get_dataset("scenes")
    listing = path / "scenes" / "CLEVR_val_scenes.json"
    {"image": (path / "val" / "val_000002.png").unlink, "label": (path / "labels/depth/val/val_000002.png").unlink,
     "listing": listing.unlink,
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
