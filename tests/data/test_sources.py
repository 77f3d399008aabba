"""The formats people have: ImageNet's layout, Hugging Face's Parquet files, odd folders; and a sentence for the rest."""

import io
import json
import logging
import pickle
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from fastjepa.data.decode_pillow import decode_image
from fastjepa.data.sources import open_source
from fastjepa.errors import UserError
from fastjepa.evals.inputs import open_splits
from tests.support.batches import load, same_batch, settings
from tests.support.images import pack_shard, save_image


def png(seed: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def write_parquet(path: Path, images: list, labels=None, names=(), column="image", group=4, **columns) -> None:
    """As `datasets` writes a split: images as {bytes, path}, labels as integers that the schema's metadata names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = {column: [image if isinstance(image, bytes) else {"bytes": image and image[0], "path": "x.png"} for image in images]}
    made = pa.table(rows | ({"label": pa.array(labels, pa.int64())} if labels is not None else {}) | columns)
    features = {"label": {"names": list(names), "_type": "ClassLabel"}} if names else {}
    parquet.write_table(
        made.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})}), path, row_group_size=group
    )


def test_imagenet_layout_serves_pretraining_and_probing(tmp_path: Path):
    synsets = ("n01440764", "n01443537", "n01484850")
    for split, count in (("train", 4), ("val", 2)):
        for s, synset in enumerate(synsets):
            for i in range(count):
                save_image(tmp_path / split / synset / f"{synset}_{i}.JPEG", seed=10 * s + i)
    assert len(load(settings(tmp_path), range(3))) == 3
    train, test = open_splits(str(tmp_path), None, None, 0)
    assert (len(train.source), len(test.source)) == (12, 6)
    assert train.source.classes == test.source.classes == synsets
    assert [test.source.label(i) for i in range(6)] == [0, 0, 1, 1, 2, 2]


def test_every_kind_that_pillow_writes_and_reads_is_an_image(tmp_path: Path):
    """Each is found in a folder and in a tar, and decodes; MPO and its like are among them."""
    pixels, written = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)), {}
    for ending in {".jfif", ".JPE", ".avif", ".mpo", ".tga", ".jp2", ".j2k", ".apng", ".dib", ".ico", ".pcx", ".sgi", ".qoi",
                   ".pnm", ".pbm", ".msp", ".xbm", ".im", ".dds", ".bw", ".tiff", ".bmp", ".gif", ".webp"}:  # fmt: skip
        stream, kind = io.BytesIO(), Image.registered_extensions()[ending.lower()]
        (pixels.convert("1") if ending in (".msp", ".xbm", ".pbm") else pixels).save(stream, kind)
        written[f"a{len(written)}{ending}"] = stream.getvalue()
    for name, raw in written.items():
        (tmp_path / name).write_bytes(raw)
    (tmp_path / "tar").mkdir()
    pack_shard(tmp_path / "tar" / "0.tar", written)
    for source in (open_source(tmp_path), open_source(tmp_path / "tar" / "0.tar")):
        assert sorted(source.name(i).rpartition("/")[2] for i in range(len(source))) == sorted(written)
        assert all(decode_image(source.read(i), 3).shape[0] == 3 for i in range(len(source)))


def test_files_of_other_kinds_are_counted_in_one_line(tmp_path: Path, caplog):
    names = [
        "a/1.png",
        "b/2.JPG",
        *(f"a/{i}.x" for i in range(17)),
        "b/list.TXT",
        "b/list.txt",
        "a/README",
        ".hidden",
        "a/.DS_Store",
    ]
    for name in [*names, "a/set.h5", "b/film.mpg"]:
        save_image(tmp_path / "a" / "1.png", 0)
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert len(open_source(tmp_path)) == 2
    (line,) = [record.getMessage() for record in caplog.records]
    head, _, kinds = line.partition("passed over ")
    assert head == f"{tmp_path}: 22 files of other kinds " and kinds.startswith("(.x 17, .txt 2, ")
    assert {"no ending 1", ".h5 1", ".mpg 1"} <= set(kinds.strip("()").split(", "))
    caplog.clear()
    for i in range(12):
        (tmp_path / f"a/z.k{i}").touch()
    open_source(tmp_path)
    assert "passed over (.x 17, .txt 2" in caplog.text and caplog.text.strip().endswith("9 kinds more)")


TAR_NAMES = {  # the names in a tar, the labels of the images among them, and what the line says
    "more dots": (
        ["img.v2.0001.jpg", "img.v2.0001.cls", "img.v2.0002.JPEG", "img.v2.0002.cls"],
        {"img.v2.0001.jpg": 1, "img.v2.0002.JPEG": 3},
        "",
    ),
    "a field's name": (
        ["0001.input.jpg", "0001.cls", "a.b/0002.input.png", "a.b/0002.cls"],
        {"0001.input.jpg": 1, "a.b/0002.input.png": 3},
        "",
    ),
    "a mask beside": (
        ["0001.jpg", "0001.mask.png", "0001.json", "0002.jpg", "0002.Mask.png"],
        {"0001.jpg": None, "0002.jpg": None},
        "2 files of other kinds passed over (.mask.png 2)",
    ),
    "strangers": (
        ["0001.jpg", "0001.txt", "0002.txt", "LICENSE", "._0001.jpg", ".x"],
        {"0001.jpg": None},
        "2 files of other kinds passed over (.txt 1, no ending 1)",
    ),
    "dotted folders": (
        ["v1.0/a.1.png", "v1.0/a.2.png", "v1.1/a.png"],
        {"v1.0/a.1.png": None, "v1.0/a.2.png": None, "v1.1/a.png": None},
        "",
    ),
}


@pytest.mark.parametrize("names", TAR_NAMES)
def test_names_in_a_tar(names: str, tmp_path: Path, caplog):
    members, images, says = TAR_NAMES[names]
    pack_shard(
        tmp_path / "0.tar", {name: str(i).encode() if name.endswith(".cls") else png(i) for i, name in enumerate(members)}
    )
    source = open_source(tmp_path / "0.tar")
    assert {source.name(i).partition(".tar/")[2]: source.label(i) for i in range(len(source))} == images
    assert [record.getMessage() for record in caplog.records] == ([f"{tmp_path}/0.tar: {says}"] if says else [])


def test_parquet_equals_the_images_it_was_made_of(tmp_path: Path):
    tmp_path = tmp_path / "set"
    images, names = [png(i) for i in range(11)], ("cat", "dog", "emu")
    for number, part in enumerate((range(0, 6), range(6, 11))):
        write_parquet(tmp_path / "data" / f"train-0000{number}-of-00002.parquet", [(images[i],) for i in part],
                      [i % 3 for i in part], names)  # fmt: skip
    write_parquet(tmp_path / "data" / "validation-00000-of-00001.parquet", [(images[3],)], [1], names)
    source, val = open_source(tmp_path), open_source(tmp_path, "val")
    order = np.random.default_rng(0).permutation(11).tolist()
    assert [source.read(i) for i in order] == [images[i] for i in order]
    assert [source.label(i) for i in range(11)] == [i % 3 for i in range(11)] and source.classes == names
    assert source.name(7) == str(tmp_path / "data" / "train-00001-of-00002.parquet[1]")
    assert len(val) == len(open_source(tmp_path, "test")) == 1 and val.read(0) == images[3]
    assert pickle.loads(pickle.dumps(source)).read(9) == images[9]
    one = open_source(tmp_path / "data" / "train-00001-of-00002.parquet")
    assert len(one) == 5 and len(open_source(f"{tmp_path}/data/train-*.parquet")) == 11
    for i, image in enumerate(images):
        save_image(tmp_path.with_name("as-files") / f"{i:02d}.png", seed=i).write_bytes(image)
    from_files = load(settings(tmp_path.with_name("as-files")), range(4))
    pairs = zip(from_files, load(settings(tmp_path, num_workers=2), range(4)), strict=True)
    assert all(same_batch(a[0], b[0]) for a, b in pairs)


def test_parquet_columns_of_plain_bytes_by_any_name(tmp_path: Path):
    images = [png(i) for i in range(3)]
    write_parquet(tmp_path / "a.parquet", images, [0, 4, 2], column="photo", size=[1, 2, 3])
    source = open_source(tmp_path)
    assert [source.read(i) for i in range(3)] == images
    assert [source.label(i) for i in range(3)] == [0, 4, 2] and source.classes == ("0", "1", "2", "3", "4")


@pytest.mark.parametrize("labels", [None, [-1, -1, -1]])
def test_parquet_without_labels_has_no_classes(tmp_path: Path, labels):
    write_parquet(tmp_path / "train.parquet", [png(i) for i in range(3)], labels, names=("a", "b"))
    source = open_source(tmp_path)
    assert (source.classes, source.label(0)) == ((), None)


def test_parquet_splits_that_lie_in_folders(tmp_path: Path):
    for split, count in (("train", 3), ("val", 2)):
        write_parquet(tmp_path / split / "0000.parquet", [png(i) for i in range(count)])
    assert [len(open_source(tmp_path, split)) for split in ("train", "val", "test")] == [3, 2, 2]


def test_a_parquet_row_without_bytes_is_a_bad_image(tmp_path: Path):
    write_parquet(tmp_path / "train.parquet", [(png(0),), (None,), *((png(i),) for i in range(6))])
    with pytest.raises(OSError, match=r"train.parquet\[1\]: a row without bytes"):
        open_source(tmp_path).read(1)
    met = {path for step in load(settings(tmp_path, max_bad=1), range(4)) for batch in step for path in batch.bad}
    assert met == {str(tmp_path / "train.parquet[1]")}


def test_a_damaged_row_group_is_an_os_error(tmp_path: Path):
    file = tmp_path / "train.parquet"
    write_parquet(file, [png(i) for i in range(8)])
    with open(file, "r+b") as opened:
        opened.write(b"PAR1" + b"\xff" * 200)
    source = open_source(tmp_path)
    with pytest.raises(OSError, match="train.parquet: row group 0 cannot be read"):
        source.read(0)
    assert source.read(7) == png(7)


@pytest.mark.parametrize(
    "columns, message",
    [
        ({"image2": [b"x"]}, "which of the columns photo, image2 holds the images"),
        ({"label": [7]}, "label 7 has no name among its 2 classes"),
    ],
)
def test_parquet_that_cannot_be_understood_is_named(tmp_path: Path, columns, message):
    write_parquet(tmp_path / "a.parquet", [png(0)], names=("a", "b"), column="photo", **columns)
    with pytest.raises(UserError, match=message):
        open_source(tmp_path)


def test_parquet_files_that_disagree_or_are_none_are_named(tmp_path: Path):
    write_parquet(tmp_path / "a.parquet", [png(0)])
    write_parquet(tmp_path / "b.parquet", [(png(0),)])
    with pytest.raises(UserError, match=r"b.parquet: other columns than .*a.parquet"):
        open_source(tmp_path)
    (tmp_path / "b.parquet").write_text("x" * 100)
    with pytest.raises(UserError, match="b.parquet: not a whole Parquet file"):
        open_source(tmp_path)
    (tmp_path / "b.parquet").unlink()
    with pytest.raises(UserError, match="has no test split"):
        open_source(tmp_path, "test")
    (tmp_path / "a.parquet").rename(tmp_path / "train.parquet")
    with pytest.raises(UserError, match=r"has no val split; name its files val-\*.parquet"):
        open_source(tmp_path, "val")


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch):
    write_parquet(tmp_path / "a.parquet", [png(0)])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"pip install 'fastjepa\[pyarrow\]'"):
        open_source(tmp_path)


def test_links_to_a_folder_above_end(tmp_path: Path, caplog):
    for name in ("a", "b"):
        save_image(tmp_path / "set" / name / "0.png", seed=1)
    (tmp_path / "set" / "a" / "up").symlink_to("..")
    (tmp_path / "set" / "b" / "across").symlink_to("../a")  # no loop: the same images once more
    (tmp_path / "set" / "a" / "itself").symlink_to("itself")
    with caplog.at_level(logging.WARNING):
        names = [open_source(tmp_path / "set").name(i) for i in range(3)]
    assert [Path(name).relative_to(tmp_path / "set").as_posix() for name in names] == ["a/0.png", "b/0.png", "b/across/0.png"]
    assert len(open_source(tmp_path / "set")) == 3
    assert "set/a/up: passed over, a link to a folder it lies in" in caplog.text


def test_names_with_spaces_letters_and_brackets(tmp_path: Path):
    root = tmp_path / "a [1] *"
    for name in ("été à la mer.png", "雪.png", "a  b.png"):
        save_image(root / name, seed=1)
    assert {Path(open_source(root).name(i)).name for i in range(3)} == {"été à la mer.png", "雪.png", "a  b.png"}


def test_an_empty_folder_names_the_formats(tmp_path: Path):
    with pytest.raises(UserError, match=r"\.tar shards, \*\.parquet files .*, or MNIST-style idx files"):
        open_source(tmp_path)
