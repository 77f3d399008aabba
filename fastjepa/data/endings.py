"""Endings of image files, and the line on files that have another."""

from collections import Counter
from functools import cache
from pathlib import Path

from PIL import Image

# Formats that Pillow tells by their header and cannot decode, at least not without a program or library of others.
HEADER_ONLY = {"BUFR", "GRIB", "HDF5", "MPEG", "WMF"}
ARRAY_ENDINGS = frozenset((".npy", ".npz"))  # images where there is no other image: beside one they are mostly its features
PACKED_ENDINGS = ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".zip", ".7z", ".rar"
UNPACK = "unpack each, as nothing in it can be read at random: a .tar.gz to a plain .tar, or its images into folders"
NAMED_KINDS = 8  # endings that the line names


@cache
def image_endings() -> frozenset[str]:
    """Return every ending that Pillow registers for images it decodes: .jpg, .jfif, .avif and some 60 more."""
    Image.init()
    opened = Image.OPEN.keys() - HEADER_ONLY | {"MPO"}  # an MPO is opened as the JPEG that it begins with
    return frozenset(ending for ending, kind in Image.registered_extensions().items() if kind in opened)


def files_with(ending: str, folder: Path) -> list[Path]:
    """Return the files of a folder with an ending, in the order of their names; hidden ones are left out.

    A link that leads nowhere is among them, so that it is met; a folder of such a name is not, nor a pipe, which would be
    waited for.
    """
    named = [path for path in folder.glob(f"*{ending}") if not path.name.startswith(".")]
    return sorted(path for path in named if path.is_file() or path.is_symlink() and not path.exists())


def passed_over(passed: Counter[str]) -> str:
    """Return the words on files of other kinds, given {ending: files}: "20 files of other kinds passed over (.x 17, .y 3)"."""
    named = [f"{ending or 'no ending'} {count}" for ending, count in passed.most_common(NAMED_KINDS)]
    more = [f"{len(passed) - NAMED_KINDS} kinds more"] if len(passed) > NAMED_KINDS else []
    return f"{passed.total()} file{'s' * (passed.total() > 1)} of other kinds passed over ({', '.join([*named, *more])})"
