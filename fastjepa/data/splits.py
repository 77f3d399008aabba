"""The training, validation and test split of a data set, by the names of its folders or files."""

import logging
import os
import re
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from fastjepa.errors import SplitError, UserError

# As Hugging Face's `datasets` knows them, in any case: Train/ is train, VALID/ is val.
SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
}
# Words that only look like the name of a split: trainset, the "val" of val2017, testimages.
SPLIT_WORD = re.compile(f"({'|'.join(SPLIT_NAMES)}|trainval|trn|tst)(set|data|images?|imgs?|split)?")
T = TypeVar("T")
F = TypeVar("F", str, Path)  # a file on the disk, or its address


def splits_of(folders: Collection[str]) -> dict[str, list[str]]:
    """Return the splits among the names of folders: {"train": ["Train"], "val": ["valid"]} of Train, valid and extra.

    {} where they are no splits but classes: there must be one of train, beside one of val or test, or alone.
    """
    found: dict[str, list[str]] = {}
    for name in sorted(folders):
        if split := SPLIT_NAMES.get(name.lower()):
            found.setdefault(split, []).append(name)
    return found if "train" in found and (len(found) > 1 or len(folders) == 1) else {}


def acceptable_splits(split: str, stand_in: bool = True) -> tuple[str, ...]:
    """Return the splits that will do for `split`, best first: ("val", "test") for val, ("val",) without `stand_in`."""
    return (split, *sorted({"val", "test"} - {split})) if stand_in and split != "train" else (split,)


def split_folder(root: Path, splits: Sequence[str]) -> Path:
    """Return the directory below `root`, or `root` itself, that holds the first of `splits` there is; else SplitError."""
    found = splits_of(folders_in(root))
    for name in (name for name in splits if name in found):
        if len(found[name]) > 1:
            raise UserError(f"{root}: {' and '.join(found[name])} are both its {name} split; keep one of them under that name")
        return root / found[name][0]
    return only_train(root, root, splits)


def folders_in(root: Path) -> list[str]:
    """Return the names of the folders in a directory, without hidden ones."""
    # `DirEntry.is_dir` raises for a link to itself.
    entries = [entry for entry in os.scandir(root) if not entry.name.startswith(".")]
    return [e.name for e in entries if (os.path.isdir(e.path) if e.is_symlink() else e.is_dir())]


def split_files(files: list[F], where: str | Path, splits: Sequence[str]) -> list[F]:
    """Return the files of the first of `splits` there is, by a word in their names: train-00000-of-00002.parquet.

    Without a file of train, they are splits only when each is named for one. SplitError where there is none of `splits`.
    """
    split_of = {file: named for file in files if (named := split_of_file(file))}
    if "train" not in split_of.values() and len(split_of) < len(files):
        warn_of_splits(where, [os.path.basename(file) for file in files])
        return only_train(files, where, splits)
    for name in (name for name in splits if name in split_of.values()):
        if unnamed := [os.path.basename(file) for file in files if file not in split_of]:
            said = "%s: %d files that no split names are passed over (%s)"
            logging.getLogger(__name__).warning(said, where, len(unnamed), unnamed[0])
        return [file for file in files if split_of.get(file) == name]
    ending, split = os.path.splitext(files[0])[1], splits[0]
    raise SplitError(
        f"{where}: has no {split} split; name its files {split}-*{ending}, or give those to use: {where}/*{ending}"
    )


def split_chosen(files: list[F], where: str | Path, splits: Sequence[str]) -> list[F]:
    """Return the files of the first of `splits` among those that a glob or braces name; all are train unless they are of
    several splits.
    """
    several = len({split_of_file(file) for file in files} - {None}) > 1
    return split_files(files, where, splits) if several else only_train(files, where, splits)


def split_of_file(file: str | Path) -> str | None:
    """Return the split that a word in a file's name says, the first of several: "val" of imagenet_VAL_01.tar."""
    return next((SPLIT_NAMES[word] for word in _words(os.path.basename(file)) if word in SPLIT_NAMES), None)


def _words(name: str) -> list[str]:
    """Return the words of a name in lower case: ["seg", "test"] of Seg_Test2.tar, without its ending."""
    return re.findall("[a-z]+", os.path.splitext(name)[0].lower())


def only_train(found: T, where: str | Path, splits: Sequence[str]) -> T:
    """Return what was found at a place without splits; SplitError where another split than train is asked for."""
    if splits[0] != "train":
        raise SplitError(f"{where}: has no {splits[0]} split; put its images into train/ and {splits[0]}/ folders")
    return found


def warn_of_splits(where: str | Path, names: Iterable[str]) -> None:
    """Log a warning where classes or files that are trained on look like splits: train2017 and val2017, or valid alone.

    One name among others is a class: the train among the vehicles of CIFAR-100.
    """
    names = list(names)
    words = {name: next(filter(None, map(SPLIT_WORD.fullmatch, _words(name))), None) for name in names}
    kinds = {name: SPLIT_NAMES.get(word[1], word[1]) for name, word in words.items() if word}
    if kinds and (len(kinds) == len(names) or len(set(kinds.values())) > 1):
        said = "%s: trained on as a whole, though %s look like splits; name them train and val, or give the one to train on"
        logging.getLogger(__name__).warning(said, where, ", ".join(map(repr, sorted(kinds)[:8])))
