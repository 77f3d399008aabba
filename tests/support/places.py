"""Where things are."""

import subprocess
import sys
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
KERNELS = ROOT / "kernels"
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
REFERENCES = sorted((ROOT / "tests/reference").glob("ijepa_*.safetensors"))


@cache
def files(suffix: str = "") -> tuple[Path, ...]:
    """Return what git tracks or would add, relative to the root."""
    listed = subprocess.run(
        ["git", "-c", "safe.directory=*", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split("\n")  # fmt: skip
    return tuple(Path(line) for line in sorted(set(listed)) if line.endswith(suffix) and (ROOT / line).is_file())
