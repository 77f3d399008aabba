"""Bytes to pixels with NVIDIA DALI, on its CPU threads or on a GPU, ahead of the training step.

DALI gets files, boxes and flips, and decides nothing. It is given only files that it reads exactly as `decode_pillow`
does (`dali_reads`); the pixels of any other travel to it as a PNM file, so that they are resized like the rest.
"""

import dataclasses
import itertools
import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from fastjepa.data.crops import Box
from fastjepa.data.decode_pillow import DAMAGED, ORIENTED_PNG, Header
from fastjepa.data.distortions import distorted
from fastjepa.errors import ConfigError

Decodable = TypeVar("Decodable")  # a dataclass with a field `images`
TAIL = 64  # last bytes of a JPEG, among which its end marker is looked for

RGB_FRAME = re.compile(rb"\xff[\xc0-\xc2]\0\x11\x08.{4}\x03R..G..B", re.DOTALL)  # 8 bits, 3 components named R, G and B


def dali_installed() -> bool:
    """Return whether DALI is installed, without importing it."""
    try:
        return find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:  # no package of NVIDIA at all
        return False


def require_dali() -> None:
    """Raise ConfigError where DALI is not installed."""
    if not dali_installed():
        raise ConfigError("data.loader: dali needs NVIDIA DALI; run: pip install 'fastjepa[dali]', or set it to auto or torch")


def dali_reads(header: Header, raw: bytes) -> bool:
    """Return whether DALI decodes every box of this file to the very pixels of `decode_pillow`, or refuses it.

    Of a truncated JPEG DALI decodes the boxes that end before the cut, and of a file with 16 bits a channel it rounds
    what Pillow cuts; it knows no GIF, no orientation in XMP, no damaged metadata, and takes the alpha of a TIFF for a colour.
    CMYK without Adobe's marker is its negative, and turned CMYK is off by one; JPEGs of RGB are few, and a GPU may take them
    for YCbCr.
    """
    if header.animated or DAMAGED in header.info:
        return False
    if header.format == "JPEG":
        turned_by_xmp = header.orientation != 1 and b"tiff:Orientation" in header.info.get("xmp", b"")
        usual = header.mode == "L" or header.mode == "RGB" and not _holds_rgb(header.info, raw)
        return usual and b"\xff\xd9" in raw[-TAIL:] and not turned_by_xmp
    if header.format == "PNG":
        depth = raw[24]  # bits a channel, after signature, length, "IHDR", width and height: 8 + 4 + 4 + 4 + 4 bytes
        return depth <= 8 and header.orientation == 1 and not any(word in raw for word in ORIENTED_PNG)
    return header.format == "WEBP" and not header.info.keys() & {"exif", "xmp"}


def _holds_rgb(info: dict, raw: bytes) -> bool:
    """Return whether a JPEG of three components holds RGB, not YCbCr: by JFIF's marker, Adobe's or the names of components."""
    if "jfif" in info:
        return False
    return info["adobe_transform"] == 0 if "adobe_transform" in info else RGB_FRAME.search(raw) is not None


def as_pnm(image: Tensor) -> bytes:
    """Return (C, H, W) uint8 pixels as an uncompressed file: PGM for one channel or three copies of one, else PPM."""
    grey = len(image) == 1 or image.stride(0) == 0  # `decode_image` expands one channel to three without a copy
    pixels = image[0] if grey else image.permute(1, 2, 0)
    return b"P%d %d %d 255\n" % (5 if grey else 6, image.shape[2], image.shape[1]) + pixels.numpy().tobytes()


class View(NamedTuple):
    """The part of one file that is to be seen."""

    raw: bytes  # the encoded file
    box: Box  # in the upright image
    flip: bool  # left to right, after the crop


@dataclass(frozen=True)
class Encoded:
    """The files of b views in one block, which travels between processes as one piece of shared memory.

    Files of 3, 2 and 4 bytes give 9 bytes of `files` and `ends` [3, 5, 9]: the second file is files[3:5].
    """

    files: Tensor  # (bytes,) uint8, one file after the other
    ends: Tensor  # (b,) int64: where each ends in `files`
    boxes: Tensor  # (b, 4) int32: left, top, width, height in pixels
    flips: Tensor  # (b,) int32: 0 or 1
    drawn: Tensor | None = None  # (b, 13) fp32: numbers by which the decoded crops are distorted

    @classmethod
    def of(cls, views: Sequence[View], drawn: Tensor | None = None) -> "Encoded":
        """Return the views laid end to end, their files copied once; `drawn` as in `distorted`, None to distort no crop."""
        files = torch.from_numpy(np.frombuffer(bytearray().join(view.raw for view in views), dtype=np.uint8))
        boxes = [(left, top, width, height) for _, (top, left, height, width), _ in views]
        return cls(
            files,
            torch.tensor([len(view.raw) for view in views]).cumsum(0),
            torch.tensor(boxes, dtype=torch.int32),
            torch.tensor([view.flip for view in views], dtype=torch.int32),
            drawn,
        )

    def rows(self, start: int, stop: int) -> "Encoded":
        """Return the views from `start` to `stop`, not to be distorted; no file is copied.

        With `ends` [3, 5, 9], rows 1 to 3 are files[3:9] and their `ends` [2, 6].
        """
        first = int(self.ends[start - 1]) if start else 0
        files, ends = self.files[first : int(self.ends[stop - 1])], self.ends[start:stop] - first
        return Encoded(files, ends, self.boxes[start:stop], self.flips[start:stop])

    def distorted(self, crops: Tensor) -> Tensor:
        """Return the decoded crops (b, C, H, W), distorted where that is asked for."""
        return crops if self.drawn is None else distorted(crops, self.drawn)

    def arrays(self) -> tuple[list[np.ndarray], np.ndarray, np.ndarray, np.ndarray]:
        """Return files, starts (b, 2), shapes (b, 2) and flips (b,) as DALI takes them, without a copy of the files."""
        files, boxes = self.files.numpy(), np.ascontiguousarray(self.boxes.numpy().reshape(-1, 2, 2).transpose(1, 0, 2))
        bounds = itertools.pairwise([0, *self.ends.tolist()])
        return [files[start:end] for start, end in bounds], boxes[0], boxes[1], self.flips.numpy()


@dataclass(frozen=True)
class DaliSettings:
    """The numbers that a pipeline is built from."""

    batch: int  # the most views in an `Encoded`
    channels: int
    size: tuple[int, int]  # (height, width)
    device: torch.device
    threads: int
    ahead: int  # micro-batches decoded before they are asked for
    hw_decoder_load: float  # share of the JPEGs for a GPU's hardware decoder; of no effect on a CPU


class DaliDecoder(Iterator):
    """An iterator over micro-batches with `images` decoded from Encoded to (b, C, H, W) uint8 tensors on the device.

    The tensors are DALI's own memory (channels last, seen as channels first) and stay valid as long as they are referenced;
    crops that are distorted are copies.
    DALI gives up a whole pipeline for one file it cannot decode: the batch is then tried alone and, if it fails alone as
    well, in halves until the rows that DALI refuses are known. The batch is asked for again with other files in those rows,
    and a fresh pipeline goes on with the batch after it.
    """

    def __init__(self, batches: Iterator[Decodable], again: Callable[[int, dict[int, str]], Decodable], settings: DaliSettings):
        """Decode `batches`, `settings.ahead` of them in the background while the caller works.

        Args:
            again: again(position, {row: reason}) returns the batch at a position without the files in the rows refused.
        """
        self._batches, self._again, self._settings = batches, again, settings
        self._waiting: deque[Decodable] = deque()  # taken from `batches`, not yet returned: DALI reads their memory
        self._position = 0
        self._start()

    def __next__(self) -> Decodable:
        while len(self._waiting) <= self._settings.ahead and (batch := next(self._batches, None)) is not None:
            self._waiting.append(batch)
            self._unfed.append(batch.images)
        if not self._waiting:
            raise StopIteration
        try:
            images = _run_pipeline(self._pipeline)
        except Exception:  # any class, by operator; what is no fault of a file fails again below
            self._pipeline = None
            decoded = self._alone(self._waiting.popleft())
            self._start()
        else:
            batch = self._waiting.popleft()
            decoded = dataclasses.replace(batch, images=batch.images.distorted(images))
        self._position += 1
        return decoded

    def close(self) -> None:
        """End the pipeline and its threads."""
        self._pipeline = None  # before the memory that it reads
        self._waiting.clear()
        self._batches = iter(())

    def _start(self) -> None:
        """Build a fresh pipeline that begins with the first waiting batch."""
        self._unfed = deque(batch.images for batch in self._waiting)
        self._pipeline = _pipeline(self._unfed, self._settings)

    def _alone(self, batch: Decodable) -> Decodable:
        """Return a batch decoded by pipelines of its own, the files that DALI refuses replaced."""
        try:
            images = _decoded(batch.images, self._settings)
        except Exception:  # any class, by operator
            batch = self._again(self._position, _refused(batch.images, self._settings))
            images = _decoded(batch.images, self._settings)
        return dataclasses.replace(batch, images=batch.images.distorted(images))


def _decoded(images: Encoded, settings: DaliSettings) -> Tensor:
    """Return (b, C, H, W) uint8 images, decoded by a pipeline of their own."""
    return _run_pipeline(_pipeline(deque([images]), settings))


def _refused(images: Encoded, settings: DaliSettings, start: int = 0, stop: int | None = None) -> dict[int, str]:
    """Return the rows from `start` to `stop` that DALI cannot decode, each with the reason: by halves, as a search does."""
    stop = len(images.ends) if stop is None else stop
    try:
        _decoded(images.rows(start, stop), settings)
    except Exception as error:
        if stop - start == 1:
            return {start: _refusal_reason(error)}
        middle = (start + stop) // 2
        return _refused(images, settings, start, middle) | _refused(images, settings, middle, stop)
    return {}


def _pipeline(unfed: deque[Encoded], settings: DaliSettings):
    """Return a pipeline that decodes what it takes from the left of `unfed`, and ends when it finds nothing there."""
    from nvidia.dali import Pipeline, fn, types

    def feed():
        if not unfed:
            raise StopIteration
        return unfed.popleft().arrays()

    cuda = settings.device.type == "cuda"
    # Fancy upsampling is libjpeg's, and so Pillow's: without it colours of a GPU's decoder differ.
    options = {"hw_decoder_load": settings.hw_decoder_load, "jpeg_fancy_upsampling": True} if cuda else {}
    pipeline = Pipeline(
        batch_size=settings.batch,
        num_threads=settings.threads,
        device_id=torch.device("cuda", settings.device.index or 0).index if cuda else None,
        prefetch_queue_depth=settings.ahead + 1,
        exec_dynamic=True,  # outputs live as long as they are referenced
    )
    with pipeline:
        raw, start, shape, flip = fn.external_source(feed, num_outputs=4, batch=True, no_copy=True)
        images = fn.decoders.image_slice(
            raw, start=start, shape=shape, axis_names="WH", device="mixed" if cuda else "cpu", output_type=types.RGB, **options
        )
        if settings.channels == 1:
            images = fn.color_space_conversion(images, image_type=types.RGB, output_type=types.GRAY)
        images = fn.resize(images, size=settings.size, interp_type=types.INTERP_LINEAR, antialias=True)
        pipeline.set_outputs(fn.flip(images, horizontal=flip))
    pipeline.build()
    return pipeline


def _run_pipeline(pipeline) -> Tensor:
    """Return the next micro-batch of a pipeline, (b, C, H, W) uint8."""
    cuda = pipeline.device_id is not None
    (images,) = pipeline.run(torch.cuda.current_stream(pipeline.device_id)) if cuda else pipeline.run()
    return torch.from_dlpack(images.as_tensor()).permute(0, 3, 1, 2)


def _refusal_reason(error: Exception) -> str:
    """Return the line of DALI's many that says what was encountered."""
    lines = [line.strip() for line in str(error).split("encountered:")[-1].splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
