"""Data sets of rendered scenes: pictures, and the files of labels that go with them, in the words of CLEVR v1.0."""

import json
import os
from pathlib import Path

import numpy as np
from PIL import Image

from fastjepa.data.prepare.processes import counting_bar, map_in_processes
from fastjepa.data.prepare.scenes import COLOURS, MATERIALS, SHAPES, Scene, draw_scene, render_scene

SPLIT_COUNTS = {"train": 10_000, "val": 2_000}
SCENES_A_TASK = 50  # pictures that a process renders at a time


def write_scenes(
    folder: Path, size: int, counts: dict[str, int] | None = None, seed: int = 0, workers: int | None = None
) -> None:
    """Render into `folder`: <split>/*.png, and scenes/CLEVR_<split>_scenes.json.

    Args:
        size: side of the pictures in pixels; the scenes are the same at every size.
        counts: pictures of each split; default: SPLIT_COUNTS.
        workers: processes; default: one a core. Pictures and labels do not depend on it.
    """
    workers = workers or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    (folder / "scenes").mkdir(parents=True)
    for split, count in (counts or SPLIT_COUNTS).items():
        (folder / split).mkdir()
        chunks, written = [range(start, min(count, start + SCENES_A_TASK)) for start in range(0, count, SCENES_A_TASK)], []
        with counting_bar() as bar:
            task = bar.add_task(f"rendering {split}", total=count)
            for records in map_in_processes(_write_some, (folder / split, size, seed, split), chunks, workers):
                written += records
                bar.advance(task, len(records))
        info = {"split": split, "size": size, "seed": seed, "renderer": "fastjepa"}
        (folder / "scenes" / f"CLEVR_{split}_scenes.json").write_text(json.dumps({"info": info, "scenes": written}))


def _write_some(job: tuple[Path, int, int, str], numbers: range) -> list[dict]:
    """Render and write the pictures with these numbers; return their entries of the scene file."""
    folder, size, seed, split = job
    records = []
    for i in numbers:
        scene, name = draw_scene(seed, split, i), f"{split}_{i:06d}.png"
        Image.fromarray(render_scene(scene, size)).save(folder / name, compress_level=1)
        objects = _described(scene, size)
        records.append({"split": split, "image_index": i, "image_filename": name, "objects": objects})
    return records


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
    try:
        for split, count in SPLIT_COUNTS.items():
            scenes = json.loads((folder / "scenes" / f"CLEVR_{split}_scenes.json").read_text())["scenes"]
            names = {scene["image_filename"] for scene in scenes}
            if len(names) != count or not names <= set(os.listdir(folder / split)):
                return False
    except (OSError, ValueError, KeyError):
        return False
    return True
