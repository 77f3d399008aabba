"""`fastjepa eval dense` on folders of pictures and label images: files, refusals, features, table, report and pictures."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastjepa.cli.main import main
from fastjepa.data.pixels import normalise_pixels
from fastjepa.errors import UserError
from fastjepa.evals.dense.labels import fitted_labels, paired_pictures, read_label
from fastjepa.evals.dense.patches import layer_patches, raw_patches
from fastjepa.evals.dense.table import DENSE_PROTOCOLS, DenseOptions, labels_of_splits, open_dense_splits
from fastjepa.evals.dense.tasks import Depth, Segmentation
from fastjepa.evals.inputs import Split, open_subject
from fastjepa.evals.patch_features import kept_patches
from fastjepa.evals.request import EvalRequest
from fastjepa.report.page import render_page
from fastjepa.visualize.dense import class_colours, depth_colours
from tests.support.evals import write_run

COUNTS = {"train": 24, "val": 8}
SIDE = 16
QUICK = ["--steps", "30", "--k", "3", "--bank", "200", "--device", "cpu"]


def write_scenes_like(root: Path) -> Path:
    """Grey pictures of a bright square on dark ground, laid out as rendered scenes are, with all their label images."""
    random = np.random.default_rng(0)
    for split, count in COUNTS.items():
        for i in range(count):
            shape = np.zeros((SIDE, SIDE), np.uint8)
            top, left = random.integers(0, SIDE - 6, 2)
            shape[top : top + 6, left : left + 6] = 1 + i % 3
            normal = np.where(shape[..., None] > 0, (128, 128, 255), (128, 255, 128)).astype(np.uint8)
            pixels = (40 + 60 * shape + random.integers(0, 20, shape.shape)).astype(np.uint8)
            depth = np.where(shape > 0, 5000, 9000).astype(np.uint16)
            for folder, image in ((root / "images", pixels), (root / "labels/shape", shape), (root / "labels/depth", depth),
                                  (root / "labels/normal", normal)):  # fmt: skip
                (folder / split).mkdir(parents=True, exist_ok=True)
                Image.fromarray(image).save(folder / split / f"{i:03d}.png")
    return root


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scenes_like(tmp_path_factory.mktemp("scenes"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("dense") / "run")


def opened(root: Path, **options) -> tuple[Split, Split]:
    pictures, labels = ((root / name / "train", root / name / "val") for name in ("images", "labels/shape"))
    options = {"task": "segmentation", "images": pictures, "labels": labels} | options
    return open_dense_splits(EvalRequest("unused", None), DenseOptions(**options))


def test_a_palettes_numbers_are_read_and_not_its_colours(tmp_path: Path):
    numbers = np.array([[0, 5, 20], [255, 1, 0]], np.uint8)
    image = Image.fromarray(numbers, mode="P")
    image.putpalette([value for i in range(256) for value in (i * 7 % 256, i * 11 % 256, i * 13 % 256)])
    image.save(tmp_path / "voc.png")
    assert np.array_equal(read_label(tmp_path / "voc.png", 1), numbers)
    deep = np.array([[0, 300, 65535]], np.uint16)
    Image.fromarray(deep).save(tmp_path / "depth.png")
    assert np.array_equal(read_label(tmp_path / "depth.png", 1), deep)
    assert Depth(1000).truth(read_label(tmp_path / "depth.png", 1)[None]).flatten().tolist() == pytest.approx([0, 0.3, 65.535])


def test_classes_count_from_1_where_0_is_ignored():
    """As ADE20K's: 0 is what no class is of, 1 to 150 are the classes."""
    protocol = DENSE_PROTOCOLS["ade20k"]
    task = Segmentation(protocol.classes, protocol.ignored)
    stored = np.array([[0, 1, 150]], np.uint8)
    task.check(stored, Path("a.png"))
    assert task.truth(stored).tolist() == [[-1, 0, 149]]
    assert Segmentation(21, 255).truth(np.array([[0, 20, 255]], np.uint8)).tolist() == [[0, 20, -1]]


def test_labels_are_brought_to_a_size_without_blending():
    stored = np.arange(12, dtype=np.uint16).reshape(3, 4)
    assert fitted_labels([stored], (3, 4))[0].tolist() == stored.tolist()
    assert fitted_labels([stored], (1, 2))[0].tolist() == [[5, 7]]  # centres at row 1.5 of 3, columns 1 and 3 of 4
    assert fitted_labels([stored], (6, 4))[0].tolist() == stored.repeat(2, axis=0).tolist()


def test_a_list_chooses_pictures(scenes: Path, tmp_path: Path):
    (tmp_path / "list.txt").write_text("003\n001.png\n\n")
    found = paired_pictures(scenes / "images/train", scenes / "labels/shape/train", tmp_path / "list.txt")
    assert [Path(found.name(i)).name for i in range(len(found))] == ["003.png", "001.png"]
    assert [file.parent.parent.name for file in found.label_files] == ["shape", "shape"]


def spoil(root: Path, name: str, edit) -> None:
    """Change a label image of the test pictures."""
    file = root / "labels/shape/val" / f"{name}.png"
    pixels = edit(np.array(Image.open(file)))
    file.unlink()
    if pixels is not None:
        Image.fromarray(pixels).save(file)


@pytest.mark.parametrize(
    "edit, sentence",
    [
        (lambda root: spoil(root, "002", lambda pixels: None), r"val/002.png: has no label image \(.*shape/val/002.png\); add"),
        (lambda root: spoil(root, "002", lambda pixels: pixels[:9]), "002.png: is of 16x9 pixels, and .*002.png of 16x16;"),
        (
            lambda root: spoil(root, "002", lambda pixels: pixels + 4),
            "002.png: label 4 is none of the 4 classes, 0 to 3, and no n",
        ),
        (lambda root: spoil(root, "002", lambda pixels: np.stack([pixels] * 3, 2)), "002.png: holds RGB pixels, .* convert it"),
        (lambda root: (root / "labels/shape/val/002.png").write_bytes(b"no"), "002.png: cannot be read as a label image"),
        (lambda root: shutil.rmtree(root / "labels/shape/val"), "shape/val: no such directory; name folders"),
    ],
)
def test_a_mistake_in_the_files_is_named(scenes: Path, tmp_path: Path, edit, sentence: str):
    root = shutil.copytree(scenes, tmp_path / "copy")
    edit(root)
    with pytest.raises(UserError, match=sentence) as said:
        labels_of_splits(opened(root), DenseOptions("segmentation", images=(root, root), classes=None))
    assert "\n" not in str(said.value)


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"images": None, "labels": None}, "say where the pictures are: --data scenes"),
        ({"label_kind": "shape"}, "--label-kind is for rendered scenes"),
        ({"protocol": "voc", "classes": 3}, "--protocol voc says classes and ignored number"),
        ({"task": "depth", "ignore_index": 255}, "are for segmentation, not depth"),
        ({"depth_scale": 5.0}, "--depth-scale is for depth, not segmentation"),
        ({"classes": 1}, "1 classes: segmentation needs at least two"),
    ],
)
def test_options_that_do_not_fit_together_are_refused(scenes: Path, options: dict, sentence: str):
    with pytest.raises(UserError, match=sentence):
        labels_of_splits(opened(scenes, **options), DenseOptions(**{"task": "segmentation"} | options))


def test_features_are_those_of_the_blocks_named_and_of_the_pixels(scenes: Path, run: Path):
    subject, (split, _) = open_subject(run, "cpu", cache=False), opened(scenes)
    pictures = torch.stack([torch.from_numpy(np.array(Image.open(split.source.name(i)))) for i in range(5)])[:, None]
    images, encoder = normalise_pixels(pictures, subject.config.mean_std), subject.encoder("context")
    outputs = encoder(images, layers=(1, 2))
    expected = torch.cat([encoder.norm(x).view(5, 16, 32) for x in outputs], dim=2)
    for layers, wanted in (((2, 1), expected), (None, encoder.features(images)), ((2,), expected[..., 32:])):
        (found,) = kept_patches(subject, layer_patches(subject, "context", layers, split), split)(torch.arange(5), 5, "x")
        assert torch.equal(found, wanted.bfloat16())
    (found,) = kept_patches(subject, raw_patches(subject), split)(torch.arange(5), 5, "x")
    cut = images.view(5, 4, 4, 4, 4).permute(0, 1, 3, 2, 4).reshape(5, 16, 16)
    assert torch.equal(found, cut.bfloat16())
    with pytest.raises(UserError, match="--layers 3: the encoder has 2 blocks"):
        layer_patches(subject, "context", (1, 3), split)


def test_tables_pictures_and_the_report(scenes: Path, run: Path, capsys):
    """Both layouts, all tasks; dense.json keeps the latest table of each task."""
    common = ["eval", "dense", "--checkpoint", str(run), *QUICK]
    for task in ("segmentation", "depth", "normals"):
        assert main([*common, "--data", str(scenes), "--task", task, "--json", "--pictures", "--shown", "2"]) in (None, 0)
        table = json.loads(capsys.readouterr().out)
        assert list(table["rows"]) == ["raw patches", "random encoder", "context encoder", "target encoder"]
        assert Image.open(run / "pictures" / f"dense-{task}.png").size[0] > 10 * 128
        kept = json.loads((run / "dense.json").read_text())
        assert kept[task]["rows"] == table["rows"] and table["n_test"] == COUNTS["val"] and table["step"] == 3
        for row in table["rows"].values():
            for scores in (row["knn"], row["linear"]):
                assert all(one["ci95"][0] <= one["value"] <= one["ci95"][1] for one in scores.values())
    assert kept.keys() == {"segmentation", "depth", "normals"}
    said = render_page([run])
    for words in (
        "segmentation of pixels, last layer",
        "k-NN: mIoU, %",
        "linear: RMSE",
        "Depth of pixels",
        "mean angle, degrees",
    ):
        assert words in said
    made = len(list((run / "features").glob("*.tokens.npy")))
    assert made == 8  # train and test of four rows, which all tasks share


def test_folders_and_several_layers(scenes: Path, run: Path, capsys):
    folders = ["--images", scenes / "images/train", scenes / "images/val", "--labels", scenes / "labels/shape/train"]
    words = [*folders, scenes / "labels/shape/val", "--task", "segmentation", "--layers", "1,2", "--encoder", "random"]
    assert main(["eval", "dense", "--checkpoint", str(run), *QUICK, "--no-cache", *map(str, words)]) in (None, 0)
    said = capsys.readouterr()
    assert "layers 1, 2" in said.out and "4 classes in the training label images" in " ".join(said.err.split())
    assert "random encoder: 64 features a patch, 16 patches" in said.err and "target" not in said.out


def test_pictures_are_painted_by_the_truths_range_and_grey_where_nothing_is_known():
    depth = depth_colours(np.array([[[0.0, 2.0], [4.0, 3.0]]]))(np.array([[[9.0, 2.0], [9.0, 3.0]]]))
    assert (
        depth[0, 0].tolist() == [200] * 3 and depth[0, 1].tolist() == [253, 231, 100] and depth[1, 0].tolist() == [40, 20, 90]
    )
    classes = class_colours(np.array([[-1, 0]]))(np.array([[1, 9]]))
    assert classes[0, 0].tolist() == [200] * 3 and classes[0, 1].tolist() == [138, 95, 0]  # class 1's colour, darker
