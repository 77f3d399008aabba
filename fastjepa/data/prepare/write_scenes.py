"""Data sets of rendered scenes: pictures, and the files of labels that go with them, in the words of CLEVR v1.0."""

import json
import os
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from fastjepa.cores import usable_cores
from fastjepa.data.prepare.processes import counting_bar, map_in_processes
from fastjepa.data.prepare.scenes import (
    COLOURS,
    MATERIALS,
    PIXEL_LABELS,
    SHAPES,
    Scene,
    draw_scene,
    label_scene,
    render_scene,
)
from fastjepa.files import atomic_path, require_writable

SPLIT_COUNTS = {"train": 10_000, "val": 2_000}
LABEL_PNG = {"compress_type": zlib.Z_RLE}  # as small as zlib's level 6 on labels, at the time of level 1
SCENES_A_TASK = 50  # pictures that a process renders at a time
KEPT_BYTES = 2**24  # more than a picture's arrays take, whose memory the system would otherwise clear anew for each


@dataclass(frozen=True)
class _SceneFiles:
    """Where the files of a split's scenes go, and what they are drawn from."""

    pictures: Path | None  # None where there are pictures, and only labels are written
    labels: Path  # <kind>/<split>/ lie in it
    size: int
    seed: int
    split: str


def write_scenes(
    folder: Path, size: int, counts: dict[str, int] | None = None, seed: int = 0, workers: int | None = None
) -> None:
    """Render into `folder`: <split>/*.png, labels/<kind>/<split>/*.png, and scenes/CLEVR_<split>_scenes.json.

    Args:
        size: side of the pictures in pixels; the scenes are the same at every size.
        counts: pictures of each split; default: SPLIT_COUNTS.
        workers: processes; default: one a core. Pictures and labels do not depend on it.
    """
    (folder / "scenes").mkdir(parents=True)
    for split, count in (counts or SPLIT_COUNTS).items():
        (folder / split).mkdir()
        files = _SceneFiles(folder / split, folder / "labels", size, seed, split)
        written = _in_processes(f"rendering {split}", files, count, workers)
        info = {"split": split, "size": size, "seed": seed, "renderer": "fastjepa"}
        _listing(folder, split).write_text(json.dumps({"info": info, "scenes": written}))


def write_missing_labels(folder: Path, workers: int | None = None) -> None:
    """Write labels/ beside the whole pictures of an earlier version, which wrote none; it is there whole or not at all.

    Nothing is done where labels/ is there, or pictures are missing. UserError where the folder cannot be written; OSError
    where its scenes are not those that are drawn now.
    """
    final = folder / "labels"
    if final.exists() or not _complete_in(folder, [folder]):
        return
    require_writable(final, folder=True)
    try:
        with atomic_path(final) as labels:
            for split in SPLIT_COUNTS:
                _label_split(folder, labels, split, workers)
    except OSError:
        if not final.exists():  # else another process was first
            raise


def _label_split(folder: Path, labels: Path, split: str, workers: int | None) -> None:
    """Write into `labels` those of the pictures of one split of a data set."""
    found = json.loads(_listing(folder, split).read_text())
    files = _SceneFiles(None, labels, found["info"]["size"], found["info"]["seed"], split)
    drawn = _in_processes(f"labelling {split}", files, len(found["scenes"]), workers)
    if list(map(_geometry, drawn)) != list(map(_geometry, found["scenes"])):
        said = "its scenes are not those that this version draws, so they cannot be labelled"
        raise OSError(f"{folder}: {said}; delete it and run: fastjepa data get {folder.name}")


def _listing(folder: Path, split: str) -> Path:
    """Return the path of a split's scene file."""
    return folder / "scenes" / f"CLEVR_{split}_scenes.json"


def _in_processes(doing: str, files: _SceneFiles, count: int, workers: int | None) -> list[dict]:
    """Write the files of `count` scenes behind a progress bar; return the entries of the scene file."""
    workers = workers or usable_cores()
    chunks, written = [range(start, min(count, start + SCENES_A_TASK)) for start in range(0, count, SCENES_A_TASK)], []
    for kind in PIXEL_LABELS:
        (files.labels / kind / files.split).mkdir(parents=True)
    with counting_bar() as bar:
        task = bar.add_task(doing, total=count)
        for records in map_in_processes(_write_some, files, chunks, workers):
            written += records
            bar.advance(task, len(records))
    return written


def _write_some(files: _SceneFiles, numbers: range) -> list[dict]:
    """Write the pictures and labels with these numbers; return their entries of the scene file."""
    np.empty(KEPT_BYTES, np.uint8)  # freed at once: from then on glibc keeps for reuse all that is smaller
    records = []
    for i in numbers:
        scene, name = draw_scene(files.seed, files.split, i), f"{files.split}_{i:06d}.png"
        if files.pictures:
            Image.fromarray(render_scene(scene, files.size)).save(files.pictures / name, compress_level=1)
        for kind, label in label_scene(scene, files.size).items():
            Image.fromarray(label).save(files.labels / kind / files.split / name, **LABEL_PNG)
        objects = _described(scene, files.size)
        records.append({"split": files.split, "image_index": i, "image_filename": name, "objects": objects})
    return records


def _geometry(entry: dict) -> list:
    """Return what an entry of a scene file says of the labels: numbers that have the same bits on every machine."""
    return [[thing[key] for key in ("shape", "material", "3d_coords", "pixel_coords")] for thing in entry["objects"]]


def _described(scene: Scene, size: int) -> list[dict]:
    """Return the objects as CLEVR's scene files have them; rotation in degrees, pixel_coords are column, row and depth."""
    right, up, depth = scene.project(scene.centre)
    pixels = np.stack([(1 + right) * size / 2, (1 - up) * size / 2, depth], axis=1)
    degrees = np.degrees(np.arctan2(scene.turn[:, 1], scene.turn[:, 0])).round(3)
    looks = zip(scene.shape, scene.large, scene.colour, scene.metal, strict=True)
    return [
        {"shape": SHAPES[shape], "size": "large" if large else "small", "color": list(COLOURS)[colour],
         "material": MATERIALS[int(metal)], "3d_coords": scene.centre[i].tolist(), "rotation": float(degrees[i]),
         "pixel_coords": pixels[i].tolist()}
        for i, (shape, large, colour, metal) in enumerate(looks)
    ]  # fmt: skip


def scenes_complete(folder: Path) -> bool:
    """Return whether `folder` holds what `write_scenes` writes by default."""
    return _complete_in(folder, [folder, *(folder / "labels" / kind for kind in PIXEL_LABELS)])


def _complete_in(folder: Path, places: list[Path]) -> bool:
    """Return whether the scene files of `folder` are whole, and what they name lies below each of the places."""
    try:
        for split, count in SPLIT_COUNTS.items():
            scenes = json.loads(_listing(folder, split).read_text())["scenes"]
            names = {scene["image_filename"] for scene in scenes}
            if len(names) != count or not all(names <= set(os.listdir(place / split)) for place in places):
                return False
    except (OSError, ValueError, KeyError):
        return False
    return True
