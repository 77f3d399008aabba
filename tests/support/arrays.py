"""Images of many bands and 16 bits: TIFF files, and a data set whose bands show different shapes."""

import io
from pathlib import Path

import numpy as np
import tifffile

BANDS = 12
LAYOUTS = {  # how tifffile is to write (B, H, W): its own words
    "interleaved": {"planarconfig": "contig"},
    "planar": {"planarconfig": "separate"},
    "planar tiles": {"planarconfig": "separate", "tile": (16, 16)},
    "tiles": {"planarconfig": "contig", "tile": (16, 16)},
    "strips": {"planarconfig": "contig", "rowsperstrip": 3},
    "lzw": {"planarconfig": "contig", "compression": "lzw"},
    "deflate with predictor": {"planarconfig": "separate", "compression": "deflate", "predictor": True},
    "zstd": {"planarconfig": "contig", "compression": "zstd"},
    "BigTIFF": {"planarconfig": "contig", "bigtiff": True},
    "Motorola": {"planarconfig": "separate", "byteorder": ">"},
}


def measured(*shape: int, dtype: str = "uint16", seed: int = 0) -> np.ndarray:
    """Measurements over all of the range of a dtype."""
    random = np.random.default_rng(seed)
    if np.dtype(dtype).kind == "f":
        return random.normal(size=shape).astype(dtype)
    low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
    return random.integers(low, high, shape, dtype=dtype, endpoint=True)


def tiff(values: np.ndarray, layout: str = "interleaved", **words) -> bytes:
    """A TIFF of bands (B, H, W) in one page."""
    stream, options = io.BytesIO(), LAYOUTS[layout] | words
    stored = np.moveaxis(values, 0, 2) if options["planarconfig"] == "contig" else values
    if len(values) == 1:
        stored = values[0]
        options.pop("planarconfig")
    tifffile.imwrite(stream, stored, photometric=options.pop("photometric", "minisblack"), metadata=None, **options)
    return stream.getvalue()


def paged_tiff(values: np.ndarray) -> bytes:
    """A TIFF of bands (B, H, W), each in a page of its own."""
    stream = io.BytesIO()
    with tifffile.TiffWriter(stream) as file:
        for band in values:
            file.write(band, photometric="minisblack", contiguous=False, metadata=None)
    return stream.getvalue()


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


SHAPES = 4


def shape_masks(side: int) -> np.ndarray:
    """A disk, a square, stripes across and stripes down: (4, side, side) bool."""
    y, x = np.mgrid[:side, :side] / (side - 1) * 2 - 1
    return np.stack([x**2 + y**2 < 0.5, np.maximum(abs(x), abs(y)) < 0.6, np.floor(4 * y) % 2 == 0, np.floor(4 * x) % 2 == 0])


def write_shapes(
    root: Path, count: int, side: int, bands: int = BANDS, dtype: str = "uint16", split: str = "train", noise: float = 300
) -> Path:
    """A folder of TIFFs, of 4 classes: band b of an image of class c shows shape (b + c) % 4, moved, brighter and noisy.

    Values lie below 10,000, as those of Sentinel-2 do: an eighth of the 16 bits.
    """
    random, masks = np.random.default_rng(0 if split == "train" else 1), shape_masks(side)
    for i in range(count):
        label = i % SHAPES
        shift = random.integers(-side // 4, side // 4 + 1, 2)
        shown = np.roll(masks[(np.arange(bands) + label) % SHAPES], shift, (1, 2))
        values = 1000 + 6000 * shown * random.uniform(0.5, 1, (bands, 1, 1)) + random.normal(scale=noise, size=shown.shape)
        folder = root / split / f"class{label}"
        folder.mkdir(parents=True, exist_ok=True)
        values = values.clip(0, 9999).astype(dtype)
        (folder / f"{i:05}.tif").write_bytes(tiff(values, "planar" if i % 2 else "deflate with predictor"))
    return root
