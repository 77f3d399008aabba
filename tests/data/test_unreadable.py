"""Files and folders without permission: counted as bad, with the reason, never a bare errno."""

import os
import tempfile
from pathlib import Path

import pytest

from fastjepa.data.prepare.check_images import check_images
from fastjepa.data.sources import open_source
from fastjepa.errors import UserError
from tests.support.batches import load, settings
from tests.support.images import save_image

SEEN = {"no permission at all": 0o000, "not to be entered": 0o644, "not to be listed": 0o311}


@pytest.fixture
def images():
    """Twelve images in three class folders, one with a folder inside, read by who is not root: root may read anything."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        for i in range(12):
            save_image(root / "abc"[i % 3] / ("in" if i == 4 else "") / f"{i}.png", seed=i)
        root.chmod(0o755)
        check_images(str(root))  # who is not root may not be able to import what this imports
        load(settings(root), range(1))
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)
        yield root
        os.seteuid(user)
        for folder in (root / "b", root / "b/in"):
            folder.chmod(0o755)


def permit(path: Path, mode: int) -> None:
    """Change a file's mode as its owner."""
    now = os.geteuid()
    if os.getuid() == 0:
        os.seteuid(0)
    path.chmod(mode)
    os.seteuid(now)


@pytest.mark.parametrize("mode", SEEN.values(), ids=SEEN)
def test_a_class_folder_without_permission_is_bad(images: Path, mode: int):
    permit(images / "b", mode)
    shown = []
    report = check_images(str(images), show=shown.append)
    assert report.bad and shown == report.bad
    assert all(bad.path.startswith(f"{images}/b") and str(bad).endswith("unreadable (Permission denied)") for bad in report.bad)
    assert report.images - len([bad for bad in report.bad if bad.path.endswith(".png")]) == 8, "the others are read"


@pytest.mark.parametrize("mode", SEEN.values(), ids=SEEN)
def test_a_data_set_without_permission_is_named(images: Path, mode: int):
    permit(images, mode)
    with pytest.raises(UserError, match=f"^{images}.*: cannot be read .Permission denied."):
        open_source(images)
    permit(images, 0o755)


def test_a_file_without_permission_is_told_with_the_reason(images: Path, caplog):
    permit(images / "a" / "0.png", 0o000)
    (bad,) = check_images(str(images)).bad
    assert str(bad) == f"{images}/a/0.png: unreadable (Permission denied)"
    load(settings(images, max_bad=1), range(3))
    assert f"{images}/a/0.png: cannot be decoded (Permission denied), replaced by another image" in caplog.text
    permit(images / "a" / "3.png", 0o000)
    with pytest.raises(UserError, match=r"2 files cannot be decoded, .* for example .*\.png \(Permission denied\); "):
        load(settings(images, max_bad=1), range(3))
