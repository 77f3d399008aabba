"""DALI shows the pictures that `decode_pillow` shows, meets the same bad files, and loses nothing when it gives up."""

import contextlib
import hashlib
import io
import json
import logging
import os
import signal
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastjepa.cli.main import main
from fastjepa.cli.survey import decoder_rows
from fastjepa.config.load import RETIRED_KEYS, config_from_dict
from fastjepa.config.schema import Config, DataConfig
from fastjepa.data import decode_dali
from fastjepa.data.crops import crop_image
from fastjepa.data.decode_dali import DaliDecoder, DaliSettings, Encoded, View, _pipeline, as_pnm, dali_reads
from fastjepa.data.decode_pillow import decode_image, read_header
from fastjepa.data.sources import open_source
from fastjepa.errors import ConfigError
from fastjepa.loader.batch import Batch
from fastjepa.loader.loader import Loader, _dali_settings, batch_recipe, decodes_with_dali
from fastjepa.loader.micro_batches import EncodedBatches, MicroBatches
from fastjepa.ranks.world import World
from fastjepa_kernels.layers import MaskedPatchEmbed
from tests.support import ranks

CPU = torch.device("cpu")


def natural(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth colours, an edge and a little noise."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    waves = [128 + 100 * np.sin(x / random.uniform(9, 40) + y / random.uniform(9, 40)) for _ in range(3)]
    pixels = np.stack(waves, -1) + random.normal(0, 6, (height, width, 3))
    pixels[height // 3 : height // 2, width // 4 : width // 2] = random.integers(0, 256, 3)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def encode(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


PICTURE = natural(121, 90)
XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf tiff:Orientation="6"/></x:xmpmeta>'
PNG = encode(PICTURE, "PNG")
LATE_EXIF = PNG[:-12] + encode(PICTURE, "PNG", exif=turned(6))[33:].partition(b"IDAT")[0][:-4] + PNG[-12:]
JPEG_DAMAGED_INSIDE = encode(PICTURE, progressive=True)[:900] + b"\xff\xd8\xff\xc0" * 60 + b"\xff\xd9"
BROKEN_CHECKSUM = PNG[:-16] + bytes([PNG[-16] ^ 1]) + PNG[-15:]  # of the last pixels: Pillow does not look
READ = {f"jpeg {mode}": encode(PICTURE.convert(mode)) for mode in ("L", "RGB")}
READ |= {f"jpeg turned {n}": encode(PICTURE, exif=turned(n)) for n in (2, 3, 5, 6, 7, 8)}
READ |= {f"png {mode}": encode(PICTURE.convert(mode), "PNG") for mode in ("1", "L", "LA", "P", "RGB", "RGBA")}
READ |= {
    "progressive": encode(PICTURE, progressive=True),
    "4:4:4": encode(PICTURE, subsampling=0),
    "png transparent": encode(PICTURE, "PNG", transparency=(1, 2, 3)),
    "webp": encode(PICTURE, "WEBP"),
    "webp lossless": encode(PICTURE.convert("RGBA"), "WEBP", lossless=True),
    "1x1": encode(natural(1, 1)),
    "20000x1": encode(natural(20_000, 1), "PNG"),
}
NOT_READ = {
    "gif": encode(PICTURE, "GIF", save_all=True, append_images=[natural(121, 90, seed=1)]),
    "png 16": encode(Image.fromarray(np.arange(90 * 121, dtype=np.uint16).reshape(90, 121) * 6), "PNG"),
    "png turned": encode(PICTURE, "PNG", exif=turned(6)),
    "png turned late": LATE_EXIF,
    "xmp": encode(PICTURE, xmp=XMP),
    "tiff LA": encode(PICTURE.convert("LA"), "TIFF"),
    "tiff": encode(PICTURE, "TIFF"),
    "cmyk": encode(PICTURE.convert("CMYK")),
    "bmp": encode(PICTURE, "BMP"),
    "webp turned": encode(PICTURE, "WEBP", exif=turned(6)),
    "webp animated": encode(PICTURE, "WEBP", save_all=True, append_images=[natural(121, 90, seed=1)]),
    "no end": encode(PICTURE)[:-2],
}


def differ(ours: torch.Tensor, theirs: torch.Tensor) -> tuple[float, float]:
    """(mean absolute difference of 255, share of values off by more than 8)."""
    off = (ours.int() - theirs.int()).abs()
    return float(off.float().mean()), float((off > 8).float().mean())


def alike(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    mean, share = differ(ours, theirs)
    return ours.shape == theirs.shape and mean <= 0.5 and share <= 0.001


@dataclass(frozen=True)
class Images:
    images: Encoded | torch.Tensor


def refuse(position: int, refused: dict[int, str]) -> Images:
    raise AssertionError(f"{position}: {refused}")


def decoder(batches: Iterator[Images], size=(32, 32), channels: int = 3, again=refuse, batch: int = 64, ahead: int = 2):
    settings = DaliSettings(batch, channels, size, CPU, threads=2, ahead=ahead, hw_decoder_load=0.65)
    return DaliDecoder(batches, again, settings)


def decoded(views: list[View], size: tuple[int, int], channels: int = 3) -> torch.Tensor:
    return next(decoder(iter([Images(Encoded.of(views))]), size, channels)).images


def boxes(height: int, width: int, count: int) -> list[tuple[int, int, int, int]]:
    random = np.random.default_rng(0)
    sides = [(int(random.integers(1, height + 1)), int(random.integers(1, width + 1))) for _ in range(count - 1)]
    return [(0, 0, height, width)] + [
        (int(random.integers(height - h + 1)), int(random.integers(width - w + 1)), h, w) for h, w in sides
    ]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(64, 64), (48, 160)])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_boxes_of_natural_images_are_alike(kind: str, size: tuple[int, int], channels: int):
    raw = encode(natural(300, 220), kind)
    views = [View(raw, box, flip=i % 2 == 1) for i, box in enumerate(boxes(220, 300, 64))]
    image = decode_image(raw, channels)
    theirs = torch.stack([crop_image(image, box, size, flip) for _, box, flip in views])
    ours = decoded(views, size, channels)
    assert ours.dtype == torch.uint8
    assert alike(ours, theirs), differ(ours, theirs)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", READ)
def test_files_given_to_dali_become_the_same_pixels(name: str, channels: int):
    raw, image = READ[name], decode_image(READ[name], channels)
    found = read_header(raw)
    assert (found.height, found.width) == tuple(image.shape[1:]) and dali_reads(found, raw)
    for box in boxes(found.height, found.width, 4):
        exact = decoded([View(raw, box, False)], box[2:], channels)[0]
        assert (exact.int() - crop_image(image, box, box[2:]).int()).abs().max() <= (
            channels == 1
        )  # luminance may round otherwise


@pytest.mark.parametrize("name", NOT_READ)
def test_files_that_dali_reads_otherwise_are_kept_from_it(name: str):
    assert not dali_reads(read_header(NOT_READ[name]), NOT_READ[name])


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("grey", [True, False])
def test_pixels_reach_dali_unchanged(channels: int, grey: bool):
    image = decode_image(np.array(PICTURE.convert("L") if grey else PICTURE), channels)[:, 3:50, 7:60]
    assert torch.equal(decoded([View(as_pnm(image), (0, 0, 47, 53), False)], (47, 53), channels)[0], image)


def test_images_stay_valid_as_long_as_they_are_held():
    batches = [Images(Encoded.of([View(encode(natural(60, 40, seed)), (0, 0, 40, 60), False)] * 4)) for seed in range(12)]
    made = decoder(iter(batches))
    held = [(batch.images, batch.images.clone()) for batch in made]
    made.close()
    del made
    decoded([View(PNG, (0, 0, 90, 121), False)] * 64, (32, 32))  # whoever reuses freed memory does it here
    assert all(torch.equal(image, copy) for image, copy in held)
    assert len({image.data_ptr() for image, _ in held}) == 12


@pytest.mark.parametrize("channels", [1, 3])
def test_patches_are_made_of_channels_last_as_of_channels_first(channels: int):
    images = decoded([View(PNG, (0, 0, 90, 121), False)] * 3, (32, 48), channels)
    assert images.shape == (3, channels, 32, 48) and images.stride(1) == 1
    patches = MaskedPatchEmbed(16, channels, 8)
    assert torch.equal(patches(images), patches(images.contiguous()))


def test_as_many_batches_as_asked_for_are_taken_ahead():
    taken = []

    def batches() -> Iterator[Images]:
        for number in range(6):
            taken.append(number)
            yield Images(Encoded.of([View(PNG, (0, 0, 90, 121), False)]))

    made = decoder(batches(), ahead=2)
    assert [(next(made) and None, len(taken))[1] for _ in range(6)] == [3, 4, 5, 6, 6, 6]
    assert next(made, None) is None


@pytest.mark.parametrize("broken", [{0}, {1}, {5}, {0, 1}, {2, 3, 4}, {0, 5}, set(range(6))])
def test_a_pipeline_that_gives_up_goes_on_with_the_next_batch(broken: set[int]):
    views = [View(encode(natural(60, 40, seed)), (0, 0, 40, 60), False) for seed in range(6)]
    cut = View(PNG[:-600], (0, 0, 90, 121), False)
    batches = [
        Images(Encoded.of([view, cut, view, view, cut] if number in broken else [view] * 5))
        for number, view in enumerate(views)
    ]
    asked = []

    def again(position: int, refused: dict[int, str]) -> Images:
        asked.append(position)
        assert refused.keys() == {1, 4} and all(reason and "\n" not in reason for reason in refused.values())
        return Images(Encoded.of([views[position]] * 5))

    made = [batch.images for batch in decoder(iter(batches), again=again)]
    assert asked == sorted(broken)
    whole = [decoded([view] * 5, (32, 32)) for view in views]
    assert len(made) == 6 and all(torch.equal(a, b) for a, b in zip(made, whole, strict=True))


def test_what_fails_again_is_raised():
    cut = Images(Encoded.of([View(PNG[:-600], (0, 0, 90, 121), False)]))
    with pytest.raises(RuntimeError, match="nvImageCodec"):
        next(decoder(iter([cut]), again=lambda position, refused: cut))


# Whole loaders


def settings(source: Path | str, loader: str, **keys) -> Config:
    """Batches of 4 crops of 32 pixels, an 8x8 grid of patches, no worker processes."""
    data = {"batch_size": 4, "crop_size": 32, "num_workers": 0, "source": str(source), "loader": loader} | keys
    return config_from_dict({"data": data, "mask": {"patch_size": 4, "min_keep": 2, "truncate_group": 4}})


def load(setting: Config, steps: int) -> tuple[list[Batch], set[str]]:
    with Loader(setting, open_source(setting.data.address), World(0, 0, 1, CPU), 0, steps) as loader:
        batches = [batch for step in range(steps) for batch in loader.micro_batches(step)]
        return batches, loader.bad


def write(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, raw in files.items():
        (folder / name).write_bytes(raw)
    return folder


BAD = {
    "cut.jpg": encode(PICTURE)[:-300],
    "cut.png": PNG[:-600],
    "checksum.png": PNG[:2000] + b"\0\0\0\0" + PNG[2004:],
    "text.jpg": b"no image at all",
    "zero.jpg": b"",
    "float.tif": encode(Image.fromarray(np.zeros((9, 9), np.float32)), "TIFF"),
}
GOOD = {f"{name}.jpg": raw for name, raw in (READ | NOT_READ).items() if name != "no end"} | {
    "named.jpg": PNG,
    "last checksum.png": BROKEN_CHECKSUM,
    "Ünï côdé ☂.jpg": encode(PICTURE),
    **{f"{seed:02d}.jpg": encode(natural(160, 120, seed)) for seed in range(24)},
}


@pytest.mark.parametrize("channels", [1, 3])
def test_both_loaders_meet_the_same_bad_files_and_show_the_same_pictures(tmp_path: Path, channels: int):
    folder = write(tmp_path / "some images", GOOD | BAD)
    steps = 2 * ((len(GOOD) + len(BAD)) // 4)
    shown = {
        loader: load(settings(folder, loader, channels=channels, use_horizontal_flip=True), steps)
        for loader in ("dali", "torch")
    }
    (ours, our_bad), (theirs, their_bad) = shown.values()
    assert our_bad == their_bad == {str(folder / name) for name in BAD}
    assert [batch.bad for batch in ours] == [batch.bad for batch in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.context.idx, b.context.idx) and torch.equal(a.target.idx, b.target.idx)
        assert differ(a.images, b.images)[0] < 1  # sharp dots and 20,000 pixels in a row are resized less alike
    assert alike(torch.cat([a.images for a in ours]), torch.cat([b.images for b in theirs]))


def test_workers_change_no_byte_where_dali_gives_up(tmp_path: Path):
    folder = write(tmp_path / "images", GOOD | BAD)
    alone, helped = (load(settings(folder, "dali", num_workers=n, use_horizontal_flip=True), 14)[0] for n in (0, 2))
    assert all(torch.equal(a.images, b.images) and a.bad == b.bad for a, b in zip(alone, helped, strict=True))


@pytest.mark.parametrize("start", range(1, 9))
def test_resume_near_a_bad_file_is_byte_identical(tmp_path: Path, start: int):
    files = {f"{seed:02d}.png": encode(natural(60, 40, seed), "PNG") for seed in range(40)}
    folder = write(tmp_path / "images", files | {f"{n:02d}.png": PNG[:-600] for n in (3, 14, 25)})
    setting = settings(folder, "dali")
    whole = load(setting, 10)[0]
    with Loader(setting, open_source(folder), World(0, 0, 1, CPU), start, 10) as loader:
        rest = [batch for step in range(start, 10) for batch in loader.micro_batches(step)]
    assert any(batch.bad for batch in whole)
    assert all(torch.equal(a.images, b.images) and a.bad == b.bad for a, b in zip(whole[start:], rest, strict=True))


def test_an_image_that_only_dali_refuses_is_not_bad(tmp_path: Path, caplog):
    """Beside one that is: its name alone is in the list, the other's in a warning."""
    files = {"0.png": BROKEN_CHECKSUM, "1.png": PNG, "2.png": PNG[:-600], "3.png": BROKEN_CHECKSUM}
    folder = write(tmp_path / "images", files)
    with caplog.at_level(logging.WARNING):
        (ours,), bad = load(settings(folder, "dali"), 1)
    assert bad == {str(folder / "2.png")}
    said = [record.args[0] for record in caplog.records if "Pillow decodes it, DALI cannot" in record.message]
    assert sorted(said) == [str(folder / "0.png"), str(folder / "3.png")]
    assert alike(ours.images, load(settings(folder, "torch"), 1)[0][0].images)


@pytest.mark.parametrize("bad", ["png cut", "jpeg damaged inside", "text"])
def test_a_bad_file_changes_no_bit_of_the_other_rows(tmp_path: Path, bad: str):
    """The neighbours go on coming from DALI, not as Pillow's pixels."""
    raw = {"png cut": PNG[:-600], "jpeg damaged inside": JPEG_DAMAGED_INSIDE, "text": b"no image at all"}[bad]
    files = {f"{seed:02d}.jpg": encode(natural(160, 120, seed)) for seed in range(8)}
    whole, spoilt = write(tmp_path / "whole", files), write(tmp_path / "spoilt", files | {"05.jpg": raw})
    (good,), _ = load(settings(whole, "dali", batch_size=8), 1)
    (ours,), met = load(settings(spoilt, "dali", batch_size=8), 1)
    assert met == {str(spoilt / "05.jpg")}
    order = (
        MicroBatches(batch_recipe(settings(whole, "dali", batch_size=8)), open_source(whole), 0, 1).samples(0, 0, 8).tolist()
    )
    row = order.index(5)
    assert (ours.images != good.images).flatten(1).any(1).nonzero().flatten().tolist() == [row]
    dataset = EncodedBatches(batch_recipe(settings(spoilt, "dali", batch_size=8)), open_source(spoilt), 0, 1)
    before, after = (batch.images.arrays()[0] for batch in (dataset[0], dataset.without(0, {row: "DALI refuses it"})))
    assert [i for i in range(8) if before[i].tobytes() != after[i].tobytes()] == [row]


@pytest.mark.parametrize("loader", ["dali", "torch"])
def test_a_file_that_vanishes_in_the_run_is_replaced(tmp_path: Path, loader: str, caplog):
    files = {f"{seed:02d}.jpg": encode(natural(60, 40, seed)) for seed in range(40)}
    setting = settings(write(tmp_path / "images", files), loader, prefetch=1)
    whole = load(setting, 10)[0]
    source = open_source(setting.data.address)
    slot = MicroBatches(batch_recipe(setting), source, 0, 1).samples(7, 0, 4)[2]
    with Loader(setting, source, World(0, 0, 1, CPU), 0, 10) as made:
        shown = list(made.micro_batches(0))
        os.unlink(source.name(slot))
        shown += [batch for step in range(1, 10) for batch in made.micro_batches(step)]
        assert made.bad == {source.name(slot)} and source.name(slot) in caplog.text
    before, after = (torch.cat([batch.images for batch in batches]) for batches in (whole, shown))
    moved = (before != after).flatten(1).any(1).nonzero().flatten().tolist()
    assert moved == [4 * 7 + 2]


def test_loaders_are_chosen(tmp_path: Path, monkeypatch):
    folder = write(tmp_path / "images", {"0.png": PNG})
    source = open_source(folder)

    def chosen(*loaders: str) -> list[bool]:
        return [decodes_with_dali(settings(folder, loader), source) for loader in loaders]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert chosen("auto", "dali", "torch") == [False, True, False]
    assert decoder_rows()[0][:2] == ("auto", "torch") and "CPU" in decoder_rows()[0][2]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert chosen("auto", "dali", "torch") == [True, True, False]
    assert decoder_rows()[0] == ("auto", "dali", "it decodes on the GPU")
    monkeypatch.setattr(decode_dali, "find_spec", lambda name: None)
    assert chosen("auto", "torch") == [False, False]
    assert "pip install 'fastjepa[dali]'" in decoder_rows()[0][2] and decoder_rows()[1][:2] == ("dali", "no")
    with pytest.raises(ConfigError, match=r"dali needs NVIDIA DALI; run: pip install 'fastjepa\[dali\]'"):
        Loader(settings(folder, "dali", batch_size=1), source, World(0, 0, 1, CPU), 0)


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_the_share_of_a_hardware_decoder_reaches_a_gpu_alone(tmp_path: Path, monkeypatch, device: str):
    """DALI's operator checks its name; where there is no GPU the pipeline is described, not built."""
    from nvidia.dali import fn

    given, real = {}, fn.decoders.image_slice
    monkeypatch.setattr(fn.decoders, "image_slice", lambda *files, **options: given.update(options) or real(*files, **options))
    made = _dali_settings(settings(tmp_path, "dali", hw_decoder_load=0.25), torch.device(device))
    with contextlib.suppress(RuntimeError):
        _pipeline(deque(), made)
    assert given.get("hw_decoder_load") == (0.25 if device == "cuda" else None)


def test_what_is_not_set_or_was_retired_is_dalis_own():
    from nvidia.dali.backend import GetSchema

    schema, expected = (
        GetSchema("decoders__ImageSlice"),
        {"hw_decoder_load": DataConfig().hw_decoder_load} | RETIRED_KEYS["data"],
    )
    dalis = {name: float(schema.GetArgumentDefaultValueString(name)) for name in expected}
    assert dalis == pytest.approx(expected)


def test_workers_hand_over_one_block_of_files(tmp_path: Path):
    folder = write(tmp_path / "images", {f"{n}.png": PNG for n in range(4)})
    item = EncodedBatches(batch_recipe(settings(folder, "dali")), open_source(folder), 0, 1)[0]
    assert item.images.files.numel() == 4 * len(PNG) and item.images.ends.tolist() == [len(PNG) * n for n in range(1, 5)]
    assert item.images.boxes.dtype == torch.int32 and item.images.boxes.shape == (4, 4)


def load_for_ever(setting: Config) -> None:
    """Read batches; print the loader's worker processes once all have begun."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background inherits a deaf one
    with Loader(setting, open_source(setting.data.address), World(0, 0, 1, CPU), 0) as loader:
        for step in range(10**9):
            list(loader.micro_batches(step))
            if step == 5:
                print(*(worker.pid for worker in loader._workers.processes), flush=True)


@pytest.mark.parametrize("loader", ["dali", "torch"])
def test_ctrl_c_ends_every_process(tmp_path: Path, loader: str):
    folder = write(tmp_path / "images", {f"{n}.png": PNG for n in range(8)})
    run = ranks.begin(load_for_ever, settings(folder, loader, num_workers=2))
    while not run.stdout:
        assert run.poll(0.05) is None, run.stderr
    workers = [int(pid) for pid in run.stdout.split()]
    run.signal(signal.SIGINT)
    assert run.wait(60) == -signal.SIGINT
    assert len(workers) == 2 and "KeyboardInterrupt" in run.stderr, run.stderr
    deadline = time.monotonic() + 10
    while any(map(alive, workers)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def resident() -> int:
    """Bytes of this process's resident memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.long
@pytest.mark.parametrize("loader", ["dali", "torch"])
def test_a_thousand_batches_leak_nothing(tmp_path: Path, loader: str):
    folder = write(tmp_path / "images", {f"{seed:02d}.jpg": encode(natural(160, 120, seed)) for seed in range(64)})
    setting = settings(folder, loader, batch_size=16, num_workers=1)
    with Loader(setting, open_source(folder), World(0, 0, 1, CPU), 0, 1300) as made:
        for step in range(1300):
            list(made.micro_batches(step))
            if step == 299:
                before = resident()
        assert resident() < 1.02 * before


def digest(batch) -> str:
    fields = batch.images, batch.context.idx, batch.target.idx, batch.blocks.sequences.idx
    return hashlib.sha256(b"".join(field.contiguous().numpy().tobytes() for field in fields)).hexdigest()


def hashed(file: Path, words: list[str]) -> int:
    """Train, and write the digest of every micro-batch that this rank sees."""
    take = Loader.micro_batches

    def micro_batches(loader: Loader, step: int) -> Iterator[Batch]:
        for batch in take(loader, step):
            print(digest(batch), file=hashes, flush=True)
            yield batch

    Loader.micro_batches = micro_batches
    with open(f"{file}.{os.environ['RANK']}", "w") as hashes:
        return main(words)


@pytest.mark.slow
def test_two_ranks_stopped_and_resumed_see_the_batches_of_the_whole_run(tmp_path: Path):
    """Real runs over gloo, stopped in the second epoch, around files that DALI gives up on; every byte is hashed."""
    files = {f"{seed:02d}.png": encode(natural(60, 40, seed), "PNG") for seed in range(40)}
    folder = write(tmp_path / "images", files | {f"{n:02d}.png": PNG[:-600] for n in (3, 14, 25)})
    setting = settings(folder, "dali", num_workers=1, use_horizontal_flip=True).to_dict()
    setting["meta"] |= {"model_name": "vit_tiny", "depth": 1, "pred_depth": 1, "pred_emb_dim": 48}
    setting["runtime"] |= {"device": "cpu", "micro_batch": 2, "threads": 1}
    (tmp_path / "run.yaml").write_text(json.dumps(setting))

    def run(name: str, steps: int) -> list[list[str]]:
        """The hashes that each rank saw, two a step."""
        words = ["--config", tmp_path / "run.yaml", "--output", tmp_path / "run", "--max-steps", steps]
        ranks.succeeded(ranks.train(2, *words, function=partial(hashed, tmp_path / name)))
        return [Path(f"{tmp_path / name}.{rank}").read_text().splitlines() for rank in (0, 1)]

    whole, bad = [], []
    for rank in (0, 1):
        with Loader(config_from_dict(setting), open_source(folder), World(rank, 0, 2, CPU), 0, 10) as loader:
            batches = [batch for step in range(10) for batch in loader.micro_batches(step)]
        whole.append([digest(batch) for batch in batches])
        bad += [batch.bad for batch in batches[12:]]
    assert run("before", 6) == [hashes[:12] for hashes in whole]
    assert run("after", 10) == [hashes[12:] for hashes in whole]
    assert len(set(whole[0] + whole[1])) == 40 and any(bad)
