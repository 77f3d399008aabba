"""Image files of coloured noise, tar shards and IDX files."""

import gzip
import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image


def save_image(path: Path, seed: int, size: tuple[int, int] = (40, 30)) -> Path:
    """A PNG of coloured noise, (width, height) pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def encoded(seed: int, kind: str = "PNG") -> bytes:
    """A file of 9x8 pixels of coloured noise."""
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 9, 3), dtype=np.uint8)).save(stream, kind)
    return stream.getvalue()


def pack_shard(shard: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(shard, "w") as opened:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            opened.addfile(member, io.BytesIO(content))


def write_idx(path: Path, values: np.ndarray) -> None:
    header = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, dtype=">i4").tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(header + values.tobytes()))


def write_idx_pairs(root: Path, count: int = 8) -> np.ndarray:
    images = np.random.default_rng(0).integers(0, 256, (count, 28, 28), dtype=np.uint8)
    for prefix, n in (("train", count), ("t10k", 3)):
        write_idx(root / f"{prefix}-images-idx3-ubyte.gz", images[:n])
        write_idx(root / f"{prefix}-labels-idx1-ubyte.gz", np.arange(n, dtype=np.uint8) % 4)
    return images
