"""The training, validation and test split of a directory, by the names of its folders or files."""

import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import TypeVar

from fastjepa.errors import UserError

PARQUET_SPLIT = re.compile(r"(train|val|test)(?:idation)?(?![a-z])")  # validation-... is val; training.parquet is no split
T = TypeVar("T")


def split_folder(root: Path, split: str) -> Path:
    """Return the directory below `root`, or `root` itself, that holds a split; UserError where there is no such split."""
    # `DirEntry.is_dir` raises for a link to itself.
    folders = {e.name for e in os.scandir(root) if (os.path.isdir(e.path) if e.is_symlink() else e.is_dir())}
    if "train" in folders and (folders & {"val", "test"} or folders == {"train"}):
        for name in stand_in_splits(split, folders):
            return root / name
    return only_train(root, root, split)


def stand_in_splits(split: str, found: Collection[str]) -> list[str]:
    """Return which of the splits found may serve as `split`, best first.

    Only train serves as train; "val" asked of {"train", "test"} gives ["test"].
    """
    return [name for name in (["train"] if split == "train" else [split, *sorted({"val", "test"} - {split})]) if name in found]


def parquet_split(tables: list[Path], root: Path, split: str) -> list[Path]:
    """Return the tables of a split by the beginning of their names, as Hugging Face has it: train-00000-of-00002.parquet."""
    split_of = {path: match[1] for path in tables if (match := PARQUET_SPLIT.match(path.name))}
    if not split_of:
        return only_train(tables, root, split)
    for name in stand_in_splits(split, split_of.values()):
        return [path for path in tables if split_of.get(path) == name]
    raise UserError(f"{root}: has no {split} split; name its files {split}-*.parquet")


def only_train(found: T, where: str | Path, split: str) -> T:
    """Return what was found at a place without splits; UserError where another split than train is asked for."""
    if split != "train":
        raise UserError(f"{where}: has no {split} split; put its images into train/ and {split}/ folders")
    return found
