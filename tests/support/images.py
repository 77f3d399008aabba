"""Image files of coloured noise, TIFF and PNG files of any depth, tar shards and IDX files."""

import gzip
import io
import struct
import tarfile
import zlib
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Tiff:
    """The tags of a TIFF file that Pillow does not write."""

    bits: int = 8  # a channel
    photometric: int = 1  # what the values mean: 0 is white zeros, 1 black ones, 2 RGB, 5 CMYK
    order: str = "<"  # of bytes: "<" (Intel's) or ">" (Motorola's)
    sample_format: int = 1  # 1 without a sign, 2 with one, 3 floating point
    extra: tuple[int, ...] = ()  # of each further band: 0 unknown, 1 or 2 alpha
    pages: int = 1  # each the same picture
    zipped: bool = False
    orientation: int = 1  # EXIF's

    def encode(self, pixels: np.ndarray) -> bytes:
        """A file of (H, W) or (H, W, bands) values, in one strip."""
        height, width, *bands = pixels.shape
        bands = bands[0] if bands else 1
        strip = zlib.compress(self._packed(pixels)) if self.zipped else self._packed(pixels)
        content = struct.pack(f"{self.order}2sHI", b"II" if self.order == "<" else b"MM", 42, 8 + len(strip)) + strip
        shorts = {258: [self.bits] * bands, 259: [8 if self.zipped else 1], 262: [self.photometric], 277: [bands],
                  274: [self.orientation], 284: [1], 338: list(self.extra), 339: [self.sample_format] * bands}  # fmt: skip
        longs = {256: [width], 257: [height], 273: [8], 278: [height], 279: [len(strip)]}
        tags = {tag: ("H", v) for tag, v in shorts.items() if v} | {tag: ("I", v) for tag, v in longs.items()}
        for page in range(self.pages):
            content += self._directory(tags, len(content), last=page == self.pages - 1)
        return content

    def _packed(self, pixels: np.ndarray) -> bytes:
        if self.bits % 8 == 0:
            return pixels.astype(f"{self.order}{' uif'[self.sample_format]}{self.bits // 8}").tobytes()
        rows = pixels.reshape(len(pixels), -1, 1).astype(np.uint32) >> np.arange(self.bits - 1, -1, -1) & 1
        return np.packbits(rows.reshape(len(pixels), -1).astype(np.uint8), axis=1).tobytes()

    def _directory(self, tags: dict[int, tuple[str, list[int]]], start: int, last: bool) -> bytes:
        """Tags in rising order, 12 bytes each after their number; values of more than 4 bytes come behind."""
        entries, behind, end = b"", b"", start + 2 + 12 * len(tags) + 4
        for tag, (kind, values) in sorted(tags.items()):
            packed = struct.pack(f"{self.order}{len(values)}{kind}", *values)
            if len(packed) > 4:
                packed, behind = struct.pack(f"{self.order}I", end + len(behind)), behind + packed
            entries += struct.pack(f"{self.order}HHI", tag, 3 if kind == "H" else 4, len(values)) + packed.ljust(4, b"\0")
        following = 0 if last else end + len(behind)
        return struct.pack(f"{self.order}H", len(tags)) + entries + struct.pack(f"{self.order}I", following) + behind


def encode_png(pixels: np.ndarray, chunks: bytes = b"") -> bytes:
    """A PNG of (H, W) or (H, W, bands) uint8 or uint16 values, with `chunks` before its pixels."""
    colour = {1: 0, 2: 4, 3: 2, 4: 6}[pixels.shape[2] if pixels.ndim == 3 else 1]
    rows = pixels.astype(pixels.dtype.newbyteorder(">")).reshape(len(pixels), -1)
    head = struct.pack(">IIBBBBB", pixels.shape[1], len(pixels), 8 * pixels.itemsize, colour, 0, 0, 0)
    packed = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", head) + chunks + png_chunk(b"IDAT", packed) + png_chunk(b"IEND", b"")


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


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
