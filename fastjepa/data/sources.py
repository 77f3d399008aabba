"""Sources of images: a folder, tar shards, Parquet files, idx files. They know files and labels, and nothing of order.

A source is a numbered set of images with five parts:

- `len(source)`, how many there are;
- `read(i)`, the bytes of an encoded file, or pixels (H, W) or (H, W, 3) uint8; OSError where it cannot be read;
- `name(i)`, where image i lies;
- `label(i)`, an int, or None without labels;
- `classes`, the names of the labels, () without labels.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from fastjepa.data.contents import (
    Kind,
    Source,
    choose_kind,
    count_images,
    image_tables,
    kind_of,
    shards_among,
    still_packed,
    tell_beside,
    tell_others,
)
from fastjepa.data.endings import PACKED_ENDINGS, UNPACK, files_with
from fastjepa.data.idx_files import IdxPair, holds_idx
from fastjepa.data.image_folder import ImageFolder
from fastjepa.data.parquet import ParquetImages, nested_tables, tables_below
from fastjepa.data.patterns import BRACES, files_named
from fastjepa.data.prepare.catalog import DATASETS, closest_dataset, find_dataset
from fastjepa.data.remote_files import is_remote
from fastjepa.data.remote_shards import RemoteShards, open_directory, open_tars
from fastjepa.data.splits import (
    acceptable_splits,
    folders_in,
    only_train,
    split_chosen,
    split_files,
    split_folder,
    splits_of,
    warn_of_splits,
)
from fastjepa.data.tar_shards import SHARDS_PLAN, open_shards, read_manifest, tars_in
from fastjepa.errors import ConfigError, UserError


def open_source(source: str | Path, split: str = "train", stand_in: bool = True) -> Source:
    """Open a data set by catalog name, directory, .tar shard, .parquet file, a glob or braces of either, or an address.

    A directory holds images at any depth, with or without class folders; *.tar shards; *.parquet files, in it or in its
    data/; or MNIST-style idx files. Where several of them lie, the largest is the data set if the others are strays. One with
    train/ beside val/ or test/ (ImageNet's layout, by the names of `SPLIT_NAMES`) is split by them, tars and Parquet files by
    the split that their names say; any other is all train. An address, https:// or s3://, is that of a directory that
    `fastjepa data shard` wrote, or of tars by braces, shard-{000000..000009}.tar.

    Args:
        source: the data set; a config's is its data.address.
        split: "train", "val" or "test".
        stand_in: val and test stand in for each other; else SplitError where there is no such split.

    UserError, naming the path and the remedy, when there is nothing to read; ConfigError when it is "".
    """
    where = os.path.expanduser(source)
    if not where:
        raise ConfigError(f"data.source is not set; give a directory, or one of: {', '.join(DATASETS)}")
    opened = _open(where, acceptable_splits(split, stand_in))
    if split == "train":
        warn_of_splits(where, opened.classes)
    return opened


def _open(where: str, splits: Sequence[str]) -> Source:
    if is_remote(where):
        return _open_remote(where, splits)
    if where in DATASETS:
        return _open_directory(find_dataset(where), splits, DATASETS[where].classes)
    if os.path.isdir(where):
        try:
            return _open_directory(Path(where), splits)
        except PermissionError as error:
            raise UserError(f"{error.filename}: cannot be read ({error.strerror}); let it be read and entered") from error
    if found := files_named(where):
        return _open_files(list(map(Path, found)), where, splits)
    if where.endswith((".tar", ".parquet", *PACKED_ENDINGS)) or set("*?[{") & set(where):
        raise UserError(f"{where}: no such file; give a .tar or .parquet file, a glob, or {BRACES}")
    raise UserError(f"data source {where!r} is neither a directory nor a data set's name; {closest_dataset(where)}")


def _open_remote(where: str, splits: Sequence[str]) -> RemoteShards:
    if where.endswith(PACKED_ENDINGS):
        raise UserError(f"{where}: compressed; {UNPACK}")
    if where.endswith(".tar"):
        return open_tars(where, splits)
    return open_directory(where, splits)


def _open_files(files: list[Path], where: str, splits: Sequence[str]) -> Source:
    """Open the tars or Parquet files that a path, a glob or braces name; a mixture as that of a directory."""
    tables, tars = ([file for file in files if file.name.endswith(ending)] for ending in (".parquet", ".tar"))
    if not tables and not tars:
        said = f"compressed; {UNPACK}" if where.endswith(PACKED_ENDINGS) else "neither tar shards nor Parquet files; give such"
        raise UserError(f"{where}: {said}")
    if tables := image_tables(tables) if tars else tables:
        tables = split_chosen(tables, where, splits)
    tars = split_chosen(tars, where, splits) if tars else tars
    opened = [(ParquetImages(tables, where), tables)] if tables else []
    if tars and (shards := shards_among(tars, where, 0)):
        opened.append((shards, tars))
    return choose_kind([kind_of(*pair) for pair in opened], where)


def _open_directory(root: Path, splits: Sequence[str], classes: tuple[str, ...] = ()) -> Source:
    kinds = _kinds_by_name(root, splits, classes)
    split_named = not kinds and bool(splits_of(folders_in(root)))
    if not kinds and not split_named and (tables := image_tables(nested_tables(root, splits))):
        return ParquetImages(tables, root)
    folder = split_folder(root, splits) if split_named else root
    named = splits if folder == root else None  # of the folder of a split, all that lies in it is that split
    if named is None:
        tell_beside(root)
        if tables := image_tables(files_with(".parquet", folder) or tables_below(folder)):
            kinds.append(kind_of(ParquetImages(tables, folder), tables))
    # A directory of shards that are still being written has a plan, and perhaps no shard yet: `open_shards` says so.
    tars = tars_in(folder) or [folder / SHARDS_PLAN] * (folder / SHARDS_PLAN).exists()
    images = count_images(folder) if kinds or tars else 0
    if tars and (shards := _shards_in(folder, named, images)):
        kinds.append(shards)
    kinds += [Kind(images, f"{images} image files", None)] * bool(images)
    source = choose_kind(kinds, folder) if kinds else None
    if source is None:
        return _open_images(folder, named or ("train",))
    tell_others(folder)
    return source


def _kinds_by_name(root: Path, splits: Sequence[str], classes: tuple[str, ...]) -> list[Kind]:
    """Return the idx and the Parquet files of a directory or its data/, whose names say the split."""
    kinds = [kind_of(IdxPair(root, splits, classes), ())] if holds_idx(root) else []
    tables = image_tables(files_with(".parquet", root)) or image_tables(files_with(".parquet", root / "data"))
    if tables:
        tables = split_files(tables, root, splits)
        kinds.append(kind_of(ParquetImages(tables, root), tables))
    return kinds


def _shards_in(folder: Path, splits: Sequence[str] | None, images: int) -> Kind | None:
    """Return the shards of a folder beside so many image files: those of its manifest, or those of others.

    Where splits are asked for, the names of the tars say them, and shards with a manifest are train.
    """
    tars = tars_in(folder)
    if read_manifest(folder) is not None:
        return kind_of(only_train(open_shards(folder), folder, splits or ("train",)), tars)
    if images:
        tars = still_packed(tars, folder)
    if tars and splits:
        tars = split_files(tars, folder, splits)
    shards = shards_among(tars, folder, images)
    return shards and kind_of(shards, tars)


def _open_images(folder: Path, splits: Sequence[str]) -> ImageFolder:
    """Open a folder of images; where there are none but Parquet files, UserError says that none has a column of images."""
    try:
        return ImageFolder(only_train(folder, folder, splits))
    except UserError:
        if splits[0] == "train" and (tables := files_with(".parquet", folder)):
            ParquetImages(tables, folder)
        raise
