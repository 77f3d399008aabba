"""The benchmarks are imported as their scripts import each other; a stand-in takes the place of the official code."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(Path(__file__).parent)]  # as `python benchmarks/step.py` has it

import official  # noqa: E402  (only importable from here on)
import official_stand_in  # noqa: E402
import timing  # noqa: E402

from fastjepa.config.schema import MODELS  # noqa: E402


@pytest.fixture(autouse=True)
def small_ceiling(monkeypatch: pytest.MonkeyPatch):
    """Small products and copies, whose rates no test looks at."""
    monkeypatch.setitem(timing.SQUARE, "cpu", 128)
    monkeypatch.setitem(timing.COPIED, "cpu", 1 << 20)


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A package `src` that does on import what the official one does: print, and seize the root logger."""
    noisy = (
        "import logging, sys\nprint('noise')\nlogging.basicConfig(stream=sys.stdout, level=logging.INFO)\nlogging.info('x')\n"
    )
    for name in official.MODULES:
        path = tmp_path.joinpath(*name.split(".")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(noisy + f"name = {name!r}\n")
    return tmp_path


@pytest.fixture
def stand_in(clone: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that passes for a clone, whose modules are dense networks with the official interface."""
    parts = (
        SimpleNamespace(init_model=official_stand_in.init_model, init_opt=official_stand_in.init_opt),
        SimpleNamespace(apply_masks=official_stand_in.apply_masks),
        SimpleNamespace(repeat_interleave_batch=official_stand_in.repeat_interleave_batch),
        SimpleNamespace(grad_logger=lambda parameters: None),
    )
    monkeypatch.setattr(official, "import_clone", lambda directory: parts)
    monkeypatch.setitem(MODELS, "vit_tiny", (48, 2, 3, 4.0))
    return clone
