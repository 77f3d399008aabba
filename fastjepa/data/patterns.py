"""Files named by a path, by braces, or by a glob."""

import glob
import os
from pathlib import Path

from fastjepa.errors import UserError

BRACES = "shard-{000000..000009}.tar"  # as WebDataset names many


def files_named(where: str) -> list[str]:
    """Return the files that a path names: itself, or others by braces, s-{000000..000009}.tar, or by a glob, s-*.tar.

    The part of the path that is there is taken as it stands, so a folder may be named "set [1]". [] where nothing is there;
    UserError where one of several that braces name is not.
    """
    if os.path.exists(where) and not os.path.isfile(where):
        raise UserError(f"{where}: a pipe or a device, not a file; give a file, which can be read at random")
    if os.path.lexists(where):
        return [where]
    folder = next((parent for parent in Path(where).parents if os.path.isdir(parent)), Path())
    rest = str(Path(where).relative_to(folder))
    found = []
    for name in expand_braces(rest, where) if "{" in rest else [rest]:
        matches = _matches(folder, name)
        if not matches and name != rest:
            raise UserError(f"{folder / name}: no such file, of those that {where} names")
        found += matches
    return found


def _matches(folder: Path, name: str) -> list[str]:
    """Return the files below a folder that a name or glob names, hidden ones left out, in the order of their paths."""
    if os.path.lexists(folder / name):
        return [str(folder / name)]
    found = [folder / match for match in glob.glob(name, root_dir=folder, recursive=True)] if glob.has_magic(name) else []
    return sorted(str(path) for path in found if path.is_file() or path.is_symlink() and not path.exists())


def expand_braces(pattern: str, where: str) -> list[str]:
    """Return the names that a pattern with braces stands for; UserError, which names `where`, for braces that do not match."""
    try:
        from braceexpand import UnbalancedBracesError, braceexpand
    except ImportError as error:
        raise UserError(f"{where}: braces need braceexpand; run: pip install 'fastjepa[remote]'") from error
    try:
        return list(braceexpand(pattern))
    except UnbalancedBracesError as error:
        raise UserError(f"{where}: its braces do not match; write {BRACES}") from error
