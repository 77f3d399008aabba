"""Held-out images of a data set: the split that evaluations test on, and a run's own k-NN; one choice serves both.

Labels of the test images are numbers of the training split's classes, which are matched by name: either split may lack
classes that the other's numbering counts.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from fastjepa.data.sources import Source, open_source
from fastjepa.errors import SplitError, UserError

HeldOutName = Literal["test", "val"]  # in the order they are tried
NAMES_SAID = 3  # classes that a sentence names


@dataclass(frozen=True)
class HeldOut:
    """Labelled images that no training sees."""

    name: HeldOutName
    source: "Source | RelabelledSource"
    rows: np.ndarray  # rising indices of the images that have a label
    notes: tuple[str, ...]  # sentences for the user: what was passed over or is missing


class RelabelledSource:
    """A source whose labels are numbers of other classes: those with the names of its own."""

    def __init__(self, source: Source, classes: tuple[str, ...]):
        numbers = {name: number for number, name in enumerate(classes)}
        self._source, self.classes = source, classes
        self._numbers = [numbers.get(name) for name in source.classes]

    def __len__(self) -> int:
        return len(self._source)

    def name(self, i: int) -> str:
        """Return where image i lies."""
        return self._source.name(i)

    def read(self, i: int) -> bytes | np.ndarray:
        """Return image i as the source has it."""
        return self._source.read(i)

    def label(self, i: int) -> int | None:
        """Return the number of image i's class among the other classes; None without a label."""
        own = label_of(self._source, i)
        return None if own < 0 else self._numbers[own]


def open_held_out(data: str | Path, train: Source, split: HeldOutName | None = None) -> HeldOut:
    """Return the images to test on: those of `split` or, where none is asked for, of test, else val, the first that fits.

    A split fits whose images have labels, all of classes that have training images. UserError where none does, SplitError
    where there is none.

    Args:
        train: the training split of `data`.
    """
    trained, misfits = named_classes(train, labels_of(train)), []
    for name, source in splits_found(data, split):
        if len(trained) < 2:
            known = f"its training images have labels of {len(trained)} class{'' if len(trained) == 1 else 'es'}"
            raise UserError(f"{data}: {known}, and a probe needs two; put images into class folders")
        labels = labels_of(source)
        own = named_classes(source, labels)
        if own and own <= trained:
            notes = [f"tests on its {name} split, for the images of {misfits[0]}"] if misfits else []
            notes += missing_images(name, labels, trained - own)
            same = source.classes == train.classes[: len(source.classes)]
            matched = source if same else RelabelledSource(source, train.classes)
            return HeldOut(name, matched, np.flatnonzero(labels >= 0), tuple(f"{data}: {note}" for note in notes))
        strange = f"are of {listed(own - trained)} without training images" if own else "have no labels"
        misfits.append(f"its {name} split {strange}")
    remedy = "give them labels of training classes, or take those of other classes out"
    raise UserError(f"{data}: the images of {', and those of '.join(misfits)}; {remedy}")


def splits_found(data: str | Path, split: HeldOutName | None) -> Iterator[tuple[HeldOutName, Source]]:
    """Open the held-out splits that there are, one by one; SplitError where there is none, or not the one asked for."""
    missing, names = [], (split,) if split else get_args(HeldOutName)
    for name in names:
        try:
            yield name, open_source(data, name, stand_in=False)
        except SplitError as error:
            missing.append(error)
    if len(missing) == len(names):
        raise missing[0]


def missing_images(name: str, labels: np.ndarray, classes: set[str]) -> list[str]:
    """Return what is to be said of a split without images of `classes`, and of its images without labels."""
    unlabelled = int((labels < 0).sum())
    return [f"its {name} split has no images of {listed(classes)}"] * bool(classes) + [
        f"{unlabelled} of the {len(labels)} images of its {name} split have no label and are left out"
    ] * bool(unlabelled)


def labels_of(source: Source) -> np.ndarray:
    """Return the classes of all images, (n,) int64; -1 for an image without one."""
    return np.fromiter((label_of(source, row) for row in range(len(source))), np.int64, len(source))


def label_of(source: Source, row: int) -> int:
    """Return the class of an image; -1 for one without."""
    label = source.label(row)
    return -1 if label is None else label


def named_classes(source: Source, labels: np.ndarray) -> set[str]:
    """Return the names of the classes that the labels of a source name."""
    return {source.classes[number] for number in np.unique(labels) if number >= 0}


def listed(classes: set[str]) -> str:
    """Name some of the classes, as "class 'a'" or "5 classes ('a', 'b', 'c', ...)"."""
    names = sorted(map(repr, classes))
    if len(names) == 1:
        return f"class {names[0]}"
    return f"{len(names)} classes ({', '.join(names[:NAMES_SAID] + ['...'] * (len(names) > NAMES_SAID))})"
